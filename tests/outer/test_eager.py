"""Eager outer steps against the papers' form, in which every member has an anchor of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from thinwire.errors import ConfigError
from thinwire.outer import SGD, Adam, ClippedMomentum, Eager, Gap, Mine, Nesterov, Now, Outer, Scheduled, SlowMo

ROUNDS, N = 12, 16


def deltas(members: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """What members send in each round.  [rounds, members, n]"""
    return torch.randn(ROUNDS, members, N, generator=torch.Generator().manual_seed(members)).to(dtype)


def ours(outer: Outer, sent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Live parameters as phases begin [rounds, members, n], anchors [rounds, n], and the last one [n]."""
    members = sent.shape[1]
    anchor, memory, own = sent.new_zeros(N), {}, [{} for _ in range(members)]
    lives, anchors = [], []
    for number, fresh in enumerate(sent):
        if number:
            anchor, memory = outer.step(anchor, sent[number - 1].mean(dim=0), memory, Now(number - 1))
        row = []
        for rank in range(members):
            mine = Mine(torch.zeros(N), torch.zeros(N), None, None, fresh[rank], members)
            live, own[rank] = outer.merge(mine, anchor, own[rank], Now(number))
            row.append(live)
        lives.append(torch.stack(row))
        anchors.append(anchor)
    last, _ = outer.step(anchor, sent[-1].mean(dim=0), memory, Now(len(sent) - 1))
    flushed, left = outer.merge(Mine(torch.zeros(N), torch.zeros(N), members=members), last, own[0], Now(len(sent)))
    assert torch.equal(flushed, last), "nothing is under way: the common anchor"
    assert left == {}
    return torch.stack(lives), torch.stack(anchors), last


def direct(outer: Outer, sent: Tensor) -> Tensor:
    """The papers' form: each member's own anchor, fed with its fresh part and the others' old ones."""
    rounds, members, _ = sent.shape
    lives = torch.zeros_like(sent)
    for rank in range(members):
        a, b = sent.new_zeros(N), {}
        for number in range(rounds):
            old = sent[number - 1] if number else torch.zeros_like(sent[0])
            others = sum((old[other] for other in range(members) if other != rank), sent.new_zeros(N))
            a, b = outer.step(a, (sent[number, rank] + others) / members, b, Now(number))
            lives[number, rank] = a
    return lives


@pytest.mark.parametrize("members", [1, 2, 4, 7])
@pytest.mark.parametrize(
    "outer", [SGD(0.7), SGD(0.4, 0.6), Nesterov(0.4, 0.9), ClippedMomentum(0.5, 0.7), SlowMo()], ids=repr
)
def test_one_anchor_for_all_is_an_anchor_for_each(outer, members):
    """Tolerance: float64 sums of 12 rounds; in float32 the same to 1e-5, against float64."""
    sent = deltas(members)
    assert torch.allclose(ours(Eager(outer), sent)[0], direct(outer, sent), atol=1e-13, rtol=1e-13)
    assert torch.allclose(ours(Eager(outer), sent.float())[0].double(), direct(outer, sent), atol=1e-5)


@pytest.mark.parametrize("outer", [SGD(0.7), Nesterov(0.7, 0.9), Scheduled(Nesterov(0.7, 0.9), warmup=3, decay=5)])
def test_one_member_is_the_step_without_delay_to_the_bit(outer):
    sent = deltas(1, torch.float32)
    lives, _, last = ours(Eager(outer), sent)
    assert torch.equal(lives, direct(outer, sent))
    assert torch.equal(last, lives[-1, 0]), "and the anchor is a round behind"


def test_without_momentum_members_differ_by_what_they_sent_last():
    sent = deltas(3)
    lives, anchors, _ = ours(Eager(SGD(0.7)), sent)
    for i in range(3):
        for j in range(3):
            gap = (lives[:, i] - lives[:, j]) + 0.7 / 3 * (sent[:, i] - sent[:, j])
            assert gap.abs().max() < 1e-12
    assert (lives.mean(dim=1) - anchors + 0.7 / 3 * sent.mean(dim=1)).abs().max() < 1e-12


def test_members_never_drift_apart():
    """Equal deltas in the end bring them together, whatever was before: a filter of the differences, not their sum."""
    sent = deltas(2).repeat(5, 1, 1)
    sent[ROUNDS:, 1] = sent[ROUNDS:, 0]
    lives, _, _ = ours(Eager(Nesterov(0.4, 0.9)), sent)
    spread = (lives[:, 0] - lives[:, 1]).abs().amax(dim=1)
    assert spread[: ROUNDS // 2].max() > 0.5
    assert spread[-1] <= spread[ROUNDS] * 0.9 ** (len(sent) - ROUNDS - 1) * 1.01


def test_a_learning_rate_that_falls_leaves_nothing_behind():
    """What is taken in advance is given back at the rate of then."""
    sent = deltas(2).repeat(4, 1, 1)
    sent[ROUNDS:] = 0.0
    lives, anchors, _ = ours(Eager(Scheduled(Nesterov(0.4, 0.5), decay=10, floor=0.01)), sent)
    assert (lives[-1] - anchors[-1]).abs().max() < 1e-9


@pytest.mark.parametrize("outer", [Adam(), ClippedMomentum(penalty=Gap()), Eager(SGD())], ids=repr)
def test_what_does_not_add_up_is_refused(outer):
    with pytest.raises(ConfigError, match=r"made eager: .* do not add up there\n.*linear.*\n.*Eager\(Nesterov"):
        Eager(outer)


def test_it_is_the_step_inside_for_the_anchor():
    assert Eager(Nesterov()).accepts == "delta"
    assert Eager(SGD()).anticipates
    assert Eager(SGD()).linear
    assert not Eager(SGD()).mixes
    anchor, update = torch.randn(2, 5)
    assert torch.equal(Eager(SGD(0.3)).step(anchor, update, {}, Now())[0], SGD(0.3).step(anchor, update, {}, Now())[0])
