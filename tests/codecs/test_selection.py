"""The k largest: against a stable sort, of vectors, rows and blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from thinwire.codecs.selection import largest, largest_in_blocks, largest_in_rows

G = torch.Generator().manual_seed(0)
#: Different numbers, few different ones, and nothing but equals; long enough for candidates, and not.
VECTORS = [
    x
    for n in (1, 7, 1000, 1 << 15)
    for x in (torch.randn(n, generator=G), torch.randint(-3, 4, (n,), generator=G).float(), torch.zeros(n))
]


def _sorted(x: Tensor, k: int) -> Tensor:
    return x.abs().sort(descending=True, stable=True).indices[:k].sort().values


@pytest.mark.parametrize("x", VECTORS)
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 1.0])
def test_of_a_vector_in_rows_and_in_blocks(x: Tensor, share: float) -> None:
    k = max(1, int(share * len(x)))
    assert torch.equal(largest(x, k), _sorted(x, k))
    assert torch.equal(largest_in_rows(x.view(1, -1), k)[0], _sorted(x, k))
    rows = x.repeat(3).view(3, -1)
    rows[1] = rows[1].flip(0)
    assert torch.equal(largest_in_rows(rows, k), torch.stack([_sorted(row, k) for row in rows]))
    assert torch.equal(largest_in_blocks(x, 1 / 4, 4)[:1], _sorted(x[:4], 1))


def test_the_largest_and_of_equals_the_first() -> None:
    assert largest(torch.tensor([1.0, -2, 2, 0, -2]), 2).tolist() == [1, 2]
    assert largest(torch.tensor([1.0, -2]), 5).tolist() == [0, 1], "all, if there are no more"
    assert largest(torch.zeros(0), 5).tolist() == []
