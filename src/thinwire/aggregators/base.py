"""The aggregator contract: rows that arrived become one vector."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

#: What a rule must see at once: sums only; all members' values of a coordinate; or whole rows.
Needs = Literal["sum", "coordinates", "rows"]


class Aggregator(Protocol):
    """How contributions are merged."""

    @property
    def needs(self) -> Needs:
        """What the rule must see at once; the collective is chosen by it."""

    @property
    def weighs(self) -> bool:
        """Whether weights matter to it."""

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Merge.

        rows     [m, n] one row per member that takes part, in ascending order of rank
        weights  float64 [m], positive
        returns  [n]; it may be one of the rows, so nobody writes to it
        """
