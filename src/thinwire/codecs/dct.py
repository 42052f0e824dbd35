"""DCT top-k (DeMo): of each chunk's cosine coefficients, send the k largest.

    c = D_a X D_b^T      D the orthonormal DCT-II, X a chunk of a x b elements
    C(x) = D_a^T top_k(c) D_b      k = ceil(share * a * b)

A fitted codec cuts each parameter of two or more dimensions, seen as [rows, all others], into chunks of 64 x 64 (or as
many as it has), others and vectors without shape into chunks of 64. Edges are filled up with zeros.

Error   D is orthonormal, so the error's energy is that of the coefficients dropped: ||x - C(x)||^2 <=
        (1 - k / (a b)) ||x||^2, the smallest k / (a b) over the chunks. Biased: wants ErrorFeedback.
Size    a float32 value and a 12-bit position for each of the k coefficients of each chunk.
Cost    four products with 64 x 64 matrices both ways together, and a top-k of each chunk.
Source  Peng et al. 2024, arXiv:2411.19870 (DeMo), Sect. 3.
Differs the paper's chunks are the largest divisor up to 64 of each dimension, which is 1 for a prime one. Its values
        are the coefficients; ours are divided by 64, so that no vector of float32 overflows. Our products are of whole
        numbers in double precision, all partial sums below 2^53: exact in any order, so that processors whose matrix
        products differ write and read the same bits; the price is a rounding to 2^-28 of a chunk's norm.
Avoid   on deltas of few steps and parameters without smooth structure, where topk of the elements keeps more.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from thinwire.codecs.base import Codec, Shapes, Traits, as_matrix, require
from thinwire.codecs.blocks import HUGE, SLACK
from thinwire.codecs.indices import read_numbers, write_numbers
from thinwire.codecs.memory import empty
from thinwire.codecs.options import call, changed, check_share, is_whole
from thinwire.codecs.selection import largest_in_rows
from thinwire.errors import ConfigError, PacketError
from thinwire.packet import Fields, Layout

_CHUNK = 64
_PIECE = 1 << 17  # elements worked on at once; they are double precision
_DOWN = 2.0**-6  # values are coefficients times this; a chunk of 64 x 64 has a norm of up to 2^6 times its largest
_NORM = 28  # bits of a chunk's norm, its elements being whole numbers
_BASIS = 24  # bits of the norm of the basis's rows: sums of products stay below 2^52, where all whole numbers are exact
_POSITION = 12  # bits


class _Band(NamedTuple):
    """Elements [start, start + rows * cols) of the vector, a matrix to be cut into chunks of a x b, k kept of each."""

    start: int
    rows: int
    cols: int
    a: int
    b: int
    k: int

    @property
    def stop(self) -> int:
        return self.start + self.rows * self.cols

    @property
    def grid(self) -> tuple[int, int]:
        """Chunks one below the other, and side by side."""
        return -(-self.rows // self.a), -(-self.cols // self.b)

    @property
    def kept(self) -> int:
        return math.prod(self.grid) * self.k


@dataclass(frozen=True)
class DCT(Codec):
    """Keep the largest cosine coefficients of each chunk.

    share   of a chunk's coefficients, in (0, 1]; at least one is kept
    chunk   side of a chunk, 2 to 64
    shapes  of the parameters that the vector is made of (see Codec.fit); not part of the expression
    """

    share: float
    chunk: int = _CHUNK
    shapes: Shapes = field(default=(), repr=False)

    values = "value"

    def __post_init__(self) -> None:
        mend = "for 32 of 4096, as in the paper, write dct(1/128)"
        check_share("dct", self.share, of="each chunk's coefficients sent", mend=mend)
        if not is_whole(self.chunk, 2, _CHUNK):
            raise ConfigError(
                f"dct is to have chunks of side {self.chunk!r}",
                expected=f"a whole number from 2 to {_CHUNK}",
                mend=f"leave it out for {_CHUNK}; smaller chunks are quicker and gather less energy",
            )

    @property
    def spec(self) -> str:
        return call("dct", share=float(self.share), **changed(self))

    @property
    def traits(self) -> Traits:
        return Traits(reencodes=False, wants_feedback=True)

    def fit(self, shapes: Shapes) -> DCT:
        """The codec for vectors of these parameters' elements; vectors of other lengths are cut as if without shape."""
        return replace(self, shapes=shapes)

    def part(self, begin: int, end: int) -> DCT:
        """The codec for a slice of the vector, which has no shape."""
        return replace(self, shapes=())

    def layout(self, n: int) -> Layout:
        kept = sum(band.kept for band in self._bands(n))
        return {"value": (torch.float32, kept), "index": (torch.uint8, -(-kept * _POSITION // 8))}

    def encode(self, x: Tensor, key: int) -> Fields:
        kept = self.layout(len(x))["value"][1]
        value = torch.empty(kept, device=x.device)
        index = torch.empty(kept, dtype=torch.int16, device=x.device)
        done = 0
        for band in self._bands(len(x)):
            chunks, unit = _whole(_chunks(x[band.start : band.stop].reshape(band.rows, band.cols), band))
            inner = _product(chunks, _basis(band.b, x.device).t())
            coefficients = _product(_basis(band.a, x.device), inner).mul_(unit.mul_(_DOWN)).float()
            rows = coefficients.view(-1, band.a * band.b)
            largest = largest_in_rows(rows, band.k)  # [chunks, k]
            value[done : done + band.kept] = rows.gather(1, largest).view(-1)
            index[done : done + band.kept] = largest.view(-1)
            done += band.kept
        return {"value": value, "index": write_numbers(index, _POSITION)}

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        require(fields, self.layout(n))
        value = fields["value"]
        index = read_numbers(fields["index"], len(value), _POSITION)
        x = empty(n, torch.float32, value.device)
        done = 0
        for band in self._bands(n):
            places = index[done : done + band.kept].view(-1, band.k)
            if not bool((places[:, 1:] > places[:, :-1]).all() & (places[:, -1] < band.a * band.b).all()):
                raise PacketError(
                    "field 'index' is not a list of ascending positions in each chunk",
                    expected=f"{band.k} ascending positions below {band.a * band.b}",
                )
            rows = torch.zeros(len(places), band.a * band.b, dtype=torch.float64, device=x.device)
            rows.scatter_(1, places, value[done : done + band.kept].view(-1, band.k).double())
            coefficients, unit = _whole(rows.view(-1, band.a, band.b))
            inner = _product(coefficients, _basis(band.b, x.device))
            chunks = _product(_basis(band.a, x.device).t(), inner).mul_(unit.div_(_DOWN))
            whole = chunks.view(*band.grid, band.a, band.b).transpose(1, 2).reshape(band.grid[0] * band.a, -1)
            # What the dropped coefficients held back may overshoot the largest float32.
            x[band.start : band.stop].view(band.rows, band.cols).copy_(
                whole[: band.rows, : band.cols].clamp(-HUGE, HUGE)
            )
            done += band.kept
        return x

    def contraction(self, n: int) -> float | None:
        return min((band.k / (band.a * band.b) for band in self._bands(n)), default=1.0) - SLACK

    def _bands(self, n: int) -> Iterator[_Band]:
        start = 0
        for shape in self.shapes if sum(map(math.prod, self.shapes)) == n else ((n,),):
            size, (rows, cols) = math.prod(shape), as_matrix(shape)
            if min(rows, cols) > 1:
                yield from self._matrix(start, rows, cols)
            elif size:
                yield from self._vector(start, size)
            start += size

    def _matrix(self, start: int, rows: int, cols: int) -> Iterator[_Band]:
        a, b = min(self.chunk, rows), min(self.chunk, cols)
        step = max(1, _PIECE // (a * cols)) * a
        for begin in range(0, rows, step):
            yield _Band(start + begin * cols, min(step, rows - begin), cols, a, b, self._k(a * b))

    def _vector(self, start: int, size: int) -> Iterator[_Band]:
        b = min(self.chunk, size)
        step = _PIECE // b * b
        for begin in range(0, size - size % b, step):
            yield _Band(start + begin, min(step, size - size % b - begin) // b, b, 1, b, self._k(b))
        if size % b:
            yield _Band(start + size - size % b, 1, size % b, 1, b, self._k(b))

    def _k(self, elements: int) -> int:
        return math.ceil(self.share * elements)


def _chunks(matrix: Tensor, band: _Band) -> Tensor:
    """The matrix in chunks, filled up with zeros: float64 [chunks, a, b]."""
    down, across = band.grid
    full = matrix.new_zeros(down * band.a, across * band.b, dtype=torch.float64)
    full[: band.rows, : band.cols] = matrix
    return full.view(down, band.a, across, band.b).transpose(1, 2).reshape(-1, band.a, band.b)


def _whole(chunks: Tensor) -> tuple[Tensor, Tensor]:
    """Chunks as whole numbers of norms up to 2^28, each times a power of two; in place. Also the powers [chunks, 1, 1].

    The norm's power of two comes from elements cut to 20 bits, whose squares add up without rounding; a logarithm or a
    sum in another order would differ by machine.
    """
    exponent = _exponent(chunks.abs().amax(dim=(1, 2), keepdim=True).clamp_(min=2.0**-200))
    coarse = (chunks * _power(19 - exponent)).round_()
    square = coarse.square_().sum(dim=(1, 2), keepdim=True).clamp_(min=1.0)
    exponent += (_exponent(square) + 2) // 2 - 19  # now of a power of two above the norm
    chunks.mul_(_power(_NORM - exponent)).round_()
    return chunks, _power(exponent - _NORM)


def _exponent(x: Tensor) -> Tensor:
    """floor(log2 x) of positive normal float64 numbers; exact."""
    return (x.view(torch.int64) >> 52) - 1023


def _power(exponent: Tensor) -> Tensor:
    """2 to the exponent, float64; exact, where a power function may not be."""
    return (exponent.clamp(-1022, 1023) + 1023 << 52).view(torch.float64)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Whole numbers times the basis, back to whole numbers: every sum on the way is exact."""
    return torch.matmul(left, right).mul_(2.0**-_BASIS).round_()


def _basis(size: int, device: torch.device) -> Tensor:
    return _table(size).to(device)


@functools.cache
def _table(size: int) -> Tensor:
    """The orthonormal DCT-II of `size` elements times 2^24, whole numbers; float64 [coefficient, element]."""
    rows = []
    for i in range(size):
        norm = math.sqrt((2 if i else 1) / size) * (1 << _BASIS)
        rows.append([round(norm * math.cos(math.pi * i * (2 * j + 1) / (2 * size))) for j in range(size)])
    return torch.tensor(rows, dtype=torch.float64)


dct = DCT
