"""Codes of up to a byte, packed row by row; the rows are a vector's blocks, or one is the whole vector.

    byte j of a row of B codes of b bits:  q_j + 2^b q_(j + w) + 2^2b q_(j + 2w) + ...       w = ceil(B b / 8)

Planar: what is neighbours in memory before is so afterwards, so that rows are packed by sums of slices, and no code
straddles bytes, so that an entropy coder finds each one whole. Widths that do not divide a byte are split into planes
that do: 6 = 4 + 2 bits, 3 = 2 + 1; the lower bits' plane comes first, for all rows, then the next. What is lacking in
a row's last bytes is filled up with a code for zero.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from thinwire.codecs.memory import Scratch


def bits_for(alphabet: int) -> int:
    """The narrowest width that holds codes below `alphabet`, at most 256, in one plane."""
    return next(bits for bits in (1, 2, 4, 8) if alphabet <= 1 << bits)


def row_bytes(n: int, bits: int) -> int:
    """Bytes that n codes take as one row."""
    return sum(-(-n * width // 8) for width, _ in _planes(bits))


def packed_bytes(n: int, block: int, bits: int) -> int:
    """Bytes that n codes take, packed block by block."""
    return n // block * row_bytes(block, bits) + row_bytes(n % block, bits)


def row_multiple(bits: int) -> int:
    """What a row's length must be a multiple of, so that no bit is wasted."""
    return 8 // min(width for width, _ in _planes(bits))


def pack_row(codes: Tensor, bits: int) -> Tensor:
    """A vector's codes as one row: uint8 [n], below 2^bits, to uint8 [row_bytes(n, bits)]; filled up with 0."""
    n = len(codes)
    packed = codes.new_empty(row_bytes(n, bits))
    pack(codes.view(1, n), packed, (0, n), max(1, n), bits, 0, Scratch(codes.device))
    return packed


def unpack_row(packed: Tensor, n: int, bits: int) -> Tensor:
    """The inverse of `pack_row`: uint8 [n], perhaps in memory of `packed`."""
    return unpack(packed, (0, n), (1, n), max(1, n), bits, Scratch(packed.device)).view(n)


def pack(codes: Tensor, into: Tensor, at: tuple[int, int], block: int, bits: int, zero: int, scratch: Scratch) -> None:
    """Write the codes of some blocks where they belong in a field.

    codes  uint8 [rows, width], below 2^bits
    into   uint8 [packed_bytes(n, block, bits)]
    at     (start, n): the codes are those of elements from `start` on, of n
    zero   the code that fills up
    """
    (start, n), (rows, row) = at, codes.shape
    offset = 0
    for width, shift in _planes(bits):
        plane, mask, size = codes, (1 << width) - 1, row_bytes(row, width)
        if width < bits:
            plane = torch.bitwise_right_shift(codes, shift, out=scratch("plane", codes.shape, torch.uint8))
            plane.bitwise_and_(mask)
        into_rows = into[offset + start * width // 8 :][: rows * size].view(rows, size)
        digits(plane, 1 << width, 8 // width, zero >> shift & mask, into_rows)
        offset += packed_bytes(n, block, width)


def unpack(
    field: Tensor, at: tuple[int, int], shape: tuple[int, int], block: int, bits: int, scratch: Scratch
) -> Tensor:
    """The inverse of `pack`: uint8 [rows, width] = `shape`, in memory of `scratch` or of the field."""
    (start, n), (rows, row) = at, shape
    if bits == 8:
        return field[start : start + rows * row].view(shape)
    offset, codes = 0, scratch("codes", shape, torch.uint8)
    for width, shift in _planes(bits):
        size = row_bytes(row, width)
        packed = field[offset + start * width // 8 :][: rows * size].view(rows, size)
        plane = _unpack(packed, width, scratch("plane", shape, torch.uint8) if shift else codes, scratch)
        if shift:
            codes.bitwise_or_(plane.bitwise_left_shift_(shift))
        offset += packed_bytes(n, block, width)
    return codes


def digits(codes: Tensor, base: int, per_byte: int, zero: int, into: Tensor) -> None:
    """Codes below `base` as the digits of bytes: uint8 [rows, B] to uint8 [rows, ceil(B / per_byte)]."""
    if missing := -codes.shape[1] % per_byte:
        codes = torch.nn.functional.pad(codes, (0, missing), value=zero)
    first, *others = codes.chunk(per_byte, dim=1)
    if not others:
        into.copy_(first)
    for i, part in enumerate(others, start=1):
        torch.add(into if i > 1 else first, part, alpha=base**i, out=into)


def _unpack(packed: Tensor, bits: int, into: Tensor, scratch: Scratch) -> Tensor:
    """The inverse for 2^bits, 8 / bits of them in a byte: `into` is uint8 [rows, B]."""
    per_byte, mask = 8 // bits, (1 << bits) - 1
    parts = [scratch(f"part {i}", packed.shape, torch.uint8) for i in range(per_byte)]
    torch.bitwise_and(packed, mask, out=parts[0])
    for i, part in enumerate(parts[1:], start=1):
        torch.bitwise_right_shift(packed, bits * i, out=part)
        if i < per_byte - 1:
            part.bitwise_and_(mask)
    if into.shape[1] == per_byte * packed.shape[1]:
        return torch.cat(parts, dim=1, out=into)
    return into.copy_(torch.cat(parts, dim=1)[:, : into.shape[1]])


def _planes(bits: int) -> Iterator[tuple[int, int]]:
    """(bits, shift) of the planes that codes are split into, from the lowest bits up."""
    shift = 0
    for width in (8, 4, 2, 1):
        if bits & width:
            yield width, shift
            shift += width
