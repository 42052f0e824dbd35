"""A synchronizer in a group that changes: the same bits as ever while nobody does, and what each change comes to."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from torch import nn

import thinwire
from thinwire.codecs import parse
from thinwire.elastic.link import ElasticLink
from thinwire.elastic.quorum import Rules
from thinwire.elastic.schedules import Crash, CrashSaying, Life, Plan
from thinwire.elastic.simulated import simulate
from thinwire.errors import ConfigError, MeetingLost
from thinwire.links.local import run
from thinwire.links.network import Network
from thinwire.method import Phases
from thinwire.pace import BySpeed
from thinwire.rounds import Committed
from thinwire.schedules import Every, Paced
from thinwire.seeds.meetings import OverLink

STEPS = 24
METHODS = {
    "every step": lambda: thinwire.every_step(),
    "every step, int8": lambda: thinwire.every_step(codec=parse("int8")),
    "local sgd": lambda: thinwire.local_sgd(every=4),
    "diloco": lambda: thinwire.diloco(every=4),
    "diloco, topk": lambda: thinwire.diloco(every=4, codec=parse("topk(1/2)")),
    "diloco, ef21": lambda: thinwire.diloco(every=4, codec=parse("ef21(topk(1/2))")),
    "diloco, powersgd": lambda: thinwire.diloco(every=4, codec=parse("powersgd(1)")),
    "delayed": lambda: thinwire.delayed(every=4),
    "eager": lambda: thinwire.eager(every=4),
    "co2": lambda: thinwire.co2(every=4),
    "streaming": lambda: thinwire.streaming_diloco(every=6, fragments=2, overlap=2),
    "noloco": lambda: thinwire.noloco(every=4),
    "gossip": lambda: thinwire.gossip(every=4),
}


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def batch(host: str, step: int) -> torch.Tensor:
    """A host's data of a step, [4, 3]."""
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(1000 * ord(host) + step))


def train(net: nn.Module, sync: thinwire.Synchronizer, optimizer: torch.optim.Optimizer, host: str, steps: int) -> None:
    while sync.step < steps:
        x = batch(host, sync.step)
        (net(x) - x[:, :2]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


class Story:
    """What members of a simulated run lived through."""

    def __init__(self) -> None:
        self.outcomes: dict[str, list[thinwire.rounds.Outcome]] = {}
        self.changes: dict[str, list[thinwire.elastic.link.Change]] = {}
        self.made: dict[str, int] = {}


def play(method, lives, faults=(), *, steps=STEPS, least=1, story=None, facts=None, founds=None):
    """Lives of hosts train; returns how each ended, its value the step and the weights."""
    told = story or Story()

    def member(meeting):
        net, host = model(), meeting.name[0]
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.5)
        link = ElasticLink(meeting, founds=meeting.name.endswith(".1"))
        link.on_change(told.changes.setdefault(meeting.name, []).append)
        outcomes = told.outcomes.setdefault(meeting.name, [])
        chosen = (facts or {}).get(meeting.name, method)()
        try:
            with thinwire.synchronize(net, optimizer, chosen, link, observer=outcomes.append) as sync:
                train(net, sync, optimizer, host, steps)
            if sync.has_consensus:
                sync.take_consensus()
            return sync.step, weights(net)
        finally:
            link.close()

    plan = Plan(tuple(lives), tuple(faults), rules=Rules(min_replicas=least))
    return simulate(plan, member, Network(step_s=0.1))


@pytest.mark.parametrize("name", METHODS)
def test_as_long_as_nobody_comes_or_goes_it_is_any_other_link(name):
    method = METHODS[name]

    def member(link):
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.5)
        with thinwire.synchronize(net, optimizer, method(), link) as sync:
            train(net, sync, optimizer, "abc"[link.rank], STEPS)
        if sync.has_consensus:
            sync.take_consensus()
        return weights(net)

    fixed = run(3, member, Network(step_s=0.1))
    ends = play(method, [Life("a.1"), Life("b.1"), Life("c.1")])
    for found, due in zip(ends.values(), fixed, strict=True):
        assert found.value[0] == STEPS
        assert torch.equal(found.value[1], due)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("noloco", "gossip")])
@pytest.mark.parametrize("sent", [0, 1, 2])
@pytest.mark.parametrize("of", ["verdict", "rounds"])
def test_a_crash_in_a_round_leaves_survivors_with_one_model(name, of, sent):
    """In a verdict some have heard it and others have not: they still end the round alike, or not at all."""
    story = Story()
    lives = [Life("a.1"), Life("b.1"), Life("c.1"), Life("d.1")]
    ends = play(METHODS[name], lives, [CrashSaying("b.1", 2, sent=sent, of=of)], story=story)
    assert ends["b.1"].how == "crashed"
    found = [ends[who].value for who in ("a.1", "c.1", "d.1")]
    assert {step for step, _ in found} == {STEPS}
    assert all(torch.equal(found[0][1], each) for _, each in found)
    assert [change.left for change in story.changes["a.1"]][1:] == [("b.1",)]
    rounds = [(each.fragment, each.round) for each in story.outcomes["a.1"]]
    assert len(rounds) == len(set(rounds)), "no round counts twice"
    for who in ("c.1", "d.1"):  # whoever stood before a step of the model that was taken elsewhere is given the result
        missed = set(rounds) - {(each.fragment, each.round) for each in story.outcomes[who]}
        assert len(missed) <= any(change.healed for change in story.changes[who])


