"""Positions of the k largest magnitudes, ascending; of equals the first, so that all devices choose alike.

The order is that of the bits without the sign. A vector that is large has few candidates: a threshold from a sample,
set low enough for a few more than k to pass, leaves those among which the k are found; the outcome is the same.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from thinwire.codecs.blocks import pieces

_UNSIGNED = 0x7FFFFFFF  # all bits of a float32 but its sign; what is left is ordered as the magnitudes are
_SAMPLE = 1024  # entries of a sample that are to pass: their number errs by 3 %, so that few more than k pass in vain
_PIECE = 1 << 18  # elements scanned at once


def largest(x: Tensor, k: int) -> Tensor:
    """Of a vector; int64 [min(k, n)]."""
    if k >= len(x):
        return torch.arange(len(x), device=x.device)
    candidates = _candidates(x, k) if x.device.type == "cpu" else None
    if candidates is None:
        return _largest_in_rows(_magnitude(x).unsqueeze(0), k)
    magnitude = _magnitude(x.index_select(0, candidates))
    return candidates.index_select(0, _largest_in_rows(magnitude.unsqueeze(0), k))


def largest_in_rows(x: Tensor, k: int) -> Tensor:
    """Of each row, counted from its beginning.  [r, w] to int64 [r, k]"""
    begin = torch.arange(0, x.numel(), x.shape[1], device=x.device)
    return _largest_in_rows(_magnitude(x), k).view(-1, k).sub_(begin.unsqueeze(1))


def largest_in_blocks(x: Tensor, share: float, block: int) -> Tensor:
    """Of each block of a vector, ceil(share * its length), counted from the vector's beginning; int64."""
    found = [
        _largest_in_rows(_magnitude(x[start:stop]).view(-1, width), math.ceil(share * width)) + start
        for start, stop, width in pieces(len(x), block, x.device)
    ]
    return torch.cat(found)


def _magnitude(x: Tensor) -> Tensor:
    """Integers in the order of the magnitudes: the bits without the sign.  int32 [n]"""
    return x.view(torch.int32) & _UNSIGNED


def _largest_in_rows(magnitude: Tensor, k: int) -> Tensor:
    """Places of the k largest of each row in the rows laid end to end.  int32 [r, w] to int64 [r k]"""
    kth = _kth_largest(magnitude, k)  # [r, 1]
    found = _where(magnitude >= kth)
    if len(found) > len(magnitude) * k:  # there are more that equal the k-th
        above, ties = magnitude > kth, magnitude == kth
        found = _where(above | ties & (ties.cumsum(dim=1) <= k - above.sum(dim=1, keepdim=True)))
    return found


def _kth_largest(magnitude: Tensor, k: int) -> Tensor:
    place = magnitude.shape[1] - k
    if magnitude.device.type == "cpu":  # numpy's, here and below, is several times as fast as torch's
        return torch.from_numpy(np.partition(magnitude.numpy(), place, axis=1)[:, place, None])
    return magnitude.kthvalue(place + 1, dim=1, keepdim=True).values


def _where(mask: Tensor) -> Tensor:
    """Places of what is true, ascending.  bool [r, w] to int64"""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.view(-1).nonzero().squeeze(1)


def _candidates(x: Tensor, k: int) -> Tensor | None:
    """Positions, ascending, that the k largest and the first of equals are among; None if that would be too many."""
    bits = x.numpy().view(np.int32)
    n = len(bits)
    if n < 1 << 14 or 8 * k > n:
        return None
    step = max(16, k // _SAMPLE) | 1  # odd: sizes of layers are even
    sample = bits[::step] & _UNSIGNED
    due = len(sample) * k / n
    rank = min(len(sample), math.ceil(due + 4 * math.sqrt(due) + 4))  # 4 standard errors to the safe side
    threshold = int(np.partition(sample, len(sample) - rank)[len(sample) - rank])
    found = _at_least(bits, max(1, threshold))
    if len(found) >= k:
        return torch.from_numpy(found)
    if threshold > 0:  # the sample was unlucky
        return None
    zeros = np.flatnonzero((bits[:k] & _UNSIGNED) == 0)  # as many as are lacking are among the first k
    return torch.from_numpy(np.sort(np.concatenate([found, zeros])))


def _at_least(bits: np.ndarray, threshold: int) -> np.ndarray:
    """Where the magnitude is no less, in pieces that stay in the cache."""
    magnitude, passed = np.empty(_PIECE, np.int32), np.empty(_PIECE, np.bool_)
    found = []
    for start in range(0, len(bits), _PIECE):
        piece = bits[start : start + _PIECE]
        np.bitwise_and(piece, _UNSIGNED, out=magnitude[: len(piece)])
        np.greater_equal(magnitude[: len(piece)], threshold, out=passed[: len(piece)])
        found.append(np.flatnonzero(passed[: len(piece)]) + start)
    return np.concatenate(found)
