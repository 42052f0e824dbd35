"""How long to the next round, and with how many steps of each? Decided anew after every round, by all members alike.

With a round every member tells a few numbers to all. A pacer is a pure function of what was told, so that all decide
the same without another word; what it decides holds from the beginning of the next round, or from this one's end if
nothing overlaps it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Protocol

from thinwire.batch_size import Moments, Noise, next_batch_size
from thinwire.errors import ConfigError


@dataclass(frozen=True)
class Told:
    """A member's numbers.

    step_s   seconds of one of its local steps, without waiting: the median since its last round
    samples  since its last round
    lr       inner learning rate
    round_s  seconds from first to last of the round that ended last; 0 if none has
    size2    squared norm of what it sent in that round; -1 if it was not in it
    update2  squared norm of what that round combined to
    """

    step_s: float
    samples: float
    lr: float
    round_s: float = 0.0
    size2: float = 0.0
    update2: float = 0.0


@dataclass(frozen=True)
class Pace:
    """What holds until the next decision.

    steps   shared steps from one round to the next: what schedules, learning rates and the end of a run count in
    local   local steps that a member makes in that time, by rank; one not named makes `steps`
    parts   micro-batches of a member's optimizer step, by rank; one not named: as its loop likes
    memory  what the pacer remembers
    """

    steps: int
    local: Mapping[int, int] = field(default_factory=dict)
    parts: Mapping[int, int] = field(default_factory=dict)
    memory: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Pacing:
    """Where a member stands in its pace, between two rounds.

    since    shared step at which the last round began
    local    local steps since then
    size2    squared norm of what it sends in the round under way
    last     seconds, size2 and update2 of the round that ended last, as they are told; -1 for a size2 not in it
    decided  the next pace, once it is known
    """

    pace: Pace
    since: int = 0
    local: int = 0
    size2: float = 0.0
    last: tuple[float, float, float] = (0.0, 0.0, 0.0)
    decided: Pace | None = None

    def moved(self) -> Pacing:
        """After one more local step."""
        return replace(self, local=self.local + 1)

    def step(self, rank: int) -> int:
        """The shared step that member `rank` has reached."""
        return self.since + self.local * self.pace.steps // self.pace.local.get(rank, self.pace.steps)

    def adopted(self) -> Pacing:
        """With what was decided in force."""
        return self if self.decided is None else replace(self, pace=self.decided, decided=None)


class Pacer(Protocol):
    """Decides from what all have told."""

    @property
    def paces(self) -> str:
        """What it changes: "steps" between rounds, or "parts" of an optimizer step."""

    def decide(self, pace: Pace, told: Mapping[int, Told]) -> Pace:
        """The next pace; `told` in ascending order of rank. Everything in it, and nothing else, may decide."""


@dataclass(frozen=True)
class BySpeed:
    """Dynamic local updates: a slow member makes fewer local steps, so that all come to the round together.

    H_w = max(1, floor(H v_w / v))      v_w local steps a second of member w, v those of the fastest

    smooth  share of the old figure in the running mean of seconds a step; 0 believes the last round alone
    Source  Liu et al. 2024, arXiv:2401.09135 (DyLU).
    """

    smooth: float = 0.5
    paces: str = field(default="steps", init=False, repr=False)

    def __post_init__(self) -> None:
        _check_share("by_speed: smooth", self.smooth)

    def decide(self, pace: Pace, told: Mapping[int, Told]) -> Pace:
        step_s = {rank: self._smoothed(pace, rank, each.step_s) for rank, each in told.items()}
        fastest = min(step_s.values())
        local = {
            rank: max(1, _floor(pace.steps * fastest / seconds)) for rank, seconds in step_s.items() if seconds > 0
        }
        return replace(pace, local=local, memory={f"step_s.{rank}": seconds for rank, seconds in step_s.items()})

    def _smoothed(self, pace: Pace, rank: int, seconds: float) -> float:
        before = pace.memory.get(f"step_s.{rank}", seconds)
        return self.smooth * before + (1 - self.smooth) * seconds


@dataclass(frozen=True)
class ByLink:
    """As many local steps as keep a round's share of the time small, and no more than keep members together.

    H <- T / (share t)                     T seconds a round, t seconds a local step of the slowest member
    H <- H / 2 instead, if (mean_i |x_i|^2) / |mean_i x_i|^2 - 1 > drift

    T is of the member that waited least for others. H at most doubles from one round to the next.

    share        of the time that rounds may take on top of local steps
    drift        disagreement of what members send, in units of what they agree on; from 0 (all send the same) upwards
    least, most  limits of H
    """

    share: float = 0.1
    drift: float = math.inf
    least: int = 1
    most: int = 1000
    paces: str = field(default="steps", init=False, repr=False)

    def __post_init__(self) -> None:
        _check_positive("by_link: share", self.share)
        _check_positive("by_link: drift", self.drift)
        if not 1 <= self.least <= self.most:
            raise ConfigError(
                f"by_link: between {self.least} and {self.most} local steps",
                expected="1 <= least <= most",
                mend="least=1, most=1000",
            )

    def decide(self, pace: Pace, told: Mapping[int, Told]) -> Pace:
        first = next(iter(told.values()))
        if first.update2 == 0:  # no round has ended yet
            return pace
        round_s = min(each.round_s for each in told.values())
        step_s = max(each.step_s for each in told.values())
        wanted = math.ceil(round_s / (self.share * step_s)) if step_s > 0 else self.most
        if disagreement(told) > self.drift:
            wanted = min(wanted, pace.steps // 2)
        return replace(pace, steps=max(self.least, min(self.most, wanted, 2 * pace.steps)))


@dataclass(frozen=True)
class ByRate:
    """The quadratic synchronisation rule: rounds become rarer as the learning rate falls.

    H = max(least, floor((alpha / lr)^2))

    While the learning rate has not fallen yet (warm-up) H stays at `least`. With a constant one it never changes.
    Source  Gu et al. 2024, arXiv:2310.14423 (QSR).
    """

    alpha: float
    least: int = 4
    most: int = 10_000
    paces: str = field(default="steps", init=False, repr=False)

    def __post_init__(self) -> None:
        _check_positive("by_rate: alpha", self.alpha)
        if not 1 <= self.least <= self.most:
            raise ConfigError(
                f"by_rate: between {self.least} and {self.most} local steps",
                expected="1 <= least <= most",
                mend="least=4, most=10000",
            )

    def decide(self, pace: Pace, told: Mapping[int, Told]) -> Pace:
        lr = next(iter(told.values())).lr
        highest = max(lr, pace.memory.get("highest", 0.0))
        falls = 0 < lr < highest
        wanted = int((self.alpha / lr) * (self.alpha / lr)) if falls and lr * self.most > 0 else self.least
        return replace(pace, steps=max(self.least, min(self.most, wanted)), memory={"highest": highest})


@dataclass(frozen=True)
class ByShares:
    """A global batch of so many samples, each member's part of it in proportion to its speed (DeDLOC).

    parts_w = B v_w / (m sum_j v_j), rounded so that together they reach B        v_w samples a second, m a micro-batch

    Members weigh by samples (WeightedMean, Synchronizer.count), so the combined gradient is the batch's own whoever
    made how much of it. A loop makes `Synchronizer.parts` micro-batches before each optimizer step.

    Source  Diskin et al. 2021, arXiv:2106.10207 (DeDLOC).
    Differs peers there watch a shared count until the batch is full; here they agree beforehand on who makes what, from
            the speeds told with the last round, so that nobody's samples come too late or are made in vain.
    """

    batch: int
    smooth: float = 0.5
    paces: str = field(default="parts", init=False, repr=False)

    def __post_init__(self) -> None:
        _check_positive("by_shares: batch", self.batch)
        _check_share("by_shares: smooth", self.smooth)

    def decide(self, pace: Pace, told: Mapping[int, Told]) -> Pace:
        return _shared_out(pace, told, self.batch, self.smooth)


@dataclass(frozen=True)
class ByNoise:
    """The global batch grows when gradients' noise asks for it (AdAdaGrad's norm test), shared out by speed.

    b <- min(max(b, sigma^2 / (eta^2 |grad|^2)), most)      sigma^2, |grad|^2 as members' gradients tell (batch_size)

    batch   to begin with, in samples of all members
    eta     noise that is borne, in units of the gradient
    most    the largest batch
    decay   of what is remembered of sigma^2 and |grad|^2 from step to step
    smooth  as of by_shares
    Source  Lau, Liu & Kolar 2024, arXiv:2402.11215, with the estimate between members of thinwire.batch_size.
    """

    batch: int
    eta: float = 0.5
    most: int = 50_000
    decay: float = 0.9
    smooth: float = 0.5
    paces: str = field(default="parts", init=False, repr=False)

    def __post_init__(self) -> None:
        _check_positive("by_noise: eta", self.eta)
        _check_share("by_noise: decay", self.decay)
        _check_share("by_noise: smooth", self.smooth)
        if not 1 <= self.batch <= self.most:
            raise ConfigError(
                f"by_noise: from {self.batch} to {self.most} samples",
                expected="1 <= batch <= most",
                mend="batch=64, most=4096",
            )

    def decide(self, pace: Pace, told: Mapping[int, Told]) -> Pace:
        noise = Noise(*(pace.memory.get(f"noise.{name}", 0.0) for name in ("variance", "signal", "weight")))
        now = int(pace.memory.get("batch", self.batch))
        was = {rank: pace.memory.get(f"samples.{rank}", 0.0) for rank, each in told.items() if each.size2 >= 0}
        update2 = next(iter(told.values())).update2
        if update2 > 0 and len(was) > 1 and min(was.values()) > 0:  # of the round before: these are its numbers
            total = Moments(int(sum(was.values())), sum(n * told[rank].size2 for rank, n in was.items()), len(was))
            noise = noise.after(total, update2, decay=self.decay)
            now = next_batch_size(now, noise.asks_for(eta=self.eta), largest=self.most)
        shared = _shared_out(pace, told, now, self.smooth)
        kept = {"batch": float(now), **{f"noise.{name}": value for name, value in asdict(noise).items()}}
        kept |= {f"samples.{rank}": each.samples for rank, each in told.items()}
        return replace(shared, memory={**shared.memory, **kept})


def _shared_out(pace: Pace, told: Mapping[int, Told], batch: int, smooth: float) -> Pace:
    """Micro-batches of each member that make a batch together, in proportion to speed."""
    micro = {rank: each.samples / pace.parts.get(rank, 1) for rank, each in told.items()}
    speed = {}
    for rank, each in told.items():
        now = each.samples / each.step_s if each.step_s > 0 else 0.0
        speed[rank] = smooth * pace.memory.get(f"speed.{rank}", now) + (1 - smooth) * now
    total = sum(speed.values())
    if total <= 0 or min(micro.values()) <= 0:
        return pace
    exact = {rank: batch * speed[rank] / total / micro[rank] for rank in told}
    parts = {rank: max(1, _floor(exact[rank])) for rank in told}
    for rank in sorted(told, key=lambda rank: parts[rank] - exact[rank]):  # the one most in want of another first
        if sum(parts[each] * micro[each] for each in told) >= batch:
            break
        parts[rank] += 1
    return replace(pace, parts=parts, memory={f"speed.{rank}": value for rank, value in speed.items()})


#: Every pacer by the name used in expressions: "by_speed", "by_link(0.2)".
PACERS: Mapping[str, Callable[..., Pacer]] = {
    "by_speed": BySpeed,
    "by_link": ByLink,
    "by_rate": ByRate,
    "by_shares": ByShares,
    "by_noise": ByNoise,
}


def disagreement(told: Mapping[int, Told]) -> float:
    """(mean_i |x_i|^2) / |mean_i x_i|^2 - 1 of the round that ended last: 0 if all sent the same."""
    update2 = next(iter(told.values())).update2
    if update2 <= 0:
        return math.inf
    sizes = [each.size2 for each in told.values() if each.size2 >= 0]
    return sum(sizes) / len(sizes) / update2 - 1


class Clock:
    """Seconds of a member's local steps, without what lies between a step's end and the next one's beginning here."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._resumed: float | None = None
        self._took: list[float] = []

    def resume(self) -> None:
        """Local compute begins."""
        self._resumed = self._now()

    def pause(self) -> None:
        """A local step has ended."""
        if self._resumed is not None:
            self._took.append(self._now() - self._resumed)
        self._resumed = None

    def median(self) -> float:
        """Seconds a step since the last call; 0 if there was none."""
        took, self._took = self._took, []
        return statistics.median(took) if took else 0.0


def _floor(x: float) -> int:
    """Of a quotient of measured times, whose last digits mean nothing."""
    return math.floor(x + 1e-6)


def _check_share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ConfigError(f"{name} = {value}", expected="a share in [0, 1)", mend="0.5, or 0 for the last round alone")


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ConfigError(f"{name} = {value}", expected="a number above 0", mend="leave it out for the default")
