"""Signs of a mean: how far every coordinate goes is left to the learning rate.

    combine(rows)_i = sign(mean_k rows_ki)      0 where the mean is 0

Error   where members' contributions are sparse, most coordinates are nobody's and stay where they are: 0, not a sign.
Cost    that of the mean, and a pass.
Source  the last line of DeMo, Peng et al. 2024, arXiv:2411.19870, Alg. 1. A vote of members' own signs is `Majority`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from thinwire.aggregators.base import Needs
from thinwire.aggregators.mean import Mean


@dataclass(frozen=True)
class Signs:
    """1, 0 or -1 for every coordinate, for a signSGD step."""

    needs: Needs = field(default="rows", init=False, repr=False)  # what a second encoding made of signs would be none
    weighs: bool = field(default=False, init=False, repr=False)

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        return Mean().combine(rows, weights).sign()
