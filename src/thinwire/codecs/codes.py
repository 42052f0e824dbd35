"""Codes of 1, 2, 4 or 8 bits in bytes, a whole vector at once.

    byte j of w = ceil(n bits / 8):  code j in its lowest bits, code j + w in the next, then j + 2w, ...

Planar, as in blocks.pack: what is neighbours in memory before is so afterwards. No code straddles bytes, so that an
entropy coder finds each one whole.
"""

from __future__ import annotations

import torch
from torch import Tensor


def bits_for(alphabet: int) -> int:
    """The narrowest width that holds codes below `alphabet`, at most 256."""
    return next(bits for bits in (1, 2, 4, 8) if alphabet <= 1 << bits)


def packed_bytes(n: int, bits: int) -> int:
    return -(-n * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [n], below 2^bits, to uint8 [packed_bytes(n, bits)]; missing codes are 0."""
    size, per_byte = packed_bytes(len(codes), bits), 8 // bits
    rows = torch.nn.functional.pad(codes, (0, size * per_byte - len(codes))).view(per_byte, size)
    packed = rows[0].clone()
    for place, row in enumerate(rows[1:], start=1):
        packed.bitwise_or_(row << bits * place)
    return packed


def unpack(packed: Tensor, n: int, bits: int) -> Tensor:
    """The inverse of `pack`: uint8 [n]."""
    mask = (1 << bits) - 1
    return torch.cat([(packed >> bits * place).bitwise_and_(mask) for place in range(8 // bits)])[:n]