@pytest.mark.parametrize("sent", [0, 1])
def test_a_crash_in_the_very_last_round_leaves_one_model_whatever_fragment_it_is_of(sent):
    """The last of eight rounds is of fragment 1, after which nobody would meet any more."""
    ends = play(
        lambda: thinwire.streaming_diloco(every=6, fragments=2, overlap=0),
        [Life("a.1"), Life("b.1"), Life("c.1")], [CrashSaying("c.1", 7, sent=sent, of="verdict")],
    )  # fmt: skip
    assert ends["c.1"].how == "crashed"
    assert torch.equal(ends["a.1"].value[1], ends["b.1"].value[1])


def test_survivors_keep_what_they_were_to_send():
    """The round that broke is done again with the same steps: two members' mean, as if the third had never been."""
    ends = play(METHODS["diloco"], [Life("a.1"), Life("b.1")])
    broken = play(METHODS["diloco"], [Life("a.1"), Life("b.1"), Life("c.1")], [CrashSaying("c.1", 0, of="rounds")])
    for who in ("a.1", "b.1"):
        assert torch.equal(broken[who].value[1], ends[who].value[1])


@pytest.mark.parametrize("name", ["every step", "diloco", "diloco, ef21", "delayed", "streaming"])
@pytest.mark.parametrize("exchange", [11, 12])
def test_a_newcomer_that_crashes_when_one_of_its_donors_alone_has_gone_on_costs_nobody_anything(name, exchange):
    """One had settled with it and trains on, the other meets again: they end the round alike, and meet alike after."""
    story = Story()
    lives = [Life("a.1"), Life("b.1"), Life("c.2", 1.05)]
    ends = play(METHODS[name], lives, [CrashSaying("c.2", exchange, of="state")], story=story)
    assert ends["c.2"].how == "crashed"
    assert ends["a.1"].value[0] == ends["b.1"].value[0] == STEPS
    assert torch.equal(ends["a.1"].value[1], ends["b.1"].value[1])
    assert [change.names for change in story.changes["a.1"]][-1] == ("a.1", "b.1")


@pytest.mark.parametrize("name", METHODS)
def test_a_newcomer_is_given_the_state(name):
    story = Story()
    ends = play(METHODS[name], [Life("a.1"), Life("b.1"), Life("c.2", 1.05)], story=story)
    assert {end.value[0] for end in ends.values()} == {STEPS}
    if name not in ("noloco", "gossip"):
        assert torch.equal(ends["a.1"].value[1], ends["c.2"].value[1])
    first = story.changes["c.2"][0]
    assert first.healed
    assert first.behind == ("c.2",)
    assert [change.came for change in story.changes["a.1"]][1:] == [("c.2",)]
    assert all(len(each.ranks) == 3 for each in story.outcomes["c.2"][1:] if isinstance(each, Committed)) or name in (
        "noloco",
        "gossip",
    )


def test_a_newcomer_comes_to_a_second_phase_that_is_cut_otherwise():
    def phases():
        return Phases(thinwire.diloco(every=4), 8, thinwire.streaming_diloco(every=6, fragments=2, overlap=2))

    ends = play(phases, [Life("a.1"), Life("b.1"), Life("c.2", 1.6)])
    assert [end.value[0] for end in ends.values()] == [STEPS] * 3
    assert torch.equal(ends["a.1"].value[1], ends["c.2"].value[1])


def test_a_newcomer_of_another_method_is_refused_and_the_run_goes_on():
    other = lambda: thinwire.diloco(every=8)  # noqa: E731
    lives = [Life("a.1"), Life("b.1"), Life("c.2", 1.05)]
    ends = play(METHODS["diloco"], lives, facts={"c.2": other})
    assert isinstance(ends["c.2"].error, ConfigError)
    assert "refused: method.schedule: Every(steps=8, overlap=0); the run has Every(steps=4, overlap=0)" in str(
        ends["c.2"].error
    )
    assert torch.equal(ends["a.1"].value[1], ends["b.1"].value[1])


