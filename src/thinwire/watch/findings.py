"""A finding: what is wrong, with whom, since when, and the numbers that say so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What can be found, by C4's classes (communication or not, slow or stuck) and what they leave out."""

    SLOW_SENDER = "slow sender"
    SLOW_RECEIVER = "slow receiver"
    SLOW_LINK = "slow link"
    SLOW_COMPUTE = "slow compute"
    SLOWED_DOWN = "slowed down"
    SLOW_ENCODING = "slow encoding"
    FLAPPING = "flapping"
    IDLE = "idle"
    NOT_FINITE = "not finite"
    TOO_LARGE = "too large"
    STUCK = "stuck"
    STUCK_LINK = "stuck link"


@dataclass(frozen=True)
class Finding:
    """Something is wrong.

    who       a member; of a link the sender, then the receiver
    since     the call at which it was first found, without a break to now
    evidence  names and values, in the units that their names say
    because   the sentence that follows who and what
    """

    kind: Kind
    who: tuple[str, ...]
    because: str
    evidence: Mapping[str, float]
    since: int = -1

    @property
    def key(self) -> tuple[Kind, tuple[str, ...]]:
        """What makes two findings of different calls the same one."""
        return self.kind, self.who

    def __str__(self) -> str:
        names = "the line from " * (len(self.who) == 2) + " to ".join(f"member {name}" for name in self.who)
        since = "" if self.since < 0 else f" (since call {self.since})"
        return f"{self.kind}: {names} {self.because}{since}"
