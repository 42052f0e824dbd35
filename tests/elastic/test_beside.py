"""A newcomer that has fetched the state beside the run: only what changed since crosses again."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import thinwire
from thinwire import regroup
from thinwire.config import MethodOptions, Run
from thinwire.elastic.beside import NOTHING, Bounds, fetch_beside
from thinwire.elastic.board import Board
from thinwire.elastic.exhibit import Exhibit, serve
from thinwire.elastic.journal import Journal
from thinwire.elastic.link import ElasticLink
from thinwire.elastic.pieces import cut
from thinwire.elastic.schedules import Life, Plan
from thinwire.elastic.shelf import Shelf
from thinwire.elastic.simulated import simulate
from thinwire.errors import ConfigError
from thinwire.links.local import run as run_local
from thinwire.links.network import Network
from thinwire.packet import wire_bytes
from thinwire.train.display import Silent
from thinwire.train.elastic import Stay, train_among
from thinwire.train.text import TextOptions
from thinwire.units import Rate

pytest.importorskip("starlette", reason="states are served by starlette and uvicorn: pip install 'thinwire[elastic]'")
pytest.importorskip("uvicorn", reason="states are served by starlette and uvicorn: pip install 'thinwire[elastic]'")

TOKEN = "open sesame"
FROZEN_BYTES = 200 * 300 * 4
LIVES = (Life("a.1"), Life("b.1"), Life("c.2", 1.05))


def partly_frozen() -> nn.Module:
    torch.manual_seed(1)
    frozen = nn.Linear(300, 200, bias=False).requires_grad_(False)
    return nn.Sequential(frozen, nn.Linear(200, 2))


def trained(fetches: bool, steps: int = 24):
    """Bytes of the state that the newcomer was sent when it met the others, the frozen part, and how each ended."""
    exhibit, sent = Exhibit(Rate(1e12)), []
    exhibit.states()  # somebody asks

    def member(meeting):
        net, shelf = partly_frozen(), Shelf()
        if meeting.name == "c.2":
            with torch.no_grad():
                net[0].weight.zero_()  # so that it has to be given
            if fetches:
                with serve(exhibit, TOKEN) as address:
                    assert fetch_beside([address], TOKEN, shelf, lambda: False).step == 4
        link = ElasticLink(meeting, shelf=shelf, founds=meeting.name.endswith(".1"))
        optimizer = torch.optim.SGD(net[1].parameters(), lr=0.1)
        with thinwire.synchronize(net, optimizer, thinwire.diloco(every=4), link) as sync:
            if meeting.name == "c.2":
                sent.append(link.meter.by_purpose()["state"].received_bytes)
            while sync.step < steps:
                generator = torch.Generator().manual_seed(1000 * ord(meeting.name[0]) + sync.step)
                net(torch.randn(4, 300, generator=generator)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                if meeting.name == "a.1" and sync.step % 4 == 0:
                    exhibit.publish(sync.common_step, sync.for_newcomers)
        link.close()
        return net[0].weight.clone(), net[1].weight.detach().clone()

    ends = simulate(Plan(LIVES), member, Network(step_s=0.1))
    return sent[0], {name: end.value for name, end in ends.items()}


def test_what_never_changes_does_not_cross_again():
    """To the byte: the frozen part is one piece, and the other donor need not be asked for any."""
    whole, plainly = trained(fetches=False)
    rest, ends = trained(fetches=True)
    answer = wire_bytes("state pieces", {"pieces": (torch.uint8, 0)})
    assert whole - rest == FROZEN_BYTES + answer
    for name, values in ends.items():
        assert torch.equal(values[0], plainly["a.1"][0])
        assert torch.equal(values[1], plainly[name][1]), "and it trains as if all had been sent"


@pytest.mark.parametrize(
    "method", [thinwire.every_step, lambda: thinwire.diloco(every=4), lambda: thinwire.eager(every=4)]
)
def test_what_is_shown_is_what_is_handed_over(monkeypatch, method):
    """The same manifest, so that a newcomer that is quick needs nothing more."""
    handed, shown = [], []

    def spy(link, donors, takers, common, lent, shelf):
        if link.rank == 0:
            handed.append(cut(common).manifest.digest)
        return plain(link, donors, takers, common, lent, shelf)

    plain = regroup.hand_over
    monkeypatch.setattr(regroup, "hand_over", spy)

    def member(meeting):
        torch.manual_seed(1)
        net, link = nn.Linear(3, 2), ElasticLink(meeting, founds=meeting.name.endswith(".1"))
        ledger = {"done": [[0, 3]]}
        link.carry("ledger", lambda: ledger, lambda state: None)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with thinwire.synchronize(net, optimizer, method(), link) as sync:
            if meeting.name == "a.1":
                link.on_change(lambda change: shown.append(cut(sync.for_newcomers()).manifest.digest))
            while sync.step < 24:
                net(torch.ones(1, 3)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        link.close()

    simulate(Plan(LIVES), member, Network(step_s=0.1))
    assert len(handed) == 1
    assert shown == handed


def test_a_group_that_does_not_change_has_no_newcomers():
    def member(link):
        net = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with (
            thinwire.synchronize(net, optimizer, thinwire.diloco(), link) as sync,
            pytest.raises(ConfigError, match="what newcomers would be given, of a group that does not change"),
        ):
            sync.for_newcomers()

    run_local(1, member)


# --- the loop --------------------------------------------------------------------------------------------------------


RUN = Run(
    steps=16, task=TextOptions(size="0.2M", context=8, batch_size=2, validation_windows=2),
    method=MethodOptions("diloco", {"every": 4}),
)  # fmt: skip


class Counted:
    """An exhibit that remembers what was made."""

    def __init__(self, exhibit):
        self.exhibit, self.tried, self.made = exhibit, [], []

    def publish(self, step, state):
        self.tried.append(step)
        return self.exhibit.publish(step, lambda: self.made.append(step) or state())


@pytest.mark.parametrize("asked", [False, True])
def test_a_member_shows_its_state_after_rounds_if_somebody_asked(tmp_path, asked):
    task, shown = RUN.task.build(seed=0), Counted(Exhibit(Rate(1e12)))
    if asked:
        shown.exhibit.states()

    def member(meeting):
        link = ElasticLink(meeting)
        journal = Journal(tmp_path / "members" / f"{meeting.name}.jsonl")
        stay = Stay(tmp_path, fetched=replace(NOTHING, step=3, seconds=2.0, bytes=7))
        return train_among(
            RUN, task, link, stay, board=Board(link.name, {}), journal=journal, display=Silent(),
            stops=lambda: False, exhibit=shown if meeting.name == "a.1" else None,
        )  # fmt: skip

    simulate(Plan(LIVES[:2]), member, Network(step_s=0.1))
    assert shown.tried[:3] == [4, 8, 12]
    assert shown.made == ([4] if asked else [])
    lines = map(json.loads, (tmp_path / "members" / "a.1.jsonl").read_text().splitlines())
    joined = next(line for line in lines if line["event"] == "joined")
    assert (joined["beside_step"], joined["beside_seconds"], joined["beside_bytes"]) == (3, 2.0, 7)
    if asked:
        with serve(shown.exhibit, TOKEN) as address:
            shelf = Shelf()
            got = fetch_beside([address], TOKEN, shelf, lambda: False)
        assert got.step == 4
        assert got.bytes == shelf.nbytes - len(_manifest(shelf))


def _manifest(shelf):
    return next(text for text in map(shelf.get, list(shelf._held)) if text.startswith(b"{"))


# --- when it cannot be had -------------------------------------------------------------------------------------------


def shows(made):
    exhibit = Exhibit(Rate(1e12))
    exhibit.states()
    exhibit.publish(5, lambda: made)
    return exhibit


def test_nobody_to_ask():
    assert fetch_beside([], TOKEN, Shelf(), lambda: False) == NOTHING


def test_a_wrong_token_is_told_and_no_reason_to_stop():
    with serve(shows({"w": torch.ones(3)}), TOKEN) as address:
        found = fetch_beside([address], "another", Shelf(), lambda: False)
    assert found.step is None
    assert found.why == f"{address} does not take this token"


def test_a_state_that_nobody_shows_in_time():
    with serve(Exhibit(Rate(1e12)), TOKEN) as address:
        found = fetch_beside([address], TOKEN, Shelf(), lambda: False, Bounds(answers_s=0.3))
    assert found.why == "no member showed a state within 0.3 s"


def test_whoever_is_to_leave_does_not_wait_for_the_rest():
    made = {"w": torch.arange(6 << 20)}
    shelf = Shelf()
    with serve(shows(made), TOKEN) as address:
        found = fetch_beside([address], TOKEN, shelf, lambda: shelf.nbytes > 4 << 20)
    assert found.step is None
    assert found.why.endswith("missing bytes of a state arrived before it was ended")
    assert 0 < found.bytes < made["w"].nbytes
