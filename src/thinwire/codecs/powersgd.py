"""PowerSGD: each matrix as a product of two thin ones, found by one step of power iteration on the members' mean.

    P_w = M_w Q         P = orthonormalised mean_w P_w
    Q_w = M_w^T P       Q = mean_w Q_w, the next round's Q
    update = P Q^T      sent_w = P P^T M_w

A parameter of two or more dimensions is seen as a matrix [rows, all others]. Vectors, and matrices of which the two
factors would be more than half as large, go with the first exchange as they are.

Error   sent_w is a projection of M_w: ||M_w - sent_w||^2 = ||M_w||^2 - ||P^T M_w||^2, never more than ||M_w||^2. Exact
        for a mean of rank r or less that does not change. Biased: wants ErrorFeedback.
Size    4 r (rows + cols) bytes of a matrix, in two exchanges, each as an all-reduce.
State   shared: Q of all matrices.
Cost    two products with M, one of P and Q; one copy of all matrices.
Source  Vogels, Karimireddy & Jaggi 2019, arXiv:1905.13727, Alg. 1 and 2.
Differs the residual subtracts P P^T M_w, with the member's own Q: what this member's matrix contributed to the update.
        Alg. 2 subtracts the update that all share, whose norm no member's own matrix bounds. A column of P that the
        others span (a matrix of lower rank, or of zeros) becomes zero instead of noise, and its Q is drawn anew in the
        next round. Orthonormalisation and update are computed in one order of additions, so that processors of any
        kind hold the same bits. The first Q is uniform, not normal.
Avoid   on models of vectors and small matrices, over Gloo or with members of unlike speed (two exchanges wait twice),
        and where gradients are of high rank: small batches late in training.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from thinwire.codecs.base import Codec, Shapes, as_matrix
from thinwire.codecs.blocks import sums
from thinwire.codecs.options import call, changed, check_flag, is_whole
from thinwire.codecs.precision import fp32
from thinwire.codecs.stages import Result, Stage, Staged, Stages, Tensors
from thinwire.errors import ConfigError
from thinwire.randomness import mix, random_bytes

_WORTH = 2  # factors are sent if they are this many times smaller than the matrix
_PIECE = 1 << 16  # elements of the update computed at once
_SPANNED = 1e-5  # of a column's norm: what is left of less than this after projection is rounding


@dataclass(frozen=True)
class _Group:
    """Matrices of one shape and rank: [count, rows, cols], and where each begins in the vector."""

    rows: int
    cols: int
    rank: int
    starts: tuple[int, ...]

    def matrix(self, x: Tensor, start: int) -> Tensor:
        """The one that begins there; a view."""
        return x[start : start + self.rows * self.cols].view(self.rows, self.cols)

    def all_of(self, x: Tensor) -> Tensor:
        """They; a copy if there are several."""
        if len(self.starts) == 1:
            return self.matrix(x, self.starts[0]).unsqueeze(0)
        return torch.stack([self.matrix(x, start) for start in self.starts])


@dataclass(frozen=True)
class PowerSGD(Staged):
    """Low-rank factors in two exchanges.

    rank     columns of each factor, r above
    warm     start from the last round's Q; otherwise from a new random one each round, which loses more
    factors  codec that the factors, and what goes with them, are written with
    shapes   of the parameters that the vector is made of (see Staged.fit); not part of the expression
    ranks    of each of them, where a budget has chosen; otherwise all have `rank`
    """

    rank: int = 2
    warm: bool = True
    factors: Codec = fp32
    shapes: Shapes = field(default=(), repr=False)
    ranks: tuple[int, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if not is_whole(self.rank, 1):
            raise ConfigError(
                f"powersgd of rank {self.rank!r}",
                expected="a whole number of at least 1",
                mend="leave it out for 2; 1 to 4 are usual, up to 32 for language models",
            )
        check_flag("powersgd", "with warm", self.warm)
        if not isinstance(self.factors, Codec) or self.factors.traits.wants_feedback:
            told = self.factors.spec if isinstance(self.factors, Codec) else repr(self.factors)
            raise ConfigError(
                f"powersgd is to write its factors with {told}",
                expected="a codec that loses little: fp32, bf16, int8",
                mend="leave it out for fp32; what the factors lose, no memory gives back",
            )

    @property
    def spec(self) -> str:
        text = call("powersgd", rank=self.rank, **changed(self, "warm"))
        return text if self.factors == fp32 else f"{text[:-1]}, factors={self.factors.spec})"

    @property
    def wants_feedback(self) -> bool:
        return True

    @property
    def needs_shapes(self) -> bool:
        return True

    def fit(self, shapes: Shapes) -> PowerSGD:
        return replace(self, shapes=shapes)

    def run(self, x: Tensor, shared: Tensors, key: int) -> Stages:
        groups = self._groups(len(x))
        plain = _rest(len(x), groups, x.device)
        if not groups:
            combined, sent = yield Stage(x, self.factors, whole=True)
            return Result(combined, sent, shared)
        matrices = [group.all_of(x) for group in groups]
        qs = self._start(groups, shared, key, x.device)
        ps = [torch.matmul(m, q.transpose(1, 2)) for m, q in zip(matrices, qs, strict=True)]  # [count, rows, r]
        combined, sent = yield Stage(_joined([*(p.transpose(1, 2) for p in ps), x[plain]]), self.factors)
        update, mine = torch.empty_like(x), torch.empty_like(x)
        thin = len(combined) - len(plain)
        update[plain], mine[plain] = combined[thin:], sent[thin:]
        ps = [_orthonormal(p) for p in _cut(combined, [(len(g.starts), g.rank, g.rows) for g in groups])]
        # As P^T M, and not M^T P: a transposed view of M is many times slower on a processor.
        qs = [torch.matmul(p, m) for p, m in zip(ps, matrices, strict=True)]  # [count, r, cols]
        combined, sent = yield Stage(_joined(qs), self.factors)
        shapes = [(len(g.starts), g.rank, g.cols) for g in groups]
        for group, p, q, own in zip(groups, ps, _cut(combined, shapes), _cut(sent, shapes), strict=True):
            for start, p_one, q_one, own_one in zip(group.starts, p, q, own, strict=True):  # [r, rows], [r, cols]
                _product(p_one, q_one, out=group.matrix(update, start))
                torch.matmul(p_one.t(), own_one, out=group.matrix(mine, start))  # nobody else computes it
        return Result(update, mine, {"q": combined} if self.warm else {})

    def _start(self, groups: list[_Group], shared: Tensors, key: int, device: torch.device) -> list[Tensor]:
        """The Q of each group, transposed: [count, r, cols]. Rows of zeros, which would stay so, are drawn anew."""
        shapes = [(len(g.starts), g.rank, g.cols) for g in groups]
        count = sum(map(math.prod, shapes))
        drawn = random_bytes(mix(key, 0), 2 * count, device).view(torch.int16).float().add_(0.5).mul_(2.0**-16)
        fresh = _cut(drawn, shapes)
        if "q" not in shared or len(shared["q"]) != count:
            return fresh  # other ranks than in the last round, too
        started = []
        for q, new in zip(_cut(shared["q"], shapes), fresh, strict=True):
            largest = q.abs().amax(dim=2, keepdim=True)
            started.append(torch.where(largest > 0, q / largest.clamp(min=torch.finfo(torch.float32).tiny), new))
        return started

    def _groups(self, n: int) -> list[_Group]:
        """The matrices worth factoring, by shape; none if the vector is not made of the shapes."""
        found: dict[tuple[int, int, int], list[int]] = {}
        sizes = [math.prod(shape) for shape in self.shapes]
        if sum(sizes) != n:
            return []
        ranks = self.ranks or (self.rank,) * len(sizes)
        starts = itertools.accumulate(sizes, initial=0)
        for shape, size, rank, start in zip(self.shapes, sizes, ranks, starts, strict=False):
            rows, cols = as_matrix(shape)
            if rows > 1 and (rows + cols) * rank * _WORTH <= size:
                found.setdefault((rows, cols, rank), []).append(start)
        return [_Group(rows, cols, rank, tuple(starts)) for (rows, cols, rank), starts in found.items()]

    def expected(self, piece: Tensor, shape: tuple[int, ...]) -> tuple[float, int]:
        """For a budget: the norm that a parameter loses at this rank, at least, and the bytes of its factors.

        piece  float32, the parameter's elements; what it loses is what its singular values beyond the rank hold
        """
        rows, cols = as_matrix(shape)
        if rows <= 1 or (rows + cols) * self.rank * _WORTH > piece.numel():
            return 0.0, _bytes(self.factors, piece.numel())
        matrix = piece.view(rows, cols).double()
        squares = torch.linalg.eigvalsh(matrix @ matrix.t() if rows <= cols else matrix.t() @ matrix)  # ascending
        lost = squares[: max(0, len(squares) - self.rank)].clamp(min=0).sum()
        return float(lost.sqrt()), _bytes(self.factors, (rows + cols) * self.rank)


def _bytes(codec: Codec, n: int) -> int:
    return sum(dtype.itemsize * count for dtype, count in codec.layout(n).values())


def _rest(n: int, groups: list[_Group], device: torch.device) -> Tensor:
    """Positions of the elements that are in no group; int64."""
    rest = torch.ones(n, dtype=torch.bool, device=device)
    for group in groups:
        for start in group.starts:
            rest[start : start + group.rows * group.cols] = False
    return rest.nonzero().squeeze(1)


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def _cut(vector: Tensor, shapes: list[tuple[int, int, int]]) -> list[Tensor]:
    """The first elements of a vector as tensors of these shapes, one after the other."""
    sizes = [math.prod(shape) for shape in shapes]
    return [part.view(shape) for part, shape in zip(torch.split(vector[: sum(sizes)], sizes), shapes, strict=True)]


def _orthonormal(p: Tensor) -> Tensor:
    """Rows of [count, r, rows] made orthonormal, twice Gram-Schmidt; what the rows before it span becomes zero."""
    done: list[Tensor] = []
    for row in (p.double() / p.abs().amax(dim=(1, 2), keepdim=True).clamp(min=2.0**-126).double()).unbind(dim=1):
        before = _dot(row, row)
        for other in done * 2:
            row = row - _dot(row, other) * other
        square = _dot(row, row)
        kept = square > _SPANNED**2 * before
        done.append(torch.where(kept, row / square.clamp(min=2.0**-1000).sqrt(), 0.0))
    return torch.stack(done, dim=1).float()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Products of rows [count, n], added in one order everywhere. [count, 1]"""
    return sums(a * b).unsqueeze(1)


def _product(p: Tensor, q: Tensor, out: Tensor) -> None:
    """P Q^T from their rows: r products of a column and a row, each rounded on its own, as on every other machine."""
    step = max(1, _PIECE // out.shape[1])
    term = torch.empty_like(out[:step])
    for band, column in zip(torch.split(out, step), torch.split(p, step, dim=1), strict=True):
        torch.mul(column[0].unsqueeze(1), q[0], out=band)
        for i in range(1, len(q)):
            band.add_(torch.mul(column[i].unsqueeze(1), q[i], out=term[: len(band)]))


powersgd = PowerSGD
