"""Rounds that have all of the time to the next one: the recursion by hand, nothing lost, refusals."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thinwire
from small import adamw, local_steps, make_model, same, sgd
from thinwire import ConfigError, DivergedError, PeerLost, delayed, eager
from thinwire.links.base import Link
from thinwire.links.faulty import Tampered, flip
from thinwire.links.local import run
from thinwire.method import Method
from thinwire.outer import SGD, Eager, Mix, Rebase
from thinwire.packet import Kind, read
from thinwire.payloads import Delta, Gradient, Parameters
from thinwire.rounds import Committed, Skipped
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


# --- failures: nothing is lost --------------------------------------------------------------------------------------

#: Methods that add up what members did, once all of it was counted: outer SGD with lr 1.
ADDING = {
    "delayed": delayed(every=H, outer_lr=1.0),
    "eager": eager(every=H, outer_lr=1.0, momentum=0.0),
    "eager fragments": eager(every=H, fragments=2, outer_lr=1.0, momentum=0.0),
}


class Pair(nn.Module):
    """Two parameters, so that there may be two fragments."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.tensor([8.0])) for _ in range(2))


@dataclass
class Walk:
    """A member that moves its parameters by whole numbers of eighths, wherever they are; and what it has done.

    Sums of those do not round in float32, so what was done can be asked for to the bit.
    """

    link: Link
    method: Method
    model: nn.Module = field(default_factory=Pair)
    outcomes: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.sync = thinwire.synchronize(
            self.model, self.optimizer, self.method, self.link, observer=self.outcomes.append
        )

    def step(self, count: int) -> None:
        for _ in range(count):
            for p in self.model.parameters():
                p.grad = torch.tensor([-move(self.sync.step, self.link.rank)])
            self.optimizer.step()

    def saved(self, *, rescue: bool = False) -> dict[str, Any]:
        model = {name: value.clone() for name, value in self.model.state_dict().items()}
        return {"model": model, "sync": self.sync.state_dict(rescue=rescue)}

    def load(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.sync.load_state_dict(saved["sync"])

    def common(self) -> list[float]:
        return torch.cat(self.sync.consensus()).tolist()


def move(step: int, rank: int) -> float:
    return ((3 * step + 5 * rank) % 7 - 2) / 8


def done_by(ranks: Collection[int], steps: int) -> float:
    """Where the mean of members would be that only add up."""
    return 8.0 + sum(move(step, rank) for step in range(steps) for rank in ranks) / len(ranks)


def sent_by(name: str, steps: int) -> list[int]:
    """Of so many local steps, those before the last round of either parameter."""
    begins = [H // 2, H] if name == "eager fragments" else [H, H]
    return [max((step for step in range(begin, steps + 1, H)), default=0) for begin in begins]


def damaging(lost: Callable[[int, int], bool]) -> Callable[[str, int, int, Tensor], Tensor]:
    """What arrives of member 1's contributions to those (fragment, round) is damaged, as often as it is sent."""

    def change(purpose: str, sender: int, count: int, buffer: Tensor) -> Tensor:
        if purpose != "rounds" or sender != 1:
            return buffer
        header = read(buffer.clone()).header
        hit = header.kind == Kind.CONTRIBUTION and lost(header.fragment, header.round)
        return flip(buffer, len(buffer) // 2) if hit else buffer

    return change


def over(link: Link, lost: Callable[[int, int], bool]) -> Link:
    return Tampered(link, damaging(lost)) if link.rank == 0 else link


@pytest.mark.parametrize("name", ADDING)
@pytest.mark.parametrize("lost", [{0}, {1, 2}, {0, 1, 3}], ids=str)
def test_rounds_without_effect_lose_nothing(name, lost):
    def member(link):
        walk = Walk(over(link, lambda _, number: number in lost), ADDING[name])
        with walk.sync:
            walk.step(5 * H)
            walk.sync.finish()
            return walk.common(), walk.outcomes

    for common, outcomes in run(2, member):
        assert common == [done_by((0, 1), steps) for steps in sent_by(name, 5 * H)]
        assert sum(isinstance(outcome, Skipped) for outcome in outcomes) == len(lost) * ADDING[name].payload.fragments


@pytest.mark.parametrize("name", ADDING)
@pytest.mark.parametrize("stop", [4, 5, 7, 10])
@pytest.mark.parametrize("lost", [set(), {0}, {1}], ids=str)
def test_rounds_finished_ahead_of_time_lose_nothing_either(name, stop, lost):
    """Training goes on after finish(), in mid-phase; the round that it ended had effect or had not."""

    def member(link):
        walk = Walk(over(link, lambda _, number: number in lost), ADDING[name])
        with walk.sync:
            walk.step(stop)
            walk.sync.finish()
            walk.step(5 * H - stop)
            walk.sync.finish()
            return walk.common(), walk.outcomes

    for common, outcomes in run(2, member):
        assert common == [done_by((0, 1), steps) for steps in sent_by(name, 5 * H)]
        assert any(isinstance(outcome, Skipped) for outcome in outcomes) == bool(lost)


@pytest.mark.parametrize("name", ADDING)
@pytest.mark.parametrize("stop", [5, 8])
@pytest.mark.parametrize("end", [False, True])
def test_a_resumed_run_with_rounds_without_effect_has_the_bits_of_one_that_never_stopped(name, stop, end):
    """Stopped while a lost round is under way, or after it was finished and is owed."""

    def whole(link):
        walk = Walk(over(link, lambda _, number: number in (0, 1)), ADDING[name])
        with walk.sync:
            walk.step(stop)
            if end:
                walk.sync.finish()
            walk.step(6 * H - stop)
            return walk.common(), [p.item() for p in walk.model.parameters()]

    def in_two(link):
        link = over(link, lambda _, number: number in (0, 1))
        walk = Walk(link, ADDING[name])
        with walk.sync:
            walk.step(stop)
            if end:
                walk.sync.finish()
            saved = walk.saved()
            walk.step(3)
        again = Walk(link, ADDING[name])
        with again.sync:
            again.load(saved)
            again.step(6 * H - stop)
            return again.common(), [p.item() for p in again.model.parameters()]

    assert run(2, whole) == run(2, in_two)


@pytest.mark.parametrize("name", ADDING)
@pytest.mark.parametrize("after", [2 * H + 1, 3 * H - 1])
def test_after_a_member_is_lost_the_others_go_on_with_all_they_did(name, after):
    """Member 2 of three leaves in mid-phase; its last two phases are lost with it, and nothing of the others."""
    rescued: dict[int, dict[str, Any]] = {}

    def member(link):
        walk = Walk(link, ADDING[name])
        try:
            with walk.sync:
                walk.step(after)
                if link.rank == 2:
                    raise ZeroDivisionError("a disk burns")
                walk.step(4 * H)
        except PeerLost:
            rescued[link.rank] = walk.saved(rescue=True)
            raise

    with pytest.raises(ZeroDivisionError):
        run(3, member)
    assert set(rescued) == {0, 1}
    sync = rescued[0]["sync"]
    assert sync["step"] == rescued[1]["sync"]["step"]
    arrived = [under_way["fragment"] for under_way in sync["under_way"]]
    counted = [state["committed"] + arrived.count(f) for f, state in enumerate(sync["fragments"])]
    counted *= 3 - len(counted)

    def goes_on(link):
        walk = Walk(link, ADDING[name])
        with walk.sync:
            walk.load(rescued[link.rank])
            walk.step(6 * H - walk.sync.step)
            walk.sync.finish()
            return walk.common()

    for common in run(2, goes_on):
        for end, rounds, begin, sent in zip(common, counted, sent_by(name, H), sent_by(name, 6 * H), strict=True):
            seen = begin + (rounds - 1) * H  # steps that all three were counted for
            both = done_by((0, 1), sent) - done_by((0, 1), seen)
            assert end == pytest.approx(done_by((0, 1, 2), seen) + both, abs=1e-5)
    assert min(counted) < (after - H // 2) // H + 1, "a round was lost"


def poisoned(link: Link, method: Method, when: dict[int, int], count: int) -> Walk:
    """A walk in which parameters of members become NaN after a step: step -> rank."""
    walk = Walk(link, method)
    with walk.sync:
        for step in range(1, count + 1):
            walk.step(1)
            if when.get(step) == link.rank:
                with torch.no_grad():
                    walk.model.first.fill_(math.nan)
        walk.sync.finish()
    return walk


@pytest.mark.parametrize("name", ["delayed", "eager"])
@pytest.mark.parametrize("step", [1, H - 1, H + 2, 2 * H + 1])
def test_a_member_without_finite_values_loses_that_phase_and_no_other(name, step, caplog):
    caplog.set_level(logging.WARNING)

    def member(link):
        walk = poisoned(link, ADDING[name], {step: 1}, 5 * H)
        return walk.common(), [p.item() for p in walk.model.parameters()], [o.ranks for o in walk.outcomes]

    phase = (step // H) * H  # it is noticed when the phase ends
    lost = range(phase, phase + H)
    expected = 8.0
    for number in range(5):
        steps = range(number * H, (number + 1) * H)
        ranks = (0,) if steps == lost else (0, 1)
        expected += sum(move(s, rank) for s in steps for rank in ranks) / len(ranks)
    for common, live, ranks in run(2, member):
        assert common == [expected] * 2
        assert live == common
        assert ranks == [(0,) if number == step // H else (0, 1) for number in range(5)]
    assert f"round {step // H}: member 1 had no finite values and was left out" in caplog.text


def test_what_is_owed_waits_for_a_member_to_be_well_again():
    """Round 0 has no effect, and when its end is due the member has no finite values: it goes with the one after."""

    def member(link):
        link = over(link, lambda _, number: number == 0)
        walk = poisoned(link, ADDING["eager"], {H + 1: 1}, 5 * H)
        return walk.common()[0]

    phases = [range(number * H, (number + 1) * H) for number in range(5)]
    alone = sum(move(step, 0) for step in (*phases[0], *phases[1]))  # round 1 is member 0's, for both
    both = sum(move(step, rank) for phase in phases[2:] for step in phase for rank in (0, 1))
    both += sum(move(step, 1) for step in phases[0])
    assert run(2, member) == [8.0 + alone + both / 2] * 2


def test_poison_in_the_last_phase_does_not_outlive_finish():
    def member(link):
        walk = poisoned(link, ADDING["eager"], {3 * H + 2: 1}, 3 * H + 2)
        return [p.item() for p in walk.model.parameters()], walk.common()[0]

    (_, common), (live, _) = run(2, member)
    assert live == [common, common]


def test_a_member_that_was_left_out_keeps_what_it_did_since():
    """It was healed when the round began; finish() in mid-phase takes nothing from it then."""

    def member(link):
        walk = poisoned(link, ADDING["delayed"], {H + 1: 1}, 2 * H + 3)
        return [p.item() for p in walk.model.parameters()], walk.common()[0]

    since = [sum(move(step, rank) for step in range(2 * H, 2 * H + 3)) for rank in (0, 1)]
    for (live, common), moved in zip(run(2, member), since, strict=True):
        assert live == [common + moved] * 2


def test_a_member_that_starts_over_begins_with_a_fresh_optimizer():
    def member(link):
        model = make_model()
        optimizer = adamw(model)
        with thinwire.synchronize(model, optimizer, delayed(every=2), link):
            local_steps(model, optimizer, link.rank, range(3))
            if link.rank == 1:
                with torch.no_grad():
                    next(model.parameters()).fill_(math.nan)
                optimizer.state[next(model.parameters())]["exp_avg"].fill_(math.nan)
            local_steps(model, optimizer, link.rank, range(3, 4))
            return len(optimizer.state), bool(torch.isfinite(next(model.parameters())).all())

    assert run(2, member) == [(6, True), (0, True)]


@pytest.mark.parametrize("name", ["delayed", "eager"])
def test_no_finite_values_on_any_member_is_divergence(name):
    def member(link):
        with pytest.raises(DivergedError, match="no member had finite values"):
            poisoned(link, ADDING[name], {1: link.rank}, 3 * H)

    run(2, member)


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["delayed", "eager"])
def test_bf16_parameters_send_no_rounding(name):
    """Once all that was done is counted the anchor stays, though it has digits that the parameters have not."""
    method = ADDING[name].but(outer=Eager(SGD(0.3)) if name == "eager" else SGD(0.3))

    def member(link):
        model = make_model().bfloat16()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        anchors = []
        with thinwire.synchronize(model, optimizer, method, link) as sync:
            for number in range(6 * H):
                for p in model.parameters():
                    p.grad = torch.full_like(p, (0.37 + link.rank) if number == 0 else 0.0)
                optimizer.step()
                anchors.append(sync.consensus()[0].clone())
            sync.finish()
            off_grid = not torch.equal(sync.consensus()[0], sync._fragments.gather(0))
        return anchors, off_grid

    for anchors, off_grid in run(2, member):
        assert off_grid
        assert not torch.equal(anchors[0], anchors[2 * H])
        assert all(torch.equal(anchor, anchors[2 * H]) for anchor in anchors[2 * H :])


@pytest.mark.parametrize("method", [delayed(every=2), eager(every=2), eager(every=4, fragments=2)], ids=str)
def test_a_grad_scaler_changes_nothing_and_its_skipped_steps_are_steps(method):
    def member(link, scale, overflow):
        model = make_model()
        optimizer = sgd(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale) if scale else None
        outcomes = []
        with thinwire.synchronize(model, optimizer, method, link, scaler=scaler, observer=outcomes.append) as sync:
            for number in range(8):
                x = torch.randn(8, 12, generator=torch.Generator().manual_seed(10 * number + link.rank))
                loss = model(x).square().mean()
                (scaler.scale(loss) if scaler else loss).backward()
                if overflow and number in (2, 3) and link.rank == 1:
                    next(model.parameters()).grad[0, 0] = math.inf
                if scaler:
                    scaler.step(optimizer)
                    scaler.update()
                else:
                    optimizer.step()
                optimizer.zero_grad()
            assert sync.step == 8
            sync.finish()
            return [vector.clone() for vector in sync.consensus()], outcomes

    plain, scaled, overflown = (
        run(2, lambda link, o=o: member(link, *o)) for o in ((0.0, False), (1024.0, False), (1024.0, True))
    )
    assert same(plain[0][0], scaled[0][0])
    assert same(overflown[0][0], overflown[1][0])
    assert not same(overflown[0][0], plain[0][0])
    assert [type(outcome) for outcome in overflown[0][1]] == [Committed] * len(plain[0][1])
