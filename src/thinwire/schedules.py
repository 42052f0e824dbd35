"""When? Which fragments begin a round after a local step, and how many steps later the result is applied."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Protocol

from thinwire.errors import ConfigError
from thinwire.pace import Pacer


class Schedule(Protocol):
    """A pure function of the shared step count, so that all members agree without a word."""

    @property
    def overlap(self) -> int:
        """Local steps between the beginning of a round and its application; tau in the papers."""

    @property
    def period(self) -> int:
        """Local steps from one round of a fragment to its next."""

    def begins(self, step: int, fragments: int) -> tuple[int, ...]:
        """Fragments whose round begins after local step `step` (counted from 1), ascending."""


def back_to_back(schedule: Schedule) -> bool:
    """Whether a fragment's next round begins as its last one ends: local steps then never wait, and start from what
    the last round but one gave.
    """
    return 0 < schedule.overlap == schedule.period


@dataclass(frozen=True)
class Every:
    """A round for each fragment every `steps` local steps, fragments evenly spread over them.

    Fragment f of F begins at o_f, o_f + H, o_f + 2H, ... with H = steps and o_f = (f+1) H / F rounded down, at least 1.
    With one fragment that is every H steps; with F of them every H/F steps in rotation. With overlap = H a round has
    all of the time to the next one, which begins as it ends.
    Source: Douillard et al. 2025, arXiv:2501.18512 (fragments and overlap).
    """

    steps: int = 1
    overlap: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(
                f"a round every {self.steps} steps", expected="every 1 step or more", mend="every=1 is every step"
            )
        if not 0 <= self.overlap <= self.steps:
            raise ConfigError(
                f"an overlap of {self.overlap} steps with a round every {self.steps}",
                expected=f"an overlap from 0 to {self.steps}: a fragment's round ends by the time its next one begins",
                mend="lower the overlap, or let rounds be further apart",
            )

    @property
    def period(self) -> int:
        return self.steps

    def begins(self, step: int, fragments: int) -> tuple[int, ...]:
        return tuple(f for f in range(fragments) if self._due(step, max(1, (f + 1) * self.steps // fragments)))

    def _due(self, step: int, first: int) -> bool:
        return step >= first and (step - first) % self.steps == 0


@dataclass(frozen=True)
class At:
    """A round of every fragment after each of these local steps, and no other."""

    steps: tuple[int, ...]
    overlap: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.steps or any(early >= late for early, late in itertools.pairwise((0, *self.steps))):
            raise ConfigError(
                f"rounds at the steps {self.steps}",
                expected="at least one local step, counted from 1, in ascending order",
                mend="write At((500, 1000)), or Once(1000) for a single round",
            )

    @property
    def period(self) -> int:
        return min(late - early for early, late in itertools.pairwise((0, *self.steps)))

    def begins(self, step: int, fragments: int) -> tuple[int, ...]:
        return tuple(range(fragments)) if step in self.steps else ()


def Once(step: int) -> At:  # noqa: N802 (reads as the part it makes)
    """A single round of every fragment, after this local step."""
    return At((step,))


@dataclass(frozen=True)
class Paced:
    """A schedule at first, and after each round what the pacer makes of it (thinwire.pace)."""

    first: Every
    pacer: Pacer

    @property
    def overlap(self) -> int:
        return self.first.overlap

    @property
    def period(self) -> int:
        return self.first.period

    def begins(self, step: int, fragments: int) -> tuple[int, ...]:
        """As long as nothing else was decided."""
        return self.first.begins(step, fragments)
