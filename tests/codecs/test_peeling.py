"""Packets that add up: exact sums in any order, how many rows it takes, and why bitmaps are not added."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from thinwire.codecs.peeling import Table, plan, rows_for


def _sparse(members: int, blocks: int, lane: int, share: float, seed: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Members' whole numbers [blocks, lane], each with other nonzeros, and their union."""
    g = torch.Generator().manual_seed(seed)
    given = []
    for _ in range(members):
        values = torch.randint(-(2**23), 2**23, (blocks, lane), generator=g, dtype=torch.int32)
        given.append(values * (torch.rand(blocks, lane, generator=g) < share))
    return given, torch.stack(given).any(dim=0)


def _rows(union: torch.Tensor) -> int:
    return rows_for(int(union.sum(dim=0).max())) // 3


@pytest.mark.parametrize("members", [2, 4, 16])
def test_added_tables_decode_to_the_exact_sum_in_any_order(members: int) -> None:
    given, union = _sparse(members, 300, 32, 0.2 / members, members)
    table = Table(300, 32, _rows(union), key=7)
    folded = [table.fold(values) for values in given]
    orders = [folded, folded[::-1], folded[1::2] + folded[::2]]
    sums = [sum(order[1:], order[0].clone()) for order in orders]
    assert all(torch.equal(total, sums[0]) for total in sums)
    found = plan(table, union)
    assert not found.leftover.any()
    assert torch.equal(found.peel(sums[0]), sum(given[1:], given[0].clone()))


def test_cells_may_overflow_on_the_way() -> None:
    blocks = 200
    values = torch.full((blocks, 8), 2**31 - 1, dtype=torch.int32)
    values[::2] = -(2**31)
    table = Table(blocks, 8, rows_for(blocks) // 3, key=1)
    assert torch.equal(plan(table, values != 0).peel(table.fold(values)), values)


def test_capacity_at_three_thousand() -> None:
    """1.3 times as many rows as nonzeros is enough in 99 lanes of 100, 1.2 (below the threshold of 1.222) in none."""
    g = torch.Generator().manual_seed(0)
    lanes, blocks, nonzeros = 100, 6000, 3000
    union = torch.zeros(blocks, lanes, dtype=torch.bool)
    for lane in range(lanes):
        union[torch.randperm(blocks, generator=g)[:nonzeros], lane] = True
    share = {}
    for factor in (1.2, 1.3):
        table = Table(blocks, lanes, math.ceil(factor * nonzeros / 3), key=3)
        share[factor] = 1 - plan(table, union).leftover.any(dim=0).double().mean().item()
    assert share[1.3] >= 0.99
    assert share[1.2] == 0


@pytest.mark.parametrize("nonzeros", [1, 3, 30, 300])
def test_as_many_rows_as_are_said_to_do(nonzeros: int) -> None:
    g, lanes, blocks = torch.Generator().manual_seed(nonzeros), 50, 3 * nonzeros
    union = torch.zeros(blocks, lanes, dtype=torch.bool)
    for lane in range(lanes):
        union[torch.randperm(blocks, generator=g)[:nonzeros], lane] = True
    failed = sum(
        plan(Table(blocks, lanes, rows_for(nonzeros) // 3, key), union).leftover.any(dim=0).sum().item()
        for key in range(4)
    )
    assert failed <= 0.02 * 4 * lanes


def test_rows_grow_by_thirteen_tenths() -> None:
    assert [rows_for(m) for m in (0, 300, 3000, 100_000)] == [66, 456, 3966, 130_065]
    assert all(rows_for(m) % 3 == 0 for m in range(50))


def test_leftovers_are_flagged_and_estimated_and_the_rest_is_exact() -> None:
    given, union = _sparse(2, 400, 16, 0.5, 0)
    table = Table(400, 16, 110, key=2)  # of 330 rows for 300 nonzeros: too few
    found, total = plan(table, union), given[0] + given[1]
    left = found.leftover
    assert 0 < int(left.sum()) < int(union.sum())
    assert (union | ~left).all()
    sums = table.fold(total)
    assert torch.equal(found.estimate(sums)[~left], total[~left])
    assert found.estimate(sums)[left].any()
    peeled = found.peel(table.fold(total * ~left))  # without them the rest peels as it did
    assert torch.equal(peeled, total * ~left)


def test_a_small_core_is_estimated_by_the_median() -> None:
    """Two blocks that share all three rows hide each other; a third cell of either's own would show it."""
    table = next(t for key in itertools.count() if (t := Table(2, 1, 2, key)).places[:, 0].equal(t.places[:, 1]))
    union = torch.ones(2, 1, dtype=torch.bool)
    found = plan(table, union)
    assert found.leftover.all()
    values = torch.tensor([[5], [0]], dtype=torch.int32)
    assert found.estimate(table.fold(values))[0].item() == 5
    assert not found.peel(torch.zeros(6, 1, dtype=torch.int32)).any()


def test_blocks_go_to_three_distinct_thirds() -> None:
    table = Table(5000, 4, 37, key=11)
    assert [(int(p.min()), int(p.max())) for p in table.places] == [(0, 36), (37, 73), (74, 110)]
    for place in table.places:
        counts = torch.bincount(place - place.min(), minlength=37)
        assert (counts - 5000 / 37).abs().max() < 6 * (5000 / 37) ** 0.5
    assert set(table.signs.unique().tolist()) == {-1, 1}
    assert not torch.equal(table.places, Table(5000, 4, 37, key=12).places)


def test_bitmaps_are_joined_and_not_added() -> None:
    """Bits of one byte each, packed: where two members share a nonzero, a sum carries into the neighbour."""
    a, b = torch.tensor([0b0101], dtype=torch.uint8), torch.tensor([0b0001], dtype=torch.uint8)
    assert (a | b).item() == 0b0101
    assert (a + b).item() == 0b0110  # the shared element is gone, and one nobody sent has come
    given, union = _sparse(2, 300, 8, 0.2, 1)
    table, total = Table(300, 8, _rows(union), key=7), given[0] + given[1]
    carried = union.clone().view(-1)
    carried[:2] = torch.tensor([False, True])
    given[0].view(-1)[0] = 9
    folded = table.fold(given[0]) + table.fold(given[1])
    wrong = plan(table, carried.view_as(union))
    assert not torch.equal(wrong.peel(folded), given[0] + given[1])
    del total


def test_nothing_peels_to_nothing() -> None:
    for blocks in (0, 5):
        table, union = Table(blocks, 4, 22, key=0), torch.zeros(blocks, 4, dtype=torch.bool)
        assert torch.equal(plan(table, union).peel(table.fold(union.int())), union.int())