@pytest.mark.parametrize("differ", [1, 4])
@pytest.mark.parametrize("name", ["diloco", "every step", "noloco", "gossip"])
def test_all_begin_with_the_first_ones_weights_also_if_frozen_ones_alone_differ(name, differ):
    began: dict[str, torch.Tensor] = {}

    def member(meeting):
        net = model()
        net[0].weight.requires_grad_(False)
        for p in [*net.parameters()][:differ]:
            p.data.add_(ord(meeting.name[0]))
        optimizer = torch.optim.SGD(net[2].parameters(), lr=0.1)
        link = ElasticLink(meeting)
        with thinwire.synchronize(net, optimizer, METHODS[name](), link) as sync:
            began[meeting.name] = weights(net)
            train(net, sync, optimizer, meeting.name[0], 8)
        link.close()

    simulate(Plan((Life("a.1"), Life("b.1"), Life("c.1"))), member, Network(step_s=0.1))
    own = [p.detach().flatten() + ord("a") * (place < differ) for place, p in enumerate(model().parameters())]
    assert all(torch.equal(each, torch.cat(own)) for each in began.values())


def test_whoever_may_not_begin_a_run_does_not():
    ends = play(METHODS["diloco"], [Life("a.2"), Life("b.2")])
    assert all(isinstance(end.error, MeetingLost) for end in ends.values())
    assert "nobody of them is in the run" in str(ends["a.2"].error)


@pytest.mark.parametrize("host", "0z")
def test_a_newcomer_of_another_version_whose_words_are_others_is_refused(host, monkeypatch):
    def words(word):
        told = asdict(word)
        return told if word.facts["version"] != "0.0" else {name: told[name] for name in ("facts", "epoch")}

    monkeypatch.setattr("thinwire.regroup.asdict", words)

    def member(meeting):
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        link = ElasticLink(meeting)
        sync = thinwire.synchronize(net, optimizer, METHODS["diloco"](), link)
        if meeting.name[0] == host:
            meant = sync._meant() | {"version": "0.0"}
            sync._meant = lambda: meant
        try:
            with sync:
                train(net, sync, optimizer, meeting.name[0], STEPS)
        finally:
            link.close()
        return sync.step

    lives = (Life("a.1"), Life("b.1"), Life(f"{host}.2", 1.05))
    ends = simulate(Plan(lives, end_s=1e4), member, Network(step_s=0.1))
    assert [ends[who].value for who in ("a.1", "b.1")] == [STEPS, STEPS]
    assert "refused: version: 0.0; the run has" in str(ends[f"{host}.2"].error)


def test_whoever_may_not_begin_a_run_joins_one_that_another_begins():
    ends = play(METHODS["diloco"], [Life("a.1"), Life("b.2")])
    assert [end.value[0] for end in ends.values()] == [STEPS, STEPS]
    assert torch.equal(ends["a.1"].value[1], ends["b.2"].value[1])


@pytest.mark.parametrize("name", ["every step", "diloco", "diloco, ef21"])
def test_one_whose_memory_flipped_a_bit_is_given_the_others_state(name):
    """Broken memory at one of three is found in the round it shows in, and mended."""
    told: dict[str, list[bool]] = {}

    def member(meeting):
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        link = ElasticLink(meeting)
        link.on_change(lambda change: told.setdefault(meeting.name, []).append(change.healed))
        with thinwire.synchronize(net, optimizer, METHODS[name](), link) as sync:
            train(net, sync, optimizer, meeting.name[0], STEPS // 2)
            if meeting.name == "b.1":
                broken = net[0].weight.data if name == "every step" else sync._states[0].anchor
                broken.view(-1)[0] += 1e-3
            train(net, sync, optimizer, meeting.name[0], STEPS + 16)
        link.close()
        return weights(net)

    ends = simulate(Plan((Life("a.1"), Life("b.1"), Life("c.1"))), member, Network(step_s=0.1))
    assert torch.equal(ends["a.1"].value, ends["b.1"].value)
    assert torch.equal(ends["a.1"].value, ends["c.1"].value)
    assert told == {"a.1": [False, False], "b.1": [False, True], "c.1": [False, False]}


def test_members_of_unlike_speed_go_on_after_a_crash():
    def paced():
        method = thinwire.diloco(every=8)
        return thinwire.Method(
            schedule=Paced(Every(8), BySpeed()), payload=method.payload, codec=method.codec, outer=method.outer
        )

    lives = [Life("a.1"), Life("b.1"), Life("c.1"), Life("c.2", 1.0, after="c.1")]
    ends = play(paced, lives, [Crash("c.1", 1.93)], steps=64)
    found = [ends[who].value for who in ("a.1", "b.1", "c.2")]
    assert all(torch.equal(found[0][1], each) for _, each in found)


def test_what_knows_fixed_groups_alone_refuses_an_elastic_link():
    """It would never meet: each member would train by itself, and say nothing of it."""
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def member(meeting):
        link = ElasticLink(meeting)
        with pytest.raises(ConfigError, match="asynchronous over an elastic link"):
            thinwire.asynchronous(net, optimizer, link)
        with pytest.raises(ConfigError, match="tune over an elastic link"):
            OverLink(link)

    assert simulate(Plan((Life("a.1"),)), member)["a.1"].how == "returned"
