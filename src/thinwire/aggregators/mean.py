"""Means: every contribution alike, or in proportion to the samples behind it.

    Mean          (1/m) sum_i x_i
    WeightedMean  sum_i w_i x_i / sum_i w_i

Summed in ascending order of rank, each product and each sum rounded on its own, so that the bits do not depend on
the machine. A single row comes back as it is.
Source: McMahan et al. 2017, arXiv:1602.05629, Alg. 1 (weights n_k/n).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from thinwire.aggregators.base import Needs


@dataclass(frozen=True)
class Mean:
    """Every member counts alike, whatever it weighs."""

    needs: Needs = field(default="sum", init=False, repr=False)
    weighs: bool = field(default=False, init=False, repr=False)

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        if len(rows) == 1:
            return rows[0]
        total = rows[0].clone()
        for row in rows[1:]:
            total += row
        return total.div_(len(rows))


@dataclass(frozen=True)
class WeightedMean:
    """Members count in proportion to their weights: the samples they have seen since the last round."""

    needs: Needs = field(default="sum", init=False, repr=False)
    weighs: bool = field(default=True, init=False, repr=False)

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        if len(rows) == 1:
            return rows[0]
        shares: list[float] = (weights / weights.sum()).tolist()
        total: Tensor = rows[0] * shares[0]
        for row, share in zip(rows[1:], shares[1:], strict=True):
            total += row * share
        return total
