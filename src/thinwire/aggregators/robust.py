"""Coordinate-wise rules that a few wrong members cannot move far.

    TrimmedMean  mean of each coordinate after dropping its t smallest and t largest values, t = floor(share m)
    Median       the middle value of each coordinate; the mean of the two middle ones for an even number

Error   a coordinate of the result lies within the honest members' range while at most t (for the median: fewer than
        half) of them lie.
Cost    O(n m log m) time, one [m, n] copy.
Source  Yin et al. 2018, arXiv:1803.01498, Def. 1 (median) and 2 (trimmed mean). Weights are not used: a member that
        lies would lie about its weight too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from thinwire.aggregators.base import Needs
from thinwire.errors import ConfigError


@dataclass(frozen=True)
class TrimmedMean:
    """Drop the share of members at each end of every coordinate."""

    share: float
    needs: Needs = field(default="coordinates", init=False, repr=False)
    weighs: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.share < 0.5:
            raise ConfigError(
                f"trimmed mean: share={self.share} leaves no value",
                expected="a share in [0, 0.5): that many members are dropped at each end",
                mend="0.2 withstands one liar in five; use the median to withstand nearly half",
            )

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        members = len(rows)
        trim = math.floor(self.share * members)
        return rows.sort(dim=0).values[trim : members - trim].mean(dim=0)


@dataclass(frozen=True)
class Median:
    """The middle value of every coordinate."""

    needs: Needs = field(default="coordinates", init=False, repr=False)
    weighs: bool = field(default=False, init=False, repr=False)

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        ordered, members = rows.sort(dim=0).values, len(rows)
        return (ordered[(members - 1) // 2] + ordered[members // 2]) / 2
