"""Elias gamma codes of small whole numbers, most of them near zero, in streams that are read side by side.

    |q| + 1 = 2^N + r:   N zeros and a one -> prefix,   r in N bits -> tail,   if q != 0 whether q < 0 -> sign

The classical code writes these three one after another, and a reader learns where a number begins only when it has
read the one before. Apart, the ends of all prefixes are the ones of one stream, and everything else follows from them.
Bits fill bytes from the lowest up, the tail's bits from the highest of r down; what is left of a last byte is 0.

Source  Elias 1975, "Universal codeword sets and representations of the integers"; for quantised gradients: Alistarh et
        al. 2017, arXiv:1610.02132, App. A.
Cost    numpy on the processor, a byte of memory for every bit; about 20 passes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thinwire.errors import PacketError
from thinwire.packet import Layout

_PIECE = 1 << 18
_Bytes = NDArray[np.uint8]
#: N of m = |q| + 1, for m up to 128.
_LENGTH = np.array([0] + [m.bit_length() - 1 for m in range(1, 129)], dtype=np.uint8)


def layout(n: int, largest: int) -> Layout:
    """Most that n numbers of magnitudes up to `largest` can take."""
    longest = (largest + 1).bit_length() - 1
    bits = {"prefix": n * (longest + 1), "tail": n * longest, "sign": n}
    return {name: (torch.uint8, -(-count // 8)) for name, count in bits.items()}


def encode(codes: Tensor) -> dict[str, Tensor]:
    """int8 [n], magnitudes up to 127, to fields of the names above."""
    streams: dict[str, list[_Bytes]] = {"prefix": [], "tail": [], "sign": []}
    flat = codes.cpu().numpy()
    for start in range(0, len(flat), _PIECE):
        q = flat[start : start + _PIECE]
        m = np.abs(q).astype(np.uint8) + 1
        length = _LENGTH[m]
        end = np.cumsum(length + 1, dtype=np.int64)
        prefix = np.zeros(end[-1], dtype=np.uint8)
        prefix[end - 1] = 1
        tail = np.zeros(end[-1] - len(q), dtype=np.uint8)
        for k, some, where in _digits(length):
            tail[where] = m[some] >> (length[some] - 1 - k) & 1
        for name, bits in (("prefix", prefix), ("tail", tail), ("sign", (q < 0)[q != 0].view(np.uint8))):
            streams[name].append(bits)
    nothing = np.zeros(0, dtype=np.uint8)
    packed = {name: np.packbits(np.concatenate([nothing, *bits]), bitorder="little") for name, bits in streams.items()}
    return {name: torch.from_numpy(field).to(codes.device) for name, field in packed.items()}


def decode(prefix: Tensor, tail: Tensor, sign: Tensor, n: int, largest: int) -> Tensor:
    """The n numbers, int8, on the fields' device.

    raises  PacketError if the streams are not those of n numbers of magnitudes up to `largest`
    """
    length = _lengths(np.unpackbits(prefix.cpu().numpy(), bitorder="little"), n, (largest + 1).bit_length() - 1)
    digits = _bits("tail", tail, int(length.sum(dtype=np.int64)))
    q = np.empty(n, dtype=np.int8)
    for start, at in _starts(length):
        piece = length[start : start + _PIECE]
        m = np.ones(len(piece), dtype=np.uint8)
        for _, some, where in _digits(piece):
            m[some] = 2 * m[some] + digits[at + where]
        if len(m) and m.max() > largest + 1:
            raise PacketError(f"field 'tail' makes a magnitude of {m.max() - 1}", expected=f"at most {largest}")
        q[start : start + _PIECE] = m - 1
    others = np.flatnonzero(q)
    negative = others[_bits("sign", sign, len(others)) == 1]
    q[negative] = -q[negative]
    return torch.from_numpy(q).to(prefix.device)


def _digits(length: _Bytes) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
    """For k = 0, 1, ..: the numbers that have a k-th digit of r, and where it stands in their tail."""
    start = np.cumsum(length, dtype=np.int64) - length
    for k in range(int(length.max(initial=0))):
        some = np.flatnonzero(length > k)
        yield k, some, start[some] + k


def _starts(length: _Bytes) -> Iterator[tuple[int, int]]:
    """(first number, first bit in the tail) of every piece."""
    at = 0
    for start in range(0, len(length), _PIECE):
        yield start, at
        at += int(length[start : start + _PIECE].sum(dtype=np.int64))


def _lengths(bits: _Bytes, n: int, longest: int) -> _Bytes:
    """N of every number: zeros between the ones."""
    length, count, last = np.empty(n, dtype=np.uint8), 0, -1
    for start in range(0, len(bits), 4 * _PIECE):
        ones = np.flatnonzero(bits[start : start + 4 * _PIECE]) + start
        zeros = np.diff(ones, prepend=last) - 1
        if count + len(ones) > n or zeros.max(initial=0) > longest:
            raise PacketError(
                "field 'prefix' is not that of so many numbers", expected=f"{n} runs of at most {longest} zeros"
            )
        length[count : count + len(ones)] = zeros
        count += len(ones)
        last = int(ones[-1]) if len(ones) else last
    if count < n or len(bits) - (last + 1) >= 8:
        raise PacketError("field 'prefix' ends too early or too late", expected=f"{n} runs, and no byte beyond them")
    return length


def _bits(name: str, field: Tensor, count: int) -> _Bytes:
    """The first `count` bits of a field that must have no byte more."""
    if len(field) != -(-count // 8):
        raise PacketError(f"field {name!r} has {len(field)} bytes", expected=f"{count} bits, as the prefix says")
    return np.unpackbits(field.cpu().numpy(), bitorder="little", count=count)
