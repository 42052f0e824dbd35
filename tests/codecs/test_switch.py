"""Codecs that change with the round: when, what is remembered, and how it goes with feedback."""

from __future__ import annotations

import re

import pytest
import torch

from doubles import Halves
from memories import Members
from small import batch, loss_of, make_model, same, sgd, train
from thinwire import synchronize
from thinwire.codecs import (
    Switch,
    Warmup,
    bf16,
    dgc,
    feedback,
    fp32,
    int4,
    int8,
    layers,
    parse,
    switch,
    topk,
    warmup,
    warmup_shares,
)
from thinwire.errors import ConfigError
from thinwire.links.local import run
from thinwire.methods import every_step
from thinwire.topologies import Islands


def test_shares_of_the_paper():
    assert [round(share, 4) for share in warmup_shares(0.001, 5)] == [0.3162, 0.1, 0.0316, 0.01, 0.0032]
    assert warmup_shares(1.0, 3) == (1.0, 1.0, 1.0)


def test_stages_of_a_warmup_are_even_and_the_last_is_the_codec():
    codec = warmup(topk(1 / 1024) | int8, rounds=10, stages=4)
    shares = warmup_shares(1 / 1024, 4)
    found = [codec.at(done).leads[0].share for done in range(12)]
    assert found == [shares[stage] for stage in (0, 0, 0, 1, 1, 2, 2, 2, 3, 3)] + [1 / 1024] * 2
    assert codec.at(0) == topk(shares[0]) | int8
    assert codec.at(99) is codec.codec
    layered = warmup(layers(topk(1 / 16), topk(1 / 256) | int8, small=4), 2, 1).fit(((3,), (8, 8), (64, 64)))
    assert layered.at(0) == layers(topk(1 / 4), topk(1 / 16) | int8, small=4).fit(((3,), (8, 8), (64, 64)))


def test_feedback_goes_around_it():
    """Nothing is lost over the whole of it: exact, since small whole numbers do not round."""
    group, rounds = Members(feedback(warmup(topk(1 / 16), rounds=4, stages=2)), 1), torch.arange(8 * 32).view(8, 32)
    moved = sum((group.round([row.float()]) for row in rounds), torch.zeros(32))
    assert torch.equal(moved + group.own[0]["residual"], rounds.sum(dim=0).float())
    assert int(group.stages["rounds"]) == 8
    assert int((group.sent[0] != 0).sum()) == 2
    early = Members(dgc(warmup(topk(1 / 16), rounds=4, stages=2)), 1)
    early.round([rounds[1].float()])
    assert int((early.sent[0] != 0).sum()) == 13, "32 / 16^(1/3), rounded up"


def test_a_switch_over_a_link_is_one_codec_and_then_the_other():
    """Four rounds of the first alone give the bits of the first four of it."""
    first, both = every_step(codec=feedback(int8)), every_step(codec=switch(int8, 4, topk(1 / 4)))
    ours, theirs = (run(3, lambda link, m=m: train(link, m, 4, make_optimizer=sgd)) for m in (both, first))
    assert all(same(a.live, b.live) for a, b in zip(ours, theirs, strict=True))
    late = run(3, lambda link: train(link, both, 6, make_optimizer=sgd))
    other = run(3, lambda link: train(link, first, 6, make_optimizer=sgd))
    assert all(same(late[0].live, each.live) for each in late)
    assert not same(late[0].live, other[0].live)


def test_what_the_second_remembers_is_its_own():
    codec = switch(bf16, 2, switch(fp32, 2, Halves()))
    group = Members(feedback(codec), 1)
    counts = []
    for _ in range(6):
        group.round([torch.ones(4)])
        counts.append({name: float(value) for name, value in sorted(group.stages.items())})
    assert counts[1] == {"rounds": 2}
    assert counts[3] == {"rounds": 4, "then.rounds": 2}
    assert counts[5] == {"rounds": 6, "then.rounds": 4, "then.then.count": 2}


