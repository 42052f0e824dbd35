"""Ways to write which elements were kept: k ascending positions below n, as bytes.

    int32        four bytes each
    packed       b = ceil(log2 n) bits each, end to end
    bitmap       one bit an element
    elias_fano   l = floor(log2(n/k)) low bits each, and what is above them in unary: bit (p_i >> l) + i is set
    varint       the distance to the next, less one, seven bits a byte, lowest first
    compact      the smallest of packed, bitmap and elias_fano, which n and k decide
    smallest     the smallest of those three and varint, which the positions decide; one byte in front says which

Bits fill a byte from its lowest up; what is left over in the last byte is zero.

Size    ceil(k b / 8), ceil(n / 8), ceil(k l / 8) + ceil((k + ((n-1) >> l)) / 8) bytes: exact. varint is at most
        k + sum_j min(k, (n-k) >> 7j) bytes, about k below a density of 1/64. The entropy of k random positions is at
        least 1.44 + log2(n/k) bits each for small k/n; elias_fano takes at most 2 + log2(n/k) and the bytes' ends.
Cost    a few passes over k positions, and one over n bits for bitmap; no loop over positions. 16 bytes a position.
Source  Elias 1974, J. ACM 21(2); Fano 1971 (MIT CSG Memo 61); Vigna 2013, arXiv:1206.4300 (the layout).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from thinwire.errors import PacketError

Index = Literal["compact", "smallest", "int32", "packed", "bitmap", "varint", "elias_fano"]
INDEX = get_args(Index)

Positions = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

_SMALLEST = ("packed", "bitmap", "elias_fano", "varint")  # the byte in front is a place in here


def layout(how: Index, k: int, n: int) -> tuple[torch.dtype, int]:
    """The field that `write` gives for k of n positions; its length is a bound if it is not `exact`."""
    if how == "int32":
        return torch.int32, k
    if how == "smallest":
        return torch.uint8, 1 + _CODERS[_compact(k, n)].size(k, n)
    return torch.uint8, _CODERS[_compact(k, n) if how == "compact" else how].size(k, n)


def exact(how: Index) -> bool:
    """Whether n and k alone decide the length."""
    return how not in ("varint", "smallest")


def write(how: Index, positions: Tensor, n: int) -> Tensor:
    """Positions as a field.

    positions  int64 [k], ascending, each of [0, n) at most once
    returns    as `layout` says, on the same device
    """
    if how == "int32":
        return positions.int()
    p = positions.cpu().numpy()
    if how == "smallest":
        name = _smallest(p, n)
        raw = np.concatenate([np.array([_SMALLEST.index(name)], np.uint8), _CODERS[name].write(p, n)])
    else:
        raw = _CODERS[_compact(len(p), n) if how == "compact" else how].write(p, n)
    return torch.from_numpy(raw).to(positions.device)


def read(how: Index, field: Tensor, k: int, n: int) -> Tensor:
    """The positions of a field of the type that `layout` says; int64 [k].

    raises  PacketError unless `write` gives these bytes for k positions below n
    """
    if how == "int32":
        _require(len(field) == k, "has another length than its positions need")
        return _checked(field.long(), n)
    raw = field.cpu().numpy()
    name = _compact(k, n) if how == "compact" else how
    if how == "smallest":
        _require(len(raw) > 0 and raw[0] < len(_SMALLEST), "does not say how it is written")
        name, raw = _SMALLEST[raw[0]], raw[1:]
    _require(name == "varint" or len(raw) == _CODERS[name].size(k, n), "has another length than its positions need")
    p = _CODERS[name].read(raw, k, n)
    positions = _checked(torch.from_numpy(p), n)
    _require(how != "smallest" or name == _smallest(p, n), "is not written in the smallest way")
    return positions.to(field.device)


def write_numbers(numbers: Tensor, width: int) -> Tensor:
    """Numbers of any kind below 2^width, as `packed` writes positions: uint8 [ceil(k width / 8)], on their device."""
    return torch.from_numpy(_pack(numbers.cpu().numpy(), width)).to(numbers.device)


def read_numbers(field: Tensor, k: int, width: int) -> Tensor:
    """The inverse, of a field of the length that k numbers take: int64 [k].

    raises  PacketError unless `write_numbers` gives these bytes for k numbers
    """
    return torch.from_numpy(_unpack(field.cpu().numpy(), k, width)).to(field.device)


def _checked(positions: Tensor, n: int) -> Tensor:
    if len(positions) and not bool((positions[0] >= 0) & (positions[-1] < n) & (positions[1:] > positions[:-1]).all()):
        raise PacketError(
            "field 'index' is not a list of ascending positions", expected=f"ascending positions below {n}"
        )
    return positions


def _require(holds: object, what: str) -> None:
    if not holds:
        raise PacketError(f"field 'index' {what}", expected="what an encoder writes for as many positions")


def _compact(k: int, n: int) -> str:
    return min(_SMALLEST[:3], key=lambda name: _CODERS[name].size(k, n))


def _smallest(p: Positions, n: int) -> str:
    fixed = _compact(len(p), n)
    return "varint" if int(_septets(_gaps(p)).sum()) < _CODERS[fixed].size(len(p), n) else fixed


# The coders -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Coder:
    """size(k, n) in bytes; write(positions, n); read(bytes, k, n) of as many bytes as `size` says (varint: any)."""

    size: Callable[[int, int], int]
    write: Callable[[Positions, int], Bytes]
    read: Callable[[Bytes, int, int], Positions]


def _bytes(bits: int) -> int:
    return -(-bits // 8)


def _width(n: int) -> int:
    """b above."""
    return max(0, n - 1).bit_length()


def _elias_fano_size(k: int, n: int) -> int:
    return _bytes(k * _low(k, n)) + _bytes(_upper(k, n)) if k else 0


def _low(k: int, n: int) -> int:
    """l above."""
    return max(0, (n // max(1, k)).bit_length() - 1)


def _upper(k: int, n: int) -> int:
    """Bits of the unary part."""
    return k + (max(0, n - 1) >> _low(k, n))


def _write_elias_fano(p: Positions, n: int) -> Bytes:
    k = len(p)
    low = _low(k, n)
    if not k:
        return np.empty(0, np.uint8)
    return np.concatenate([_flags((p >> low) + np.arange(k), _upper(k, n)), _pack(p & ((1 << low) - 1), low)])


def _read_elias_fano(raw: Bytes, k: int, n: int) -> Positions:
    low, end = _low(k, n), _bytes(_upper(k, n))
    if not k:
        return np.empty(0, np.int64)
    high = _set(raw[:end], k, _upper(k, n))
    high -= np.arange(k)
    return high << low | _unpack(raw[end:], k, low)


def _varint_size(k: int, n: int) -> int:
    """At most: distances of 2^7j and more take another byte, and all of them together are n - k."""
    return k + sum(min(k, (n - k) >> 7 * j) for j in range(1, 10))


def _write_varint(p: Positions, n: int) -> Bytes:
    gaps = _gaps(p)
    count = _septets(gaps)
    begin = np.cumsum(count) - count
    raw = np.empty(int(count.sum()), np.uint8)
    raw[begin] = (gaps & 127) | (count > 1) << 7
    for j in range(1, int(count.max(initial=0))):
        long = np.flatnonzero(count > j)
        raw[begin[long] + j] = (gaps[long] >> 7 * j & 127) | (count[long] > j + 1) << 7
    return raw


def _read_varint(raw: Bytes, k: int, n: int) -> Positions:
    end = np.flatnonzero(raw < 128)
    _require(len(end) == k and len(raw) == (end[-1] + 1 if k else 0), "holds another number of positions")
    count = np.diff(end, prepend=-1)
    most = -(-_width(n) // 7) or 1
    _require(count.max(initial=0) <= most and not (raw[end][count > 1] == 0).any(), "holds a distance that is too long")
    begin = end - count + 1
    gaps = (raw[begin] & 127).astype(np.int64)
    for j in range(1, int(count.max(initial=0))):
        long = np.flatnonzero(count > j)
        gaps[long] |= (raw[begin[long] + j] & 127).astype(np.int64) << 7 * j
    # In float64, where it cannot overflow; the margin is above its rounding, and the exact check comes after.
    _require(gaps.sum(dtype=np.float64) < 2 * n + 1, "holds distances that lead beyond the end")
    return np.cumsum(gaps + 1) - 1


def _gaps(p: Positions) -> Positions:
    return np.diff(p, prepend=-1) - 1


def _septets(gaps: Positions) -> Positions:
    """Bytes that each distance takes."""
    count = np.ones_like(gaps)
    for j in range(1, 10):
        longer = gaps >> 7 * j > 0
        if not longer.any():
            break
        count += longer
    return count


_CODERS = {
    "packed": _Coder(
        lambda k, n: _bytes(k * _width(n)),
        lambda p, n: _pack(p, _width(n)),
        lambda raw, k, n: _unpack(raw, k, _width(n)),
    ),
    "bitmap": _Coder(
        lambda k, n: _bytes(n),
        lambda p, n: _flags(p, n),
        lambda raw, k, n: _set(raw, k, n),
    ),
    "elias_fano": _Coder(_elias_fano_size, _write_elias_fano, _read_elias_fano),
    "varint": _Coder(_varint_size, _write_varint, _read_varint),
}


# Bits -----------------------------------------------------------------------------------------------------------------


def _flags(places: Positions, bits: int) -> Bytes:
    """ceil(bits / 8) bytes with the bits at `places` set."""
    flags = np.zeros(bits, np.bool_)
    flags[places] = True
    return np.packbits(flags, bitorder="little")


def _set(raw: Bytes, k: int, bits: int) -> Positions:
    """Places of the bits that are set; there must be k, and none beyond `bits`."""
    places = np.flatnonzero(np.unpackbits(raw, bitorder="little").view(np.bool_))
    _require(len(places) == k and (not k or places[-1] < bits), "has bits set that no encoder sets")
    return places


def _pack(numbers: Positions, width: int) -> Bytes:
    """Numbers below 2^width, `width` bits each, end to end."""
    k = len(numbers)
    if not width:
        return np.empty(0, np.uint8)
    rows = np.zeros((-(-k // 8), 8), np.int64)
    rows.reshape(-1)[:k] = numbers
    raw = np.zeros((len(rows), width), np.uint8)  # eight numbers fill `width` bytes
    for i, byte, shift in _places(width):
        raw[:, byte] |= _shifted(rows[:, i], shift).astype(np.uint8)
    return raw.reshape(-1)[: _bytes(k * width)]


def _unpack(raw: Bytes, k: int, width: int) -> Positions:
    """The inverse; the bits after the last number must be zero."""
    if not width:
        return np.zeros(k, np.int64)
    full = np.zeros((-(-k // 8), width), np.uint8)
    full.reshape(-1)[: len(raw)] = raw
    rows = np.zeros((len(full), 8), np.int64)
    for i, byte, shift in _places(width):
        rows[:, i] |= _shifted(full[:, byte].astype(np.int64), -shift)
    rows &= (1 << width) - 1
    numbers: Any = rows.reshape(-1)
    _require(not numbers[k:].any(), "has bits set that no encoder sets")
    return np.ascontiguousarray(numbers[:k])


def _places(width: int) -> list[tuple[int, int, int]]:
    """(i, byte, shift): number i of eight, shifted right by `shift` (left if negative), has bits in this byte."""
    return [
        (i, byte, 8 * byte - i * width)
        for i in range(8)
        for byte in range(i * width // 8, ((i + 1) * width - 1) // 8 + 1)
    ]


def _shifted(numbers: Positions, right: int) -> Positions:
    return numbers >> right if right >= 0 else numbers << -right
