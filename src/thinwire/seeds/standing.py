"""Where a run stands, the same for all members, and how long they wait for each other, each for itself."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from thinwire.errors import ConfigError
from thinwire.seeds.closed import Closed


@dataclass(frozen=True)
class Pace:
    """How long a member waits for others: factor * median(rounds_s), within [least_s, most_s].

    factor   how many times slower than usual a member may be in a round before it is closed without it
    least_s  what any machine may be late by
    most_s   the limit until three rounds were seen, and the highest ever
    """

    factor: float = 4.0
    least_s: float = 2.0
    most_s: float = 300.0

    def __post_init__(self) -> None:
        if not (self.factor > 1 and 0 < self.least_s <= self.most_s < float("inf")):
            raise ConfigError(
                f"Pace(factor={self.factor}, least_s={self.least_s}, most_s={self.most_s})",
                expected="a factor above 1, and 0 < least_s <= most_s",
                mend="Pace() waits four times as long as rounds take, 2 s at least and 300 s at most",
            )

    def patience_s(self, rounds_s: Sequence[float]) -> float:
        if len(rounds_s) < 3:
            return self.most_s
        return min(max(self.factor * statistics.median(rounds_s), self.least_s), self.most_s)


USUAL = Pace()


@dataclass(frozen=True)
class Standing:
    """Where a run stands: a function of its closed rounds, so alike on all who have read as many.

    number  of the round that is open
    roster  ids whose scalars it takes, ascending
    newest  highest id that was ever on the roster, -1 before there was one
    last    the record before, as it is in the store
    """

    number: int = 0
    roster: tuple[int, ...] = ()
    newest: int = -1
    last: bytes = b""

    def after(self, closed: Closed, record: bytes) -> Standing:
        roster = tuple(sorted({*closed.codes, *closed.joined}))
        return Standing(closed.number + 1, roster, max((self.newest, *roster)), record)
