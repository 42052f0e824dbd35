"""Heavy ball with a clipped momentum and a penalty for staleness, CO2's outer step.

    m <- beta m + D / L_t;   a <- a - lr clip(m, -phi, phi)

Delayed rounds and momentum add up: a full round late, lr kappa < 1 - beta is all that is stable, where kappa is the
share of the way to the optimum that a round covers. Clipping bounds what may come of it, the penalty L_t >= 1 takes
less in of what is stale.

Error   L=1 and no clipping is heavy ball (SGD with momentum), to the bit.
State   m, and how far the anchor moved last, alike on all members.
Source  Sun et al. 2024, arXiv:2401.16265 (CO2: staleness gap penalty and outer momentum clipping).
Differs what is applied is clipped, not what is remembered; the authors' code clips nothing, as it drops the result.
        They compute L_t from a staleness gap by a formula that could not be confirmed, and their code has a constant;
        so does this, with `Gap` as one way to measure: ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from thinwire.errors import ConfigError
from thinwire.outer.base import Memory, Now, Outer, check

_CHUNK = 1 << 20  # squares of whole numbers up to 2^21, this many of them, add up below 2^63


class Penalty(Protocol):
    """What a round's update is divided by."""

    def at(self, moved: float, update: float) -> float:
        """At least 1; a pure function, for all members must come to the same.

        moved   length of the anchor's last move, made while members were working from where it was before; 0 at first
        update  length of what the round combined to
        """


@dataclass(frozen=True)
class Gap:
    """How far the anchor has moved since members set out, against how far they went: 1 + weight moved / update.

    Late heavy ball with beta=0.5, kappa=0.7 grows by a tenth every round; with this it shrinks. Where nothing is amiss
    it costs: a step about half as long.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ConfigError(f"gap weight={self.weight}", expected="a number of at least 0", mend="0 is no penalty")

    def at(self, moved: float, update: float) -> float:
        return 1 + self.weight * moved / update if update > 0 else 1.0


@dataclass(frozen=True)
class ClippedMomentum(Outer):
    """See above: alpha, beta, phi and Lambda of the paper; clip=None does not clip."""

    lr: float = 1.0
    momentum: float = 0.0
    clip: float | None = None
    penalty: float | Penalty = 1.0

    def __post_init__(self) -> None:
        check(self.lr, self.momentum)
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ConfigError(
                f"outer clip={self.clip}", expected="a number above 0", mend="leave it out to clip nothing"
            )
        if isinstance(self.penalty, int | float) and not 1 <= self.penalty < math.inf:
            raise ConfigError(
                f"outer penalty={self.penalty}", expected="a number of at least 1", mend="1.0 for none, or Gap()"
            )

    @property
    def linear(self) -> bool:
        return isinstance(self.penalty, int | float)

    def step(self, anchor: Tensor, update: Tensor, memory: Memory, now: Now) -> tuple[Tensor, Memory]:
        m = update / self._penalty(update, memory)
        if "m" in memory:
            m = memory["m"] * self.momentum + m
        move = m if self.clip is None else m.clamp(-self.clip, self.clip)
        rate = self.lr * now.scale
        after: dict[str, Tensor] = {"m": m}
        if not self.linear:
            after["moved"] = torch.tensor(rate * length(move), dtype=torch.float64)
        return torch.add(anchor, move, alpha=-rate), after

    def _penalty(self, update: Tensor, memory: Memory) -> float:
        if isinstance(self.penalty, int | float):
            return float(self.penalty)
        moved = memory["moved"].item() if "moved" in memory else 0.0
        return self.penalty.at(moved, length(update))


def length(x: Tensor) -> float:
    """Euclidean length to about six digits, the same bits on all members.

    Threads and devices add floats in orders of their own. Whole numbers have one sum in any order: elements are
    rounded to a 2^21th of the largest, and their squares added as such.
    """
    most = float(x.abs().max()) if x.numel() else 0.0
    if most == 0.0 or not math.isfinite(most):
        return most
    exponent = math.frexp(most)[1] - 21
    whole = torch.ldexp(x.double(), torch.tensor(-exponent, device=x.device)).round_().long()
    total = sum(int(whole[at : at + _CHUNK].square().sum()) for at in range(0, len(whole), _CHUNK))
    return math.ldexp(math.sqrt(total), exponent)
