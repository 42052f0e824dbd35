"""Rounds that have all of the time to the next one: the recursion by hand, nothing lost, refusals."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

import thinwire
from thinwire import ConfigError
from thinwire.links.local import run
from thinwire.method import Method
from thinwire.outer import SGD, Mix, Rebase
from thinwire.payloads import Delta, Gradient, Parameters
from thinwire.schedules import Every

H = 4


class Scalar(nn.Module):
    """One parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([8.0]))


def follow(method: Method, members: int, steps: int, *, flush: bool = True) -> list[tuple[list[float], Tensor]]:
    """Members pull a scalar towards their rank; returns parameters after each step, and the anchor at the end."""

    def member(link: thinwire.links.base.Link) -> tuple[list[float], Tensor]:
        model = Scalar()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
        seen = []
        with thinwire.synchronize(model, optimizer, method, link) as sync:
            for _ in range(steps):
                (0.5 * (model.weight - link.rank) ** 2).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                seen.append(model.weight.item())
            if flush:
                sync.finish()
            seen.append(model.weight.item())
            return seen, sync.consensus()[0]

    return run(members, member)


def by_hand(members: int, rounds: int, lr: float, momentum: float) -> tuple[list[list[float]], float]:
    """The delayed outer step written out: what is sent at the end of one phase is applied at the end of the next."""
    a, b = 8.0, 0.0
    start = [a] * members
    pending: float | None = None
    ends = []
    for _ in range(rounds):
        live = list(start)
        for _ in range(H):
            live = [0.75 * w + 0.25 * rank for rank, w in enumerate(live)]
        deltas = [s - w for s, w in zip(start, live, strict=True)]
        if pending is not None:
            b = momentum * b + pending
            a -= lr * b
        start = [a] * members
        pending = sum(deltas) / members
        ends.append(start)
    b = momentum * b + (pending or 0.0)
    return ends, a - lr * b


@pytest.mark.parametrize(("lr", "momentum"), [(0.7, 0.0), (0.4, 0.5)])
def test_a_full_overlap_is_the_recursion_by_hand(lr: float, momentum: float):
    method = Method(schedule=Every(H, overlap=H), payload=Delta(), outer=SGD(lr, momentum))
    results = follow(method, 3, 5 * H)
    ends, last = by_hand(3, 5, lr, momentum)
    for rank, (seen, anchor) in enumerate(results):
        for number, start in enumerate(ends):
            assert seen[(number + 1) * H - 1] == pytest.approx(start[rank], abs=1e-5)
        assert anchor.item() == pytest.approx(last, abs=1e-5)
        assert seen[-1] == anchor.item(), "after finish() everybody holds the anchor"


def test_the_first_phase_starts_again_from_the_anchor():
    """Its progress is under way; if it stayed in the parameters as well, it would count twice."""
    method = Method(schedule=Every(H, overlap=H), payload=Delta(), outer=SGD(1.0))
    for seen, _ in follow(method, 2, H):
        assert seen[H - 1] == 8.0


def test_finishing_in_the_middle_of_a_phase_keeps_its_steps():
    method = Method(schedule=Every(H, overlap=H), payload=Delta(), outer=SGD(1.0))
    for seen, anchor in follow(method, 2, H + 2):
        assert seen[-1] == pytest.approx(anchor.item() + (seen[H + 1] - 8.0), abs=1e-6)


def test_refusals():
    whole = Every(H, overlap=H)
    for outer in (Mix(SGD(), 0.5), Rebase(SGD())):
        told = re.escape(f"outer step {outer!r} with schedule {whole!r}")
        with pytest.raises(ConfigError, match=told + r".*\n.*below 4.*\n.*overlap=3, or leave Mix"):
            Method(schedule=whole, payload=Delta(), outer=outer)
    Method(schedule=whole, payload=Delta(), outer=Mix(SGD(), 0.0))
    with pytest.raises(ConfigError, match=r"payload Parameters.*overwritten.*\n.*deltas.*\n.*send Delta"):
        Method(schedule=whole, payload=Parameters(), outer=thinwire.outer.Average())
    with pytest.raises(ConfigError, match=r"payload gradient with schedule.*\n.*without overlap\n.*Every\(1\)"):
        Method(schedule=Every(1, overlap=1), payload=Gradient())