def test_the_count_is_saved_and_resumed():
    method = every_step(codec=dgc(warmup(topk(1 / 64), rounds=4, stages=2)))

    def member(link):
        model = make_model()
        with synchronize(model, sgd(model), method, link) as sync:
            for _ in range(3):
                for p in model.parameters():
                    p.grad = torch.ones_like(p)
                sync._inner.all[0].step()
            saved = sync.state_dict()
        again = make_model()
        with synchronize(again, sgd(again), method, link) as sync:
            again.load_state_dict(model.state_dict())
            sync.load_state_dict(saved)
            return int(sync.state_dict()["fragments"][0]["carried"]["stages"]["rounds"])

    assert run(2, member) == [3, 3]


def test_class_is_that_of_both():
    assert switch(fp32, 3, topk(1 / 4)).selects
    assert not switch(int8, 3, topk(1 / 4)).selects
    assert switch(int8, 3, topk(1 / 4)).contractive
    assert not switch(parse("fp16"), 3, topk(1 / 4)).contractive
    assert switch(int8, 3, topk(1 / 4)).wants_feedback
    assert not switch(int8, 3, bf16).wants_feedback
    assert not switch(int8, 3, Halves()).wants_feedback
    assert warmup(topk(1 / 4), 5).wants_feedback
    assert warmup(topk(1 / 4), 5).selects
    assert every_step(codec=warmup(topk(1 / 4), 5)).feedback == feedback(warmup(topk(1 / 4), 5))


def test_expression():
    for codec in (warmup(topk(1 / 64) | int4, 500), warmup(topk(1 / 64), 7, 2), switch(int8, 3, warmup(topk(0.5), 5))):
        assert parse(codec.spec) == codec
        assert codec.fit(((3, 4),)) == codec
    assert isinstance(parse("switch(int8, 3, fp32)"), Switch)
    assert isinstance(parse("warmup(topk(1/64), rounds=9)"), Warmup)
    assert warmup(topk(0.5), rounds=9, stages=3).spec == "warmup(topk(0.5), rounds=9, stages=3)"


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("switch(int8, 0, int4)", "switch over 0 rounds\n  expected  a whole number, at least 1"),
        ("switch(int8, 1.5, int4)", "switch over 1.5 rounds"),
        ("switch(3, 5, int4)", "switch from 3 to int4\n  expected  a codec, a number of rounds, and another codec"),
        ("switch(int4, 5, feedback(int4))", "switch from int4 to ErrorFeedback"),
        ("warmup(int8, 100)", "a warmup of int8: it has no share that could begin larger\n  expected  topk"),
        ("warmup(7, 100)", "a warmup of 7: it has no share"),
        ("warmup(topk(1/4), 0)", "warmup over 0 rounds"),
        ("warmup(topk(1/4), 100, 0)", "a warmup of 0 stages in 100 rounds"),
        ("warmup(topk(1/4), 4, 5)", "a warmup of 5 stages in 4 rounds\n  expected  a whole number, at least 1 and"),
        ("warmup(topk(1/4), 9) | int8", "warmup(topk(0.25), rounds=9) | ...: it is no codec but a round of several"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(expression, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        parse(expression)


def test_int4_is_used():
    """The inner codec of a switch is called: what comes out is on its grid."""
    group, x = Members(feedback(switch(int4, 1, fp32)), 1), torch.randn(64)
    assert torch.equal(group.round([x]), int4.decode(int4.encode(x, 0), 64, 0))


def test_other_leaders_of_islands_begin_anew_together():
    """Leaders of islands alone remember stages: of four members 0, 1, 3, 4 out of five, 0 led before and 3 did not."""
    method = every_step(codec=feedback(warmup(topk(1 / 16), rounds=10))).but(topology=Islands(2))

    def member(link, saved, numbers):
        model = make_model()
        optimizer = sgd(model)
        with synchronize(model, optimizer, method, link) as sync:
            if saved:
                weights, state = saved[link.rank]
                model.load_state_dict(weights)
                sync.load_state_dict(state)
            for number in numbers:
                loss_of(model, *batch(number, link.rank)).backward()
                optimizer.step()
                optimizer.zero_grad()
            return model.state_dict(), sync.state_dict()

    saved = run(5, lambda link: member(link, None, range(6)))
    resumed = run(4, lambda link: member(link, [saved[rank] for rank in (0, 1, 3, 4)], range(6, 9)))
    stages = [state["fragments"][0]["carried"]["stages"] for _, state in resumed]
    assert [int(held["rounds"]) if held else None for held in stages] == [3, None, 3, None]
