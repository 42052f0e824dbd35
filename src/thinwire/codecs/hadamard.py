"""DRIVE and EDEN: a random rotation, then each element as one of 2^b levels that suit a Gaussian.

    z = H D x,   q_i = nearest centroid to z_i sqrt(d) / ||z||,   C(x) = D H (S q)        for each block of d elements

    unbiased       S = ||z||^2 / <q, z>      the decoded block has x's projection on it
    least_squares  S = <q, z> / ||q||^2      the decoded block is as near to x as q allows

The centroids are Lloyd's and Max's for a Gaussian; one bit is its sign. The rotation is rotation.py's.

Error   least_squares: E||x - C(x)||^2 <= (1 - delta) ||x||^2 for every x, delta = 1/2, 0.67, 0.89, 0.96 for b = 1..4:
        z_i are sums of random signs, so E|z_i| >= sqrt(E z_i^2 / 2) (1 bit), and E z_i^4 <= 3 (E z_i^2)^2 under a
        quartic that lies above the quantiser's error (2 to 4 bits). On large blocks of no special structure the error
        is a Gaussian's: 0.363, 0.1175, 0.0345, 0.0095 of ||x||^2; unbiased: 0.571, 0.133, 0.0357, 0.0096.
        unbiased holds for a uniformly random rotation. A Hadamard matrix with random signs is not one: at 1 bit, a
        vector of few large elements keeps a bias of some per cent however many members are averaged; two rounds make
        it small, and so do 3 bits. So this codec does not declare it.
Size    b bits an element, and 4 bytes a block; the last n mod B elements are blocks of the powers of two in it.
Cost    the rotation's, and 2^(b-1) comparisons an element.
Source  Vargaftik et al. 2021, arXiv:2105.08339 (DRIVE); Vargaftik et al. 2022, arXiv:2108.08842 (EDEN); the levels:
        Max 1960 (IRE Trans. Inf. Theory 6). The bound at 1 bit: Szarek 1976 (Studia Math. 58).
Differs blocks of 4096 instead of one padded transform. Scales are float32, of z times the rotation's power of two.
        A block whose largest rotated element is below 2^-120 decodes to zeros.
Avoid   for sparse vectors, whose zeros become noise, at one bit without averaging over many members or feedback.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from thinwire.codecs.base import Codec, Traits, require
from thinwire.codecs.blocks import HUGE, SLACK, pieces, require_scales, sums
from thinwire.codecs.memory import Scratch, empty, fields
from thinwire.codecs.options import altered, call, changed, is_whole
from thinwire.codecs.planar import pack, packed_bytes, unpack
from thinwire.codecs.rotation import (
    DEFAULT_BLOCK,
    check_rotation,
    num_parts,
    parts,
    rotate,
    rotate_back,
)
from thinwire.errors import ConfigError
from thinwire.packet import Fields, Layout

Scale = Literal["unbiased", "least_squares"]

#: Levels above zero of the quantiser of least mean squared error for a standard normal variable.
CENTROIDS = {
    1: (0.79788,),
    2: (0.45278, 1.51042),
    3: (0.24509, 0.75601, 1.34391, 2.15195),
    4: (0.12840, 0.38805, 0.65676, 0.94234, 1.25623, 1.61805, 2.06902, 2.73259),
}
#: (a, b, c): a + b u^2 + c u^4 >= squared error of u's nearest level, for all u. The bound is a + b + 3c.
MAJORANTS = {2: (0.2055, 0.0574, 0.0204), 3: (0.0626, 0.0076, 0.0130), 4: (0.0222, -0.0084, 0.0087)}
#: Below this a rotated block is zero: 2^-120 in x's own units, at the smallest power of two that rotation.py uses.
_TINY = 2.0**-127


@dataclass(frozen=True)
class Hadamard(Codec):
    """Rotate, then quantise to the levels of a Gaussian.

    bits    an element, 1 to 4
    block   elements rotated and scaled together, a power of two; B above
    scale   "unbiased" is right in the mean over many members; "least_squares" loses least in one packet
    rounds  of the rotation, 1 or 2; two are for heavy tails at 1 bit
    """

    bits: int = 1
    block: int = DEFAULT_BLOCK
    scale: Scale = "unbiased"
    rounds: int = 1

    def __post_init__(self) -> None:
        if not is_whole(self.bits, 1, len(CENTROIDS)):
            raise ConfigError(
                f"hadamard is to write {self.bits!r} bits an element",
                expected="1, 2, 3 or 4",
                mend="for 8 bits use rotation | int8; more bits need no levels of a Gaussian",
            )
        check_rotation("hadamard", self.block, self.rounds)
        if self.scale not in get_args(Scale):
            raise ConfigError(
                f"hadamard is to scale {self.scale!r}",
                expected="scale='unbiased' or scale='least_squares'",
                mend="leave it out for unbiased; least_squares is for error feedback and for a single packet",
            )

    def __call__(
        self, bits: int | None = None, *, block: int | None = None, scale: Scale | None = None,
        rounds: int | None = None,
    ) -> Hadamard:  # fmt: skip
        """The same codec with other options: `hadamard(2)`."""
        return altered(self, bits=bits, block=block, scale=scale, rounds=rounds)

    @property
    def spec(self) -> str:
        return call("hadamard", bits=self.bits, **changed(self, "block", "scale", "rounds"))

    @property
    def traits(self) -> Traits:
        return Traits()

    def layout(self, n: int) -> Layout:
        return {
            "scale": (torch.float32, num_parts(n, self.block)),
            "code": (torch.uint8, packed_bytes(n, self.block, self.bits)),
        }

    def encode(self, x: Tensor, key: int) -> Fields:
        n, device = len(x), x.device
        written, scratch, blocks = fields(self.layout(n), device), Scratch(device), 0
        for start, stop, rotated in rotate(x, self.block, self.rounds, key, scratch):
            codes = scratch("code", (stop - start,), torch.uint8)
            for begin, end, width in parts(stop - start, self.block):
                z, places = rotated[begin:end].view(-1, width), codes[begin:end].view(-1, width)
                written["scale"][blocks : blocks + len(z)] = self._quantise(z, places, scratch)
                blocks += len(z)
            rows = codes.view(-1, min(self.block, stop - start))
            pack(rows, written["code"], (start, n), self.block, self.bits, 0, scratch)
        return written

    def _quantise(self, z: Tensor, codes: Tensor, scratch: Scratch) -> Tensor:
        """S of each row of z [r, d], which is overwritten; writes their codes: sign, then place among the centroids."""
        codes.copy_((z.view(torch.int32) >> 31).bitwise_and_(1)).bitwise_left_shift_(self.bits - 1)
        u = z.abs_()
        largest = u.amax(dim=1)  # [r]
        largest.masked_fill_(largest < _TINY, 0.0)
        u.div_(largest.masked_fill(largest == 0, torch.inf).unsqueeze(1))  # squares of it neither overflow nor vanish
        work = scratch("work", u.shape)
        square = sums(torch.mul(u, u, out=work))
        root = square.div(torch.full_like(square, u.shape[1])).sqrt_()  # ||u|| / sqrt(d)
        centroids = CENTROIDS[self.bits]
        place = scratch("place", codes.shape, torch.uint8).zero_()
        above = scratch("above", codes.shape, torch.bool)
        for low, high in itertools.pairwise(centroids):
            place.add_(torch.gt(u, (root * ((low + high) / 2)).unsqueeze(1), out=above).view(torch.uint8))
        codes |= place
        q = torch.tensor(centroids, device=z.device).index_select(0, place.view(-1).int()).view_as(u)
        along = sums(torch.mul(q, u, out=work))
        scale = square.div_(along) if self.scale == "unbiased" else along.div_(sums(q.mul_(q)))
        return scale.mul_(largest).masked_fill_(largest == 0, 0.0)

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        require(fields, self.layout(n))
        scale, code = fields["scale"], fields["code"]
        require_scales(scale, HUGE / 4, "scale")
        centroids = torch.tensor(CENTROIDS[self.bits], device=code.device)
        levels = torch.cat([centroids, -centroids])
        x, scratch, blocks = empty(n, torch.float32, code.device), Scratch(code.device), 0
        for start, stop, width in pieces(n, self.block, code.device):
            piece, shape = x[start:stop], ((stop - start) // width, width)
            codes = unpack(code, (start, n), shape, self.block, self.bits, scratch)
            torch.index_select(levels, 0, codes.reshape(-1).int(), out=piece)
            for begin, end, part in parts(stop - start, self.block):
                rows = piece[begin:end].view(-1, part)
                rows.mul_(scale[blocks : blocks + len(rows)].unsqueeze(1))
                blocks += len(rows)
            rotate_back(piece, start, self.block, self.rounds, key, scratch)
        return x

    def contraction(self, n: int) -> float | None:
        if self.scale == "unbiased":
            return None
        if self.bits == 1:
            return 1 / 2 - SLACK
        a, b, c = MAJORANTS[self.bits]
        return 1 - (a + b + 3 * c) - SLACK


hadamard = Hadamard()
