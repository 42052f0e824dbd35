"""Codes of less than a byte: where each of them goes, and that they come back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinwire.codecs.memory import Scratch
from thinwire.codecs.planar import (
    bits_for,
    digits,
    pack,
    pack_row,
    packed_bytes,
    row_bytes,
    row_multiple,
    unpack,
    unpack_row,
)

CPU = torch.device("cpu")


def _codes(n: int, bits: int) -> torch.Tensor:
    return torch.randint(1 << bits, (n,), generator=torch.Generator().manual_seed(n)).to(torch.uint8)


@given(st.integers(0, 50), st.integers(1, 8))
def test_a_row_is_unpacked_again(n: int, bits: int) -> None:
    codes = _codes(n, bits)
    packed = pack_row(codes, bits)
    assert len(packed) == row_bytes(n, bits)
    assert torch.equal(unpack_row(packed, n, bits), codes)


@given(st.integers(1, 9), st.integers(0, 3), st.integers(1, 8), st.data())
def test_blocks_are_packed_in_any_pieces(blocks: int, times: int, bits: int, data: st.DataObject) -> None:
    block = 8 * (times + 1)
    left = data.draw(st.integers(0, block - 1))
    n = blocks * block + left
    codes, scratch = _codes(n, bits), Scratch(CPU)
    packed = torch.full((packed_bytes(n, block, bits),), 255, dtype=torch.uint8)
    cut = data.draw(st.integers(0, blocks)) * block
    rows = [
        (0, codes[:cut].view(-1, block)),
        (cut, codes[cut : n - left].view(-1, block)),
        (n - left, codes[n - left :].view(1, -1)),
    ]
    rows = [(start, piece) for start, piece in rows if piece.numel()]
    for start, piece in rows:
        pack(piece, packed, (start, n), block, bits, 0, scratch)
    for start, piece in rows:
        assert torch.equal(unpack(packed, (start, n), tuple(piece.shape), block, bits, scratch), piece)


def test_codes_are_planar() -> None:
    assert pack_row(torch.tensor([1, 2, 3, 0, 1], dtype=torch.uint8), 2).tolist() == [1 | 3 << 2 | 1 << 4, 2]
    assert pack_row(torch.tensor([1, 0, 1], dtype=torch.uint8), 1).tolist() == [5]
    assert pack_row(torch.tensor([7, 0, 5], dtype=torch.uint8), 3).tolist() == [
        3 | 0 << 2 | 1 << 4,
        1 | 0 << 1 | 1 << 2,
    ]


def test_digits_may_be_of_any_base() -> None:
    packed = torch.empty(1, 2, dtype=torch.uint8)
    digits(torch.tensor([[2, 1, 0, 2, 1, 2]], dtype=torch.uint8), 3, 5, 1, packed)
    assert packed.tolist() == [[2 + 3 * 0 + 9 * 1 + 27 * 1 + 81 * 1, 1 + 3 * 2 + 9 * 2 + 27 * 1 + 81 * 1]]


@pytest.mark.parametrize(("bits", "elements"), [(1, 8), (2, 4), (3, 8), (4, 2), (6, 4), (8, 1)])
def test_rows_of_so_many_elements_waste_no_bit(bits: int, elements: int) -> None:
    assert row_multiple(bits) == elements
    assert row_bytes(elements, bits) * 8 == elements * bits


@given(st.integers(1, 256))
def test_the_narrowest_width_holds_the_alphabet(alphabet: int) -> None:
    bits = bits_for(alphabet)
    assert alphabet <= 1 << bits
    assert bits == 1 or alphabet > 1 << bits // 2
