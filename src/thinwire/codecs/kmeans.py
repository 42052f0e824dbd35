"""Clustering: k centroids fitted to this vector, sent with it, and the number of its centroid for each element.

    C(x)_i = c_j,   c_j the centroid nearest to x_i;   c from Lloyd's iteration on the line: c_j = mean of its elements

It starts from the negative and the others, and splits the cluster of the largest error at its mean until there are k;
from there on the error never grows. What topk leaves is one sign's tail and the other's, which few centroids fit:
`topk(0.003) | kmeans(4) | rans` is what FedZip sends.

Error   ||x - C(x)||^2 <= ||x||^2 - ||x||_1^2 / n <= (1 - 1/n) ||x||^2, that of the two means of the negative and the
        others. Vectors of at most k different values are exact, so twice is as once. Biased.
Size    4 min(k, n) bytes of centroids; 1, 2, 4 or 8 bits an element, the fewest that tell k apart.
Cost    a sort, and 20 passes over what was sorted; on the CPU, wherever the vector is.
Source  Malekijoo et al. 2021, arXiv:2102.01593 (FedZip: top-z, clustering, coding); Lloyd 1982 (IEEE Trans. Inf. Th.);
        splitting as in Linde, Buzo & Gray 1980 (IEEE Trans. Commun.).
Differs FedZip's script clusters all entries, zeros included, from centroids spread evenly over the range, in 4 passes:
        even 30 passes from there leave 1.7 times our error for 16 centroids under a Student-t's tails. Its addresses
        have a fixed width, or are gaps whose lengths are not stored; ours are those of topk.
Avoid   for whole vectors where the link is quick, since it sorts them: int4 is as small and many times as fast.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from thinwire.codecs.base import Codec, Traits, require
from thinwire.codecs.blocks import pieces
from thinwire.codecs.options import altered, call, changed, is_whole
from thinwire.codecs.planar import bits_for, pack_row, row_bytes, unpack_row
from thinwire.errors import ConfigError, PacketError
from thinwire.packet import Fields, Layout

_PASSES = 20  # after 10 they are within a few per cent of where they end

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class KMeans(Codec):
    """See `kmeans`.

    k  centroids, from 2 to 256
    """

    k: int = 16

    def __post_init__(self) -> None:
        if not is_whole(self.k, 2, 256):
            raise ConfigError(
                f"kmeans is to fit {self.k!r} centroids",
                expected="a whole number from 2 to 256",
                mend="write kmeans(16), say; 2, 4, 16 and 256 waste no part of the bits they take",
            )

    def __call__(self, k: int | None = None) -> KMeans:
        """The same codec with another number of centroids: `kmeans(4)`."""
        return altered(self, k=k)

    @property
    def spec(self) -> str:
        return call("kmeans", **changed(self))

    @property
    def traits(self) -> Traits:
        return Traits()

    @property
    def _bits(self) -> int:
        return bits_for(self.k)

    def layout(self, n: int) -> Layout:
        return {
            "centroid": (torch.float32, min(self.k, n)),
            "code": (torch.uint8, row_bytes(n, self._bits)),
        }

    def encode(self, x: Tensor, key: int) -> Fields:
        if not len(x):
            return {name: torch.empty(0, dtype=t, device=x.device) for name, (t, _) in self.layout(0).items()}
        centroid = _fit(x.detach().cpu().numpy(), min(self.k, len(x)))
        limits = torch.from_numpy(_limits(centroid)).to(x.device)
        codes = torch.empty(len(x), dtype=torch.uint8, device=x.device)
        for start, stop, _ in pieces(len(x), 2, x.device):
            codes[start:stop] = torch.bucketize(x[start:stop].contiguous(), limits, out_int32=True)
        return {"centroid": torch.from_numpy(centroid).to(x.device), "code": pack_row(codes, self._bits)}

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        require(fields, self.layout(n))
        centroid, codes = fields["centroid"], unpack_row(fields["code"], n, self._bits)
        if not bool(centroid.isfinite().all()):
            raise PacketError("field 'centroid' holds a number that is not finite")
        if n and int(codes.max()) >= len(centroid):
            raise PacketError(f"field 'code' names centroid {int(codes.max())} of {len(centroid)}")
        return centroid.index_select(0, codes.int()) if n else centroid.clone()

    def contraction(self, n: int) -> float | None:
        # Centroids are rounded to 24 bits, which costs 2^-48 of what they spare; means of n terms cost less than 2^-20.
        return (1 - 2.0**-20) / n if n > self.k else 1.0


def _fit(x: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.float32]:
    """k centroids, ascending; the last one more than once where fewer will do.  float32 [k]"""
    different, occurrences = np.unique(x, return_counts=True)  # [u], ascending
    means = value = different.astype(np.float64)
    if len(value) > k:
        counts = occurrences.astype(np.float64)
        sums = value * counts
        starts = _start(means, counts, k)
        for _ in range(_PASSES):
            means = np.add.reduceat(sums, starts) / np.add.reduceat(counts, starts)
            limits = (means[1:] + means[:-1]) / 2
            # Clusters are runs of the sorted values. One that loses all of them is gone: no value is nearest to it.
            moved = np.unique(np.append(0, np.searchsorted(value, limits, side="right")))
            moved = moved[moved < len(value)]
            if np.array_equal(moved, starts):
                break
            starts = moved
        means = np.add.reduceat(sums, starts) / np.add.reduceat(counts, starts)
    return np.pad(means, (0, k - len(means)), mode="edge").astype(np.float32)


def _start(value: _Floats, count: _Floats, k: int) -> npt.NDArray[np.intp]:
    """Where clusters begin: at zero, and where splitting the worst at its mean, again and again, cuts.  [k]"""
    zero = int(np.searchsorted(value, 0.0))
    clusters = [_cluster(value, count, *ends) for ends in ((0, zero), (zero, len(value))) if ends[0] < ends[1]]
    while len(clusters) < k:  # there are more values than that, so the worst has two of them
        _, first, last, cut = clusters.pop(clusters.index(max(clusters)))
        clusters += [_cluster(value, count, first, cut), _cluster(value, count, cut, last)]
    return np.array(sorted(first for _, first, _, _ in clusters))


def _cluster(value: _Floats, count: _Floats, first: int, last: int) -> tuple[float, int, int, int]:
    """The squared error of values [first, last) to their mean, -1 if there is one value; its ends; where to cut it."""
    if last - first == 1:
        return -1.0, first, last, last
    value, count = value[first:last], count[first:last]
    mean = float((value * count).sum() / count.sum())
    cut = first + int(np.searchsorted(value, mean, side="right"))
    return float(((value - mean) ** 2 * count).sum()), first, last, min(max(cut, first + 1), last - 1)


def _limits(centroid: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The largest float32 nearer to each centroid than to the next, or as near.  [k - 1]"""
    exact = (centroid[1:].astype(np.float64) + centroid[:-1]) / 2  # of two float32: exact
    limit = exact.astype(np.float32)
    return np.where(limit > exact, np.nextafter(limit, np.float32(-np.inf)), limit)


kmeans = KMeans()
