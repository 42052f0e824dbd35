"""An outer learning rate that rises over the first rounds and falls over the last.

    s_r = (r + 1) / (warmup + 1)                      rounds r = 0, 1, ..., warmup - 1
    s_r = floor + (1 - floor) fall((r - warmup) / decay)    decay rounds from there; then floor

with fall(x) = (1 + cos pi x) / 2 or 1 - x. The outer step's learning rate is multiplied by s_r.

A first outer step with momentum is larger than plain averaging: harmless for a model that begins at random, harmful for
one that is fine-tuned. Rounds are counted by fragment, and only those that took effect.

Error   warmup=0, decay=0 changes nothing, to the bit.
Source  warm-up and decay as for any learning rate; over outer rounds, ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from thinwire.errors import ConfigError
from thinwire.outer.base import Around, Memory, Mine, Now

_GRID = 1 << 20  # cosines differ in their last bits between machines; members must not


@dataclass(frozen=True)
class Scheduled(Around):
    """See above.

    warmup  rounds below the full rate
    decay   rounds over which it falls; 0 lets it stay
    shape   how it falls
    floor   what it falls to, as a share of the full rate
    """

    warmup: int = 0
    decay: int = 0
    shape: Literal["cosine", "linear"] = "cosine"
    floor: float = 0.1

    def __post_init__(self) -> None:
        wrong = next((name for name in ("warmup", "decay") if getattr(self, name) < 0), None)
        if wrong:
            raise ConfigError(
                f"outer {wrong}={getattr(self, wrong)}", expected="a number of rounds", mend=f"{wrong}=0 for none"
            )
        if self.shape not in ("cosine", "linear"):
            raise ConfigError(f"outer shape={self.shape!r}", expected="cosine or linear", mend="shape='cosine'")
        if not 0 < self.floor <= 1:
            raise ConfigError(
                f"outer floor={self.floor}",
                expected="a share in (0, 1]: with a learning rate of 0 what members learn is lost",
                mend="floor=0.1",
            )
        if self.outer.accepts != "delta":
            raise ConfigError(
                f"{self.outer!r} with a learning rate over rounds: it has none",
                expected="an outer step that is fed with deltas",
                mend="Scheduled(SGD(1.0), ...) to average",
            )

    def scale(self, number: int) -> float:
        """What the learning rate of round `number` (from 0) is multiplied by."""
        if number < self.warmup:
            return (number + 1) / (self.warmup + 1)
        if not self.decay:
            return 1.0
        x = min(1.0, (number - self.warmup) / self.decay)
        fall = 1 - x if self.shape == "linear" else (1 + math.cos(math.pi * x)) / 2
        return round((self.floor + (1 - self.floor) * fall) * _GRID) / _GRID

    def _at(self, now: Now) -> Now:
        return replace(now, scale=now.scale * self.scale(now.round))

    def step(self, anchor: Tensor, update: Tensor, memory: Memory, now: Now) -> tuple[Tensor, Memory]:
        return self.outer.step(anchor, update, memory, self._at(now))

    def merge(self, mine: Mine, anchor: Tensor, own: Memory, now: Now) -> tuple[Tensor, Memory]:
        return self.outer.merge(mine, anchor, own, self._at(now))
