"""FedKSeed: all steps go along K directions, so a model is its base and K sums, whatever the number of rounds.

    a round's members (a share of all, drawn anew), each from  w = w0 - lr sum_k A_k z_k :
        tau times:  k ~ p;  g = (L(w + eps z_k) - L(w - eps z_k)) / (2 eps);  w <- w - lr g z_k;  tells (k, g)
    all members:    A_k <- A_k + (1/m) sum of the g told with k                     m members took part
    p               uniform, or (Pro) softmax of scores, brought to [0, 1]; score_k: mean of |g| told with k so far

Nobody holds a model: it is built again from w0 and A where it is needed, in one pass over the weights, and is the same
bits whoever builds it. lr A_k is a whole number of 2^-40, so sums come to the same in any order. Who takes no part in a
round just adds up. Learning rates that change go into A: a round's g counts by its factor.

Error   the model is not the mean of where the members' own steps led, which rounded in between. Steps stay within the
        span of K directions. A g beyond `clip` counts as `clip`.
Size    6 tau bytes a member that takes part, and a frame of 108; each member receives and sends each of these once, on
        their way to all in ceil(log2 N) exchanges. 200 members, 10 at a time, tau=200: 13 kB each way, whatever the
        model and K. A newcomer needs w0 and 24 K bytes.
State   A, and for scores two more numbers of 8 bytes for each k, alike on all members; w0
Cost    2 tau forward passes; a rebuild replays all directions that were ever taken, K at most
Source  Qin et al. 2024, arXiv:2312.06353 (K=4096, tau=200, eps=5e-4, lr=3e-7, 5 % of 200 clients, |g| up to 1000)
Differs no server: members tell each other (k, g), and each adds up what a server would. k is told though it could be
        drawn by all alike: softmax differs in its last bit from machine to machine, and with it, one day, k. The scores
        need every |g|, so g is told for each step, not summed by k. A history begins with a 0, as in released code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from thinwire.errors import ConfigError, DivergedError
from thinwire.randomness import mix
from thinwire.seeds import noise
from thinwire.seeds.codes import float32
from thinwire.seeds.sums import Sums

UNIT = 2.0**-40  # what lr A is counted in; sums.py has the same
_SIZE_UNIT = 2.0**-24  # what |g| is counted in for scores
_MOST = 1 << 62
_TURN, _PICK = 0x7475726E, 0x7069636B  # purposes of a key: "turn", "pick"


@dataclass(frozen=True)
class Pool:
    """What all members know: all sums are of whole numbers.

    sums    int64 [K] lr A, in units of 2^-40
    sizes   int64 [K] sum of |g|, in units of 2^-24
    picks   int64 [K] how many g were told
    rounds  added up
    """

    sums: Tensor
    sizes: Tensor
    picks: Tensor
    rounds: int = 0

    @classmethod
    def empty(cls, seeds: int) -> Pool:
        zeros = torch.zeros(seeds, dtype=torch.int64)
        return cls(zeros, zeros, zeros)

    def add(self, k: Tensor, g: Tensor, weight: float) -> Pool:
        """With what was told of some steps, in any order.

        k       int64 [n]
        g       [n] of the steps; those that are not finite do not count
        weight  of each: lr factor / m
        raises  DivergedError if a sum leaves the range in which it is exact
        """
        finite = g.isfinite()
        k, g = k[finite], g[finite]
        after = Pool(
            self.sums.index_add(0, k, units(g, weight)), self.sizes.index_add(0, k, units(g.abs(), UNIT / _SIZE_UNIT)),
            self.picks.index_add(0, k, torch.ones_like(k)), self.rounds,
        )  # fmt: skip
        if int(after.sums.abs().max()) >= _MOST or int(after.sizes.max()) >= _MOST:
            raise DivergedError(
                f"the sum of a seed's scalars is beyond 2^62 after {self.rounds} rounds",
                expected="scalars whose sums are exact in 64 bits", mend="lower clip, or the learning rate",
            )  # fmt: skip
        return after


class Choice(Protocol):
    """How likely each seed is to be taken."""

    def probabilities(self, pool: Pool) -> Tensor:
        """float64 [K], of sum 1."""


@dataclass(frozen=True)
class Uniform:
    """All alike: FedKSeed."""

    def probabilities(self, pool: Pool) -> Tensor:
        return torch.full(pool.sums.shape, 1 / len(pool.sums), dtype=torch.float64)


@dataclass(frozen=True)
class ByScore:
    """Those along which losses changed more: FedKSeed-Pro. The most likely is e times as likely as the least."""

    def probabilities(self, pool: Pool) -> Tensor:
        scores = pool.sizes.double() * _SIZE_UNIT / (pool.picks + 1)
        low, high = scores.min(), scores.max()
        return ((scores - low) / (high - low + 1e-10)).softmax(0)


CHOICES: Mapping[str, Choice] = {"uniform": Uniform(), "by_score": ByScore()}


@dataclass(frozen=True, kw_only=True)
class FedKSeed:
    """What members agree on.

    seeds   K, directions in all
    steps   tau, of a member in a round that it takes part in
    share   of the members that take part in a round, in (0, 1]; one at least
    eps     how far from the weights losses are computed
    lr      the highest learning rate; see `factor` of a round
    clip    |g| that counts, at most
    noise   what directions are made of
    choice  how seeds are chosen: "uniform", or "by_score" (FedKSeed-Pro)
    seed    of all draws
    """

    seeds: int = 4096
    steps: int = 200
    share: float = 0.05
    eps: float = 5e-4
    lr: float = 3e-7
    clip: float = 1000.0
    noise: str = "rademacher"
    choice: str = "uniform"
    seed: int = 0

    def __post_init__(self) -> None:
        require("seeds", self.seeds, 1 <= self.seeds <= 1 << 15, f"from 1 to {1 << 15} directions")
        require("steps", self.steps, self.steps >= 1, "at least one step")
        require("share", self.share, 0 < self.share <= 1, "a share of the members in (0, 1]")
        require("seed", self.seed, 0 <= self.seed < 1 << 64, "64 bits")
        require("choice", self.choice, self.choice in CHOICES, " or ".join(CHOICES))
        for name in ("eps", "lr", "clip"):
            value = getattr(self, name)
            require(name, value, 0 < value < math.inf, "a number above 0")
        most = self.clip * self.steps * max(self.lr / UNIT, 1 / _SIZE_UNIT)
        require("clip", self.clip, most < _MOST / 2**10, "steps that add up to less than 2^52 in a round")
        noise.parse(self.noise)
        object.__setattr__(self, "eps", float32(self.eps))

    def members(self, everybody: tuple[int, ...], number: int) -> tuple[int, ...]:
        """Who takes part in a round: all draw the same."""
        count = max(1, math.floor(self.share * len(everybody) + 0.5))
        drawn = sorted(everybody, key=lambda rank: (mix(self.seed, _TURN, number, rank), rank))
        return tuple(sorted(drawn[:count]))

    def picks(self, pool: Pool, number: int, rank: int) -> Tensor:
        """The seeds of a member's steps in a round.  int64 [tau]"""
        chances = CHOICES[self.choice].probabilities(pool).cumsum(0)
        draws = [mix(self.seed, _PICK, number, rank, step) >> 11 for step in range(self.steps)]
        k = torch.searchsorted(chances, torch.tensor(draws, dtype=torch.float64) * 2.0**-53, right=True)
        return k.clamp(max=self.seeds - 1)  # chances may add up to a little less than 1

    def sums(self, pool: Pool) -> Sums:
        """What takes the base to the model, in one go, and what a log holds."""
        return Sums(self.seed, tuple(pool.sums.tolist()))

    def told(self, g: float) -> float:
        """A scalar as it is told, and counts for whoever made it: within clip, a float32; NaN if it is not finite."""
        return float32(max(-self.clip, min(self.clip, g))) if math.isfinite(g) else math.nan


def units(g: Tensor, weight: float) -> Tensor:
    """weight g in units of 2^-40, the nearest whole number.  int64"""
    return (g.double() * (weight / UNIT)).round().long()


def require(name: str, value: object, fits: bool, expected: str) -> None:
    if not fits:
        raise ConfigError(
            f"FedKSeed: {name}={value!r}", expected=expected, mend=f"{name}={getattr(FedKSeed, name, 1.0)!r} is usual"
        )
