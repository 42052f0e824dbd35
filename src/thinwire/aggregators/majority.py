"""Majority vote: the sign that most members have.

    combine(rows)_i = 1 if rows_ki >= 0 for at least half of the members k, else -1

Error   a member can do no more than vote: fewer than half of them, whatever they send, do not turn a coordinate on
        which the others agree. How large anything was is lost: the outer step's rate alone says how far to go.
Cost    O(n m) time, one [m, n] mask.
Source  Bernstein et al. 2018, arXiv:1810.05291, Alg. 1. The codec `sign` sends enough for it (its scale is of no use
        here). Ties and zeros count as positive, as in the codec. Weights are not used: a vote is a vote.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from thinwire.aggregators.base import Needs


@dataclass(frozen=True)
class Majority:
    """1 or -1 for every coordinate, not a mean: for a signSGD step."""

    needs: Needs = field(default="coordinates", init=False, repr=False)
    weighs: bool = field(default=False, init=False, repr=False)

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        above = (rows >= 0).sum(dim=0)  # [n]
        return torch.where(2 * above >= len(rows), 1.0, -1.0)
