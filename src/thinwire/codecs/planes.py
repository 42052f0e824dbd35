"""Codes of 1 to 4 bits in bytes, planar: a byte of a row holds codes that lie a fixed distance apart.

With b = 1, 2 or 4 bits, byte j of a row of W codes holds codes j, j + W b/8, j + 2 W b/8 and so on, from its lowest
bits up. Codes of three bits are a plane of their lower two and a plane of the third, one after the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,)}


def packed_bytes(width: int, bits: int) -> int:
    """Bytes of a row of `width` codes; rows of other than a multiple of eight are filled up with zeros."""
    return -(-width // 8) * bits


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """uint8 [rows, width], below 2^bits, to uint8 [rows, packed_bytes(width, bits)]."""
    if codes.shape[1] % 8:
        codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 8))
    planes, below = [], 0
    for size in _PLANES[bits]:
        part = codes >> below if below else codes
        if below + size < bits:
            part = part & (1 << size) - 1
        apart = codes.shape[1] * size // 8
        plane = part[:, :apart].clone()
        for i in range(1, 8 // size):
            plane |= part[:, i * apart : (i + 1) * apart] << i * size
        planes.append(plane)
        below += size
    return torch.cat(planes, dim=1) if len(planes) > 1 else planes[0]


def unpack_bits(packed: Tensor, width: int, bits: int) -> Tensor:
    """The inverse of `pack_bits`: uint8 [rows, width]; any bytes are codes."""
    full = -(-width // 8) * 8
    codes, begin, below = None, 0, 0
    for size in _PLANES[bits]:
        apart = full * size // 8
        plane = packed[:, begin : begin + apart]
        mask = (1 << size) - 1
        part = torch.cat([plane >> i * size & mask for i in range(8 // size)], dim=1)
        codes = part if codes is None else codes | part << below
        begin, below = begin + apart, below + size
    assert codes is not None
    return codes[:, :width]
