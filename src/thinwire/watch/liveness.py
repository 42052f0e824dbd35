"""How sure it is that a member is gone, from the rhythm of its signs of life.

    phi(t) = -log10 P(interval > t)        intervals normal, with mean and deviation of the last 100

phi 8 says: were it alive, a silence this long would come once in 10^8. It is advice: each member hears signs of life at
times of its own, so what follows from phi is not the same on all, and nothing that must be is decided by it.

Source   Hayashibara et al. 2004, "The phi accrual failure detector".
"""

from __future__ import annotations

import math
import statistics
from collections import deque

from thinwire.errors import ConfigError

SUSPECT_PHI, GONE_PHI = 8.0, 12.0


class Heartbeats:
    """Signs of life of members, by name; `window` intervals of each are kept.

    least_sd_s  what intervals differ by at least: a perfect rhythm would make the first late beat a death
    """

    def __init__(self, *, window: int = 100, least_sd_s: float = 0.1) -> None:
        if window < 2 or least_sd_s <= 0:
            raise ConfigError(
                f"Heartbeats(window={window}, least_sd_s={least_sd_s})",
                expected="two intervals or more, and a deviation over 0",
                mend="leave both out",
            )
        self._window, self._least_sd_s = window, least_sd_s
        self._intervals: dict[str, deque[float]] = {}
        self._last: dict[str, float] = {}

    def beat(self, name: str, at: float) -> None:
        """A sign of life, at seconds of this member's clock. A clock that went back tells nothing."""
        before = self._last.get(name)
        if before is not None and at > before:
            self._intervals.setdefault(name, deque(maxlen=self._window)).append(at - before)
        if before is None or at > before:
            self._last[name] = at

    def forget(self, name: str) -> None:
        """It left in peace."""
        self._intervals.pop(name, None)
        self._last.pop(name, None)

    def phi(self, name: str, now: float) -> float:
        """0 for a member that gave fewer than three signs of life: no rhythm is known."""
        intervals = self._intervals.get(name, deque())
        if len(intervals) < 2:
            return 0.0
        deviation = max(statistics.pstdev(intervals), self._least_sd_s)
        return _phi((now - self._last[name] - statistics.fmean(intervals)) / deviation)

    def suspects(self, now: float, phi: float = SUSPECT_PHI) -> dict[str, float]:
        """name -> phi of all who are silent for so long."""
        found = {name: self.phi(name, now) for name in sorted(self._last)}
        return {name: value for name, value in found.items() if value >= phi}


def _phi(z: float) -> float:
    """-log10 of the normal tail beyond z; 300 where it is less than a float can say."""
    tail = math.erfc(z / math.sqrt(2)) / 2
    return -math.log10(tail) if tail > 1e-300 else 300.0
