"""Lossless homomorphic compression: sparse vectors that add up without being decoded, and decode to the exact sum.

    elements lie in a matrix [blocks, lane]; block i is added, with signs, to rows h_0(i), h_1(i), h_2(i) of a table,
    one in each third. Tables of several members add up to the table of the sum. Who knows which elements may be other
    than zero (the union) finds a cell to which only one of them contributes: it holds that element's sum. Subtract it
    from its other two cells, and go on ("peeling").

All is integers modulo 2^32, whose sums are exact in any order and may overflow on the way, so long as the sum of one
element over the members does not. What cannot be peeled (three or more elements that hide each other) follows from the
union alone, before anything is sent: `plan`.

Capacity  peeling works while a lane's table has 1.222 rows or more for each nonzero, and always falls short of it by
          chance in small lanes; see `rows_for`.
Source    Li et al. 2023 (lossless homomorphic compression, SC '23 Workshops); Polyakov et al. 2025, arXiv:2504.05638
          (TAGC); peeling: Goodrich & Mitzenmacher 2011, arXiv:1101.2245.
Differs   the public code hashes with three independent functions that may coincide, and hides a presence bit in each
          float; here the rows are in distinct thirds and the values are whole numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from thinwire.randomness import random_bytes


@dataclass(frozen=True, eq=False)
class Table:
    """Where elements go.

    blocks, lane  the elements are a matrix [blocks, lane], filled up with zeros
    third         rows in each of the three parts of the table
    key           of the hashes, the same on all members
    """

    blocks: int
    lane: int
    third: int
    key: int

    @property
    def rows(self) -> int:
        return 3 * self.third

    @cached_property
    def places(self) -> Tensor:
        """Row of each block in each third; int64 [3, blocks]."""
        words = random_bytes(self.key, 12 * self.blocks).view(torch.int32).view(3, -1)
        inside = (words.long() & 0x7FFFFFFF).mul_(self.third).bitwise_right_shift_(31)
        return inside.add_(torch.arange(3).unsqueeze(1) * self.third)

    @cached_property
    def signs(self) -> Tensor:
        """Sign of each block in each third; int32 [3, blocks], 1 or -1."""
        words = random_bytes(self.key, 12 * self.blocks).view(torch.int32).view(3, -1)
        return (words >> 31).bitwise_or_(1)

    def fold(self, values: Tensor) -> Tensor:
        """The table of int32 values [blocks, lane]; int32 [rows, lane]."""
        table = torch.zeros(self.rows, self.lane, dtype=torch.int32)
        for place, sign in zip(self.places, self.signs, strict=True):
            table.index_add_(0, place, values * sign.unsqueeze(1))
        return table


@dataclass(frozen=True, eq=False)
class Plan:
    """In what order to peel: elements' positions in [blocks * lane], and the third that shows each; by rounds.

    rounds    pairs (positions, third)
    sent      bool [blocks, lane]: elements of the union that can be peeled
    leftover  bool [blocks, lane]: the others
    """

    table: Table
    rounds: list[tuple[Tensor, int]]
    sent: Tensor
    leftover: Tensor

    def peel(self, sums: Tensor) -> Tensor:
        """The elements' exact sums from a table [rows, lane]; what is left over stays zero. int32 [blocks, lane]

        Elements that are left over must not have been folded in.
        """
        return self._solve(sums)[0].view_as(self.sent)

    def estimate(self, sums: Tensor) -> Tensor:
        """As `peel`, for tables with everything folded in: what is left over gets the median of its three cells."""
        values, cells = self._solve(sums)
        left = self.leftover.view(-1).nonzero().squeeze(1)
        seen = torch.stack([cells[_cells(self.table, left, j)] * _signs(self.table, left, j) for j in range(3)])
        values[left] = seen.median(dim=0).values
        return values.view_as(self.sent)

    def _solve(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        values = torch.zeros(self.leftover.numel(), dtype=torch.int32)
        cells = sums.clone().view(-1)
        for positions, third in self.rounds:
            found = cells[_cells(self.table, positions, third)] * _signs(self.table, positions, third)
            values[positions] = found
            for j in range(3):
                cells.index_add_(0, _cells(self.table, positions, j), -found * _signs(self.table, positions, j))
        return values, cells


def plan(table: Table, union: Tensor) -> Plan:
    """How to peel a union, bool [blocks, lane]."""
    remaining = union.reshape(-1).nonzero().squeeze(1)  # positions
    where = torch.stack([_cells(table, remaining, j) for j in range(3)])  # [3, remaining]
    count = torch.zeros(table.rows * table.lane, dtype=torch.int32)
    count.index_add_(0, where.view(-1), torch.ones(where.numel(), dtype=torch.int32))
    rounds: list[tuple[Tensor, int]] = []
    before = -1
    while 0 < len(remaining) != before:
        before = len(remaining)
        for third in range(3):
            alone = count[where[third]] == 1
            if not bool(alone.any()):
                continue
            rounds.append((remaining[alone], third))
            gone = where[:, alone].reshape(-1)
            count.index_add_(0, gone, torch.full_like(gone, -1, dtype=torch.int32))
            remaining, where = remaining[~alone], where[:, ~alone]
    leftover = torch.zeros(union.numel(), dtype=torch.bool)
    leftover[remaining] = True
    leftover = leftover.view_as(union)
    return Plan(table, rounds, union & ~leftover, leftover)


def rows_for(nonzeros: int) -> int:
    """Rows of a table in which so many nonzeros of a lane can nearly always be peeled: 1.3 times as many, and 64.

    Measured, for all of them in 99 lanes of 100: 1.3 times from 1000 on; a few at any factor, because two elements may
    share all three rows, which the 64 make rare. At 300 it is 1.5 times in all.
    """
    return 3 * math.ceil((1.3 * nonzeros + 64) / 3)


def _cells(table: Table, positions: Tensor, third: int) -> Tensor:
    """The cell that each position is added to, in the table seen as one row."""
    block = positions // table.lane
    return table.places[third][block] * table.lane + positions - block * table.lane


def _signs(table: Table, positions: Tensor, third: int) -> Tensor:
    return table.signs[third][positions // table.lane]
