"""An outer step towards parameters: the distance from the anchor to what was combined is its delta.

    (a, b) <- outer(a, b, a - x)        x the mean of parameters that were sent

Where all members have one anchor this is the outer step on the mean delta, but for rounding. Where each has its own, as
in gossip, it pulls anchors together and follows what was learnt at once: NoLoCo's step, with `Parameters(stretch)`.

Error   outer=SGD(1.0) is Average.
Source  Kolehmainen et al. 2025, arXiv:2506.10911 (NoLoCo), whose two terms it joins to one.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from thinwire.errors import ConfigError
from thinwire.outer.base import Around, Memory, Now
from thinwire.payloads import Kind


@dataclass(frozen=True)
class Towards(Around):
    """`outer`, fed with the anchor minus the combined parameters."""

    def __post_init__(self) -> None:
        if self.outer.accepts != "delta":
            raise ConfigError(
                f"{self.outer!r} towards parameters: it is made for {self.outer.accepts}",
                expected="an outer step for deltas",
                mend="Towards(Nesterov(0.7, 0.9)), or Average() by itself",
            )

    @property
    def accepts(self) -> Kind:
        return "parameters"

    def step(self, anchor: Tensor, update: Tensor, memory: Memory, now: Now) -> tuple[Tensor, Memory]:
        return self.outer.step(anchor, anchor - update, memory, now)
