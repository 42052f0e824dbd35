"""Projection onto seeded directions: of each block, inner products with K vectors of signs that all can draw.

    c = f V^T x      V = D (h_1, ..., h_K)      C(x) = V c / d      for each block of d elements

D is a diagonal of random signs, h_i are K of the d rows of a Hadamard matrix, drawn at random: each direction is a
vector of random signs, and those of a block are at right angles to each other. f = d/K makes it unbiased.

    shrink=N    f = (d/K) / (1 + (d/K - 1) / N), of least squared error for the mean of N members that want the same;
                N=1 is the orthogonal projection, f = 1
    counts      K of a block in proportion to ||x_block|| sqrt(d), at least 1: least squared error for `k` in all
    shared      one V for all members and even counts, so that what they send adds up

Error   E||C(x) - x||^2 = (d/K - 1) ||x||^2 for each block, whatever x: 0 at K = d, the complete basis, up to float32
        rounding. Even counts: omega = n/k - 1. By norms less, unless all blocks weigh the same: at most n/(k - L) for L
        blocks. shrink=1: biased, loses 1 - K/d of a block's energy, wants ErrorFeedback; others claim nothing.
Size    4k bytes, and 4 bytes a block for its count unless shared; `projection(4096) | int8` writes k bytes.
Cost    log2 d additions an element each way, and the sorting of d numbers to draw the rows.
Source  Shu et al. 2024, arXiv:2409.06277 (Ferret), and their code; the transform is rotation.py's.
Differs theirs are K independent vectors, of error (d - 1)/K with signs (theirs are truncated normal: d/K), at K d
        multiplications; ours have (d - K)/(d - 1) of it, and are exact when complete. Blocks are equal pieces of the
        vector, of powers of two, the last one filled up with zeros (then d is what it is filled up to, and the error
        is at most that): theirs are groups of tensors. Their code divides by 1/d where entries have a variance of
        1/(3 d), so that what it decodes is a third of x, and draws the same vectors for every block; ours are new for
        each. At least 1 coefficient a block; theirs 2.
Avoid   without averaging over many members or rounds: at the sizes that it is meant for, d/K in the hundreds, what
        arrives is mostly noise, whose norm is sqrt(d/K) times that of x. topk keeps more of gradients that have peaks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thinwire.codecs.base import Codec, Traits, require
from thinwire.codecs.blocks import HUGE, SLACK, TINY, pieces, sums
from thinwire.codecs.memory import Scratch, empty, zeros
from thinwire.codecs.options import call, changed, check_flag, is_whole
from thinwire.codecs.rotation import rotate, rotate_back
from thinwire.errors import ConfigError, PacketError
from thinwire.packet import Fields, Layout
from thinwire.randomness import mix, random_bytes

_ROWS = 2  # purpose of the key's second draw; 0 is the rotation's, 1 a chain's second codec
_LEAST = 64  # elements of a block

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Projection(Codec):
    """Coefficients on directions that follow from the key.

    k          coefficients in all; K in the paper, where it is that of the block that has most
    per_block  coefficients that a block has in the mean, at least: blocks are as small as that allows
    shared     members project on the same directions: what they send adds up, and so does the noise
    shrink     0 for none, unbiased; else the number of members whose mean is taken, N above
    """

    k: int = 4096
    per_block: int = 32
    shared: bool = False
    shrink: int = 0

    values = "value"

    def __post_init__(self) -> None:
        for told, value, least in (
            (f"write {self.k!r} coefficients", self.k, 1),
            (f"give a block {self.per_block!r} coefficients", self.per_block, 1),
            (f"shrink for {self.shrink!r} members", self.shrink, 0),
        ):
            if not is_whole(value, least):
                raise ConfigError(
                    f"projection is to {told}",
                    expected=f"a whole number of at least {least}",
                    mend="projection(4096) writes 4096 coefficients in all; `thinwire codecs projection` shows more",
                )
        check_flag("projection", "with shared", self.shared)

    @property
    def spec(self) -> str:
        return call("projection", repr(self.k), **changed(self, "per_block", "shared", "shrink"))

    @property
    def traits(self) -> Traits:
        return Traits(
            unbiased=self.shrink == 0, linear=self.shared, reencodes=False, wants_feedback=self.shrink == 1
        )  # fmt: skip

    def layout(self, n: int) -> Layout:
        _, widths = self._blocks(n)
        value = {"value": (torch.float32, min(self.k, int(widths.sum())))}
        return value if self.shared else {"count": (torch.int32, len(widths)), **value}

    def encode(self, x: Tensor, key: int) -> Fields:
        block, widths = self._blocks(len(x))
        total = self.layout(len(x))["value"][1]
        even = self.shared or len(widths) < 2
        counts = apportion(widths if even else _norms(x, block) * np.sqrt(widths), widths, total)
        ends = counts.cumsum()
        place = _places(counts, block, widths, key, x.device)
        factor = torch.from_numpy(self._factor(widths / counts)).float().to(x.device)
        factor = factor.repeat_interleave(torch.from_numpy(counts).to(x.device))
        value = empty(total, torch.float32, x.device)
        filled = torch.nn.functional.pad(x, (0, int(widths.sum()) - len(x)))
        for start, stop, rotated in rotate(filled, block, 1, key, Scratch(x.device)):
            first, last = start // block, -(-stop // block)
            a, b = int(ends[first] - counts[first]), int(ends[last - 1])
            value[a:b] = rotated.index_select(0, place[a:b] - start)
        value.mul_(factor).clamp_(-HUGE, HUGE)
        return (
            {"value": value} if self.shared else {"count": torch.from_numpy(counts).int().to(x.device), "value": value}
        )

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        require(fields, self.layout(n))
        block, widths = self._blocks(n)
        value = fields["value"]
        counts = apportion(widths, widths, len(value)) if self.shared else _read(fields["count"], widths, len(value))
        x = zeros(int(widths.sum()), device=value.device)
        x[_places(counts, block, widths, key, value.device)] = value
        scratch = Scratch(value.device)
        for start, stop, _ in pieces(len(x), block, value.device):
            rotate_back(x[start:stop], start, block, 1, key, scratch)
        return x[:n]

    def contraction(self, n: int) -> float | None:
        """By norms, K_l/d_l >= (k - L) norm_l / (d_l norms): least is kept where all norms are equal (Chebyshev)."""
        if self.shrink != 1:
            return None
        block, widths = self._blocks(n)
        k, count = self.layout(n)["value"][1], len(widths)
        if self.shared or count < 2:
            return float((apportion(widths, widths, k) / widths).min(initial=1.0)) - SLACK
        return max((k - count) / (count * block), 1 / block) - SLACK

    def variance(self, n: int) -> float | None:
        if self.shrink:
            return None
        _, widths = self._blocks(n)
        k, count = self.layout(n)["value"][1], len(widths)
        if self.shared or count < 2:
            return float((widths / apportion(widths, widths, k)).max(initial=1.0)) - 1 + SLACK
        worst = float(widths.max()) - 1
        return min(worst, float(widths.sum()) / (k - count)) + SLACK if k > count else worst + SLACK

    def _blocks(self, n: int) -> tuple[int, Counts]:
        """Elements of a block, and of each block, the last one filled up."""
        block = _LEAST
        while block < n and -(-n // block) * self.per_block > self.k:
            block *= 2
        widths = [block] * (n // block) + ([1 << (n % block - 1).bit_length()] if n % block else [])
        return block, np.array(widths, dtype=np.int64)

    def _factor(self, share: Floats) -> Floats:
        """f, from d/K."""
        factor: Floats = share / (1 + (share - 1) / self.shrink) if self.shrink else share
        return factor


def apportion(weights: NDArray[np.generic], most: Counts, total: int) -> Counts:
    """Whole numbers from 1 to `most` that add up to `total`, above 1 in proportion to weights as far as they may.

    weights, most  [L]; weights not negative. With whole ones every step is exact or rounded once: members agree
    total          from L to the sum of `most`
    """
    counts, left, free = np.ones_like(most), total - len(most), most > 1
    weights = weights.astype(np.float64)
    share = np.zeros(len(most))
    while free.any():
        if not weights[free].sum() > 0:
            weights = most.astype(np.float64)
        share = left * weights / weights[free].sum()
        full = free & (share >= most - 1)
        if not full.any():
            break
        counts[full] = most[full]
        left -= int((most[full] - 1).sum())
        free &= ~full
    whole = np.where(free, np.floor(share * (1 - 2.0**-40)), 0).astype(np.int64)
    counts += whole
    left -= int(whole.sum())
    nearest = np.argsort(np.where(free, whole - share, np.inf), kind="stable")[:left]
    counts[nearest] += 1
    return counts


def _norms(x: Tensor, block: int) -> Floats:
    """Euclidean norm of each block of x, the last one may be short: [L], the same on every device."""
    scratch, found = Scratch(x.device), []
    for start, stop, width in pieces(len(x), block, x.device):
        rows = scratch("rows", ((stop - start) // width, width)).copy_(x[start:stop].view(-1, width))
        largest = rows.abs().amax(dim=1)
        largest.masked_fill_(largest < TINY, 0.0)
        rows.div_(largest.masked_fill(largest == 0, torch.inf).unsqueeze(1))  # squares neither overflow nor vanish
        found.append(sums(rows.square_()).double().sqrt_() * largest.double())
    return torch.cat(found).cpu().numpy() if found else np.zeros(0)


def _read(count: Tensor, widths: Counts, total: int) -> Counts:
    counts: Counts = count.cpu().numpy().astype(np.int64)
    if bool((counts < 1).any() | (counts > widths).any()) or int(counts.sum()) != total:
        raise PacketError(
            "field 'count' does not share the coefficients out among the blocks",
            expected=f"numbers from 1 to the elements of a block, {total} together",
        )
    return counts


def _places(counts: Counts, block: int, widths: Counts, key: int, device: torch.device) -> Tensor:
    """Where each coefficient is in the transformed vector, block by block: int64 [k].

    All blocks draw from one order of rows: it is their signs that make directions of different blocks independent.
    """
    if not len(counts):
        return torch.zeros(0, dtype=torch.int64, device=device)
    number = np.repeat(np.arange(len(counts)), counts)  # [k] of the block
    turn = np.arange(len(number)) - (counts.cumsum() - counts)[number]  # [k] within it
    place, turns = (torch.from_numpy(part).to(device) for part in (number * block, turn))
    cut, last = len(number) - int(counts[-1]), int(widths[-1])
    words = random_bytes(mix(key, _ROWS), 4 * block, device).view(torch.int32).long()
    order = words.bitwise_left_shift_(31).add_(torch.arange(block, device=device)).argsort()  # no two are equal
    place[:cut] += order.index_select(0, turns[:cut])
    place[cut:] += order[order < last].index_select(0, turns[cut:])
    return place


projection = Projection
