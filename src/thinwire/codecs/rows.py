"""Structured rows: of every matrix send the rows of largest norm, whole.

    C(X)_j = X_j if ||X_j|| is among the r largest of the m rows, else 0        r = ceil(share * m)

    sampled=True    C(X)_j = X_j / pi_j if row j was drawn, with probability pi_j = min(1, c ||X_j||), sum of pi = r

Rows are what the first dimension of a parameter counts; vectors and single numbers are sent whole. Without the shapes
of a model (`fit`) the vector is a matrix with rows of `width` elements, and what is left over is sent whole.

Error   ||x - C(x)||^2 <= (1 - r/m) ||x||^2 for each matrix; biased: wants ErrorFeedback. sampled: unbiased, and
        omega = m/r - 1 at most, reached where all rows are alike, and 0 where r rows hold everything; results beyond
        the range of float32 are clamped to it.
Size    4 bytes for each element of a row that is kept, and the index (indices.py) of rows: bits a row, not an element.
Cost    one pass for norms in float64, one to copy; no sort but of m norms.
Source  Muhamed et al. 2024, arXiv:2406.17660 (Grass), sec. 3: rows by norm, or drawn in proportion to it and scaled.
Differs Grass runs its optimizer on the rows it keeps and keeps the same ones for many steps; here they are a way to
        write a vector, chosen anew each time. It draws r rows with replacement; we draw r different ones by systematic
        sampling, which is no worse. How rows are weighed beside their norm is left open there.
Avoid   where what matters is spread over all rows, and on models of few, wide or one-dimensional parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from thinwire.codecs import indices
from thinwire.codecs.base import Codec, Shapes, Traits, as_matrix, require
from thinwire.codecs.blocks import HUGE
from thinwire.codecs.memory import zeros
from thinwire.codecs.options import call, changed, check_share, is_whole
from thinwire.errors import ConfigError, PacketError
from thinwire.packet import Fields, Layout
from thinwire.randomness import mix

_DEFAULT_WIDTH = 256
_PIECE = 1 << 18  # elements whose norms are taken at once
_DRAW = 3  # purpose of the key's draws; 1 is a chain's second codec
_ONE = 1 << 40  # a probability of 1; draws are made in integers, so that exactly r different rows come out


@dataclass(frozen=True)
class _Matrix:
    """Elements [begin, begin + rows * width) of the vector; `keep` rows of them are sent."""

    begin: int
    rows: int
    width: int
    keep: int

    def of(self, x: Tensor) -> Tensor:
        """[rows, width]"""
        return x[self.begin : self.begin + self.rows * self.width].reshape(self.rows, self.width)


@dataclass(frozen=True)
class Rows(Codec):
    """Keep the largest rows, drop the rest; see `rows`.

    shapes  of the parameters whose elements the vector is; a vector of another length is cut as if there were none
    """

    share: float
    _: KW_ONLY
    width: int = _DEFAULT_WIDTH
    sampled: bool = False
    shapes: Shapes = field(default=(), repr=False)

    values = "value"  # sampled: of scaled rows; what follows is then unbiased after unbiased, and omegas add up as ever

    def __post_init__(self) -> None:
        mend = "for an eighth write rows(1/8); `thinwire codecs rows` shows its options"
        check_share("rows", self.share, of="each matrix's rows sent", mend=mend)
        if not is_whole(self.width, 1):
            raise ConfigError(
                f"rows is to have {self.width!r} elements in a row",
                expected="a whole number, at least 1",
                mend=f"leave it out for {_DEFAULT_WIDTH}; it matters only where a model's shapes are not known",
            )
        if not isinstance(self.sampled, bool):
            raise ConfigError(
                f"rows(sampled={self.sampled!r})",
                expected="True or False",
                mend="True without error feedback, False with it",
            )

    @property
    def spec(self) -> str:
        return call("rows", repr(float(self.share)), **changed(self))

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=self.sampled, reencodes=False, wants_feedback=not self.sampled)

    def fit(self, shapes: Shapes) -> Rows:
        """The same codec for a vector of the elements of these parameters, in order."""
        return replace(self, shapes=tuple(map(tuple, shapes)))

    def layout(self, n: int) -> Layout:
        matrices = self._matrices(n)
        value: Layout = {"value": (torch.float32, sum(m.keep * m.width for m in matrices))}
        kept, total = _counts(matrices)
        return {**value, "index": indices.layout("compact", kept, total)} if kept < total else value

    def encode(self, x: Tensor, key: int) -> Fields:
        layout, matrices = self.layout(len(x)), self._matrices(len(x))
        value = x.new_empty(layout["value"][1])
        found = []
        for number, (matrix, row, out) in enumerate(_slots(matrices, value)):
            each = matrix.of(x)
            if matrix.keep == matrix.rows:
                p = torch.arange(matrix.keep, device=x.device)
                out.copy_(each)
            elif not self.sampled:
                p = _largest(_norms(each), matrix.keep)
                out.copy_(each.index_select(0, p))
            else:
                p, scale = _sample(_norms(each), matrix.keep, mix(key, number, _DRAW))
                out.copy_((each.index_select(0, p) * scale.unsqueeze(1)).clamp_(-HUGE, HUGE))
            found.append(p + row)
        if "index" not in layout:
            return {"value": value}
        return {"value": value, "index": indices.write("compact", torch.cat(found), _counts(matrices)[1])}

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        layout, matrices = self.layout(n), self._matrices(n)
        require(fields, layout)
        value = fields["value"].contiguous()
        x = zeros(n, device=value.device)
        kept, total = _counts(matrices)
        p = torch.arange(kept, device=value.device)
        if "index" in layout:
            p = indices.read("compact", fields["index"], kept, total)
        taken = 0
        for matrix, row, rows in _slots(matrices, value):
            here = p[taken : taken + matrix.keep] - row
            taken += matrix.keep
            if not bool((here[0] >= 0) & (here[-1] < matrix.rows)):
                raise PacketError("field 'index' does not have as many rows of each matrix as are kept of it")
            matrix.of(x).index_copy_(0, here, rows)
        return x

    def contraction(self, n: int) -> float | None:
        return None if self.sampled else self._worst(n)

    def variance(self, n: int) -> float | None:
        return (1 + 2.0**-20) / self._worst(n) - 1 if self.sampled else None  # float32 rounding of scaled elements

    def _worst(self, n: int) -> float:
        """Smallest r/m."""
        return min((matrix.keep / matrix.rows for matrix in self._matrices(n)), default=1.0)

    def _matrices(self, n: int) -> list[_Matrix]:
        shapes = self.shapes
        if sum(map(math.prod, shapes)) != n or not shapes:
            shapes = ((n // self.width, self.width), (n % self.width,))
        matrices, begin = [], 0
        for shape in shapes:
            rows, width = as_matrix(shape)
            if width and rows:
                matrices.append(_Matrix(begin, rows, width, math.ceil(self.share * rows)))
            begin += rows * width
        return matrices


def rows(share: float, *, width: int = _DEFAULT_WIDTH, sampled: bool = False) -> Rows:
    """Keep the largest rows of every matrix.

    share    of the rows, in (0, 1]
    width    elements of a row where a model's shapes are not known
    sampled  draw rows in proportion to their norm, and scale them: right in the mean, without feedback
    """
    return Rows(share, width=width, sampled=sampled)


def _counts(matrices: list[_Matrix]) -> tuple[int, int]:
    """Rows kept and rows in all."""
    return sum(m.keep for m in matrices), sum(m.rows for m in matrices)


def _slots(matrices: list[_Matrix], value: Tensor) -> Iterator[tuple[_Matrix, int, Tensor]]:
    """Each matrix, the number of its first row among all, and the place of its kept rows in `value`: [r, width]."""
    at = row = 0
    for matrix in matrices:
        size = matrix.keep * matrix.width
        yield matrix, row, value[at : at + size].view(matrix.keep, matrix.width)
        at, row = at + size, row + matrix.rows


def _norms(matrix: Tensor) -> Tensor:
    """Of the rows; float64 [m], m > 1. In float64 nothing overflows, and rounding seldom decides what is larger."""
    m, width = matrix.shape
    step = max(2, _PIECE // width)  # two rows at least: the sum over one alone depends on the number of threads
    norms = torch.empty(m, dtype=torch.float64, device=matrix.device)
    for start in range(0, m, step):
        begin = min(start, m - 2)
        norms[begin : start + step] = torch.linalg.vector_norm(matrix[begin : start + step], dim=1, dtype=torch.float64)
    return norms


def _largest(norms: Tensor, r: int) -> Tensor:
    """The r largest, of equals the first; int64 [r], ascending."""
    return norms.sort(descending=True, stable=True).indices[:r].sort().values


def _sample(norms: Tensor, r: int, key: int) -> tuple[Tensor, Tensor]:
    """Rows drawn in proportion to their norms, and 1/pi for each; int64 [r], ascending, float64 [r].

    Systematic sampling: intervals of length pi_j are laid end to end, and those that hold one of u, u+1, .. u+r-1 are
    drawn. No interval is longer than 1, so none is drawn twice.
    """
    part = (norms / norms.max().clamp(min=1e-300)).float().double().cpu().numpy()  # rounded: alike on all devices
    chance = np.minimum(np.floor(_chances(part, r) * _ONE), _ONE).astype(np.int64)
    ends = np.cumsum(chance)
    u = key % int(ends[-1] - (r - 1) * _ONE)
    p = np.searchsorted(ends, u + np.arange(r) * _ONE, side="right")
    return torch.from_numpy(p).to(norms.device), torch.from_numpy(_ONE / chance[p]).to(norms.device)


def _chances(part: npt.NDArray[np.float64], r: int) -> npt.NDArray[np.float64]:
    """pi: proportional to `part` but for those that would exceed 1; sums to r."""
    order = np.argsort(-part, kind="stable")
    falling = part[order]
    rest = np.cumsum(falling[::-1])[::-1]  # sum from here on
    left = np.maximum(r - np.arange(len(part)), 1)  # to be drawn from here on, if all before are certain
    certain = min(r, int(np.argmin(left * falling > rest)))  # the first whose chance is no more than 1
    chance = np.ones(len(part))
    if certain < r and rest[certain] > 0:
        chance[order[certain:]] = (r - certain) * falling[certain:] / rest[certain]
    else:  # nothing but zeros is left: the first of them
        chance[order[r:]] = 0
    return chance
