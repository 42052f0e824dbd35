"""Floats without mantissa, of 3, 4 or 5 bits: a sign and a power of two below the block's largest magnitude.

    C(x)_i = sign(x_i) m 2^(c_i - T) for c_i = 1..T, else 0        m = max_block |x|, T = 2^e - 1

    e2m0: e = 2, T = 3        e3m0: e = 3, T = 7        e4m0: e = 4, T = 15

    nearest      c_i is the nearest of these numbers, in linear distance: boundaries at 1.5 times a power of two, and at
                 2^-T m between zero and the smallest; ties go to the larger
    stochastic   one of the two neighbours, with the probabilities that make the mean x_i

Error   nearest: at most a third of an element above 2^(1-T) m, at most 2^-T m below, so
        ||x - C(x)||^2 <= (1/9 + B 4^-T) ||x||^2. stochastic: omega = 1/8 + B 4^-T, unbiased to 2^-16 of a step.
        Better than int4 where the tails are heavier than Laplace's, worse on what is nearly Gaussian.
        A block whose largest magnitude is below 2^-120 (e4m0: 2^-112) decodes to zeros.
Size    4 ceil(n/B) bytes of maxima; 1 + e bits an element, packed block by block.
Source  Douillard et al. 2025, arXiv:2501.18512 (4-bit floats for outer gradients); the rounding at random is
        Horvath et al. 2019, arXiv:1905.10988.
Differs the paper does not say how its numbers are scaled; we use a float32 maximum a block, sent exactly.
Avoid   for pseudo-gradients and other nearly Gaussian vectors: int4 loses less there at about the size of e3m0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.codecs.base import Codec, Traits, require
from thinwire.codecs.blocks import (
    HUGE,
    TINY,
    Rounding,
    carry,
    check_options,
    contraction,
    dither,
    divisor,
    num_blocks,
    pieces,
    require_scales,
    unit,
)
from thinwire.codecs.memory import Scratch, empty
from thinwire.codecs.memory import fields as fresh
from thinwire.codecs.options import altered, call, changed
from thinwire.codecs.planar import pack, packed_bytes, row_multiple, unpack
from thinwire.errors import ConfigError, PacketError
from thinwire.packet import Fields, Layout


@dataclass(frozen=True)
class Log(Codec):
    """One sign bit, two to four exponent bits; see `e2m0`, `e3m0`, `e4m0`.

    block     elements that share a maximum, a multiple of what fills whole bytes; B above
    rounding  "nearest" loses least in one round; "stochastic" is right in the mean over rounds and members
    """

    exponent_bits: int
    block: int = 256
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        if self.exponent_bits not in (2, 3, 4):
            raise ConfigError(
                f"Log of {self.exponent_bits!r} exponent bits", expected="2, 3 or 4", mend="use e2m0, e3m0 or e4m0"
            )
        check_options(self._name, self.block, self.rounding, multiple=row_multiple(self._bits))

    def __call__(self, block: int | None = None, *, rounding: Rounding | None = None) -> Log:
        """The same codec with other options: `e3m0(block=64)`."""
        return altered(self, block=block, rounding=rounding)

    @property
    def _name(self) -> str:
        return f"e{self.exponent_bits}m0"

    @property
    def spec(self) -> str:
        return call(self._name, **changed(self))

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=self.rounding == "stochastic")

    def layout(self, n: int) -> Layout:
        return {
            "scale": (torch.float32, num_blocks(n, self.block)),
            "code": (torch.uint8, packed_bytes(n, self.block, self._bits)),
        }

    def encode(self, x: Tensor, key: int) -> Fields:
        n, device, bits = len(x), x.device, self._bits
        fields, scratch = fresh(self.layout(n), device), Scratch(device)
        for start, stop, width in pieces(n, self.block, device):
            rows = x[start:stop].reshape(-1, width)  # [r, B]
            v = dither(key, start, rows.shape, scratch) if self.rounding == "stochastic" else None
            ratio = torch.abs(rows, out=scratch("ratio", rows.shape))
            largest = ratio.amax(dim=1)  # [r]
            largest.masked_fill_(largest < self._tiny, 0.0)
            fields["scale"][start // self.block :][: len(largest)] = largest
            ratio.div_(divisor(largest))
            codes = self._codes(rows, ratio, v, scratch)
            pack(codes, fields["code"], (start, n), self.block, bits, 0, scratch)
        return fields

    def _codes(self, x: Tensor, ratio: Tensor, v: Tensor | None, scratch: Scratch) -> Tensor:
        """sign << e | c as uint8, for ratio = |x| / m in [0, 1] (overwritten) and dither v (None: nearest).

        A u in (0, 1) added to a float's bits carries into the exponent, see blocks.carry; nearest is u = 1/2. Below the
        smallest power there is, the choice is between it and zero. Comparisons would do, but are slow on processors.
        """
        top = self._top
        # From 1 on the element is not zero. Nearest: a * 2^T, exact, and not a * 2^(T-1) + 1/2, which rounds up just
        # below 1.
        level = torch.mul(ratio, 2.0 ** (top if v is None else top - 1), out=scratch("level", ratio.shape))
        if v is not None:
            level.add_(unit(v, scratch))
        some = scratch("some", ratio.shape, torch.int8).copy_(level.clamp_(max=1))
        half = 1 << 22 if v is None else carry(v, scratch)
        exponent = ratio.view(torch.int32).add_(half).bitwise_right_shift_(23).sub_(127 - top).clamp_(1, top)
        code = scratch("code", ratio.shape, torch.int8).copy_(exponent)
        negative = torch.lt(x, 0, out=scratch("negative", x.shape, torch.bool)).view(torch.int8)
        return code.add_(negative, alpha=top + 1).mul_(some).view(torch.uint8)

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        require(fields, self.layout(n))
        scale, code = fields["scale"], fields["code"]
        require_scales(scale, HUGE, "scale")
        x, scratch, top = empty(n, torch.float32, code.device), Scratch(code.device), self._top
        whole = torch.int8 if top < 8 else torch.int16  # holds 2^(T-1), and what it is shifted from
        lowest = code.new_full((), 255)
        for start, stop, width in pieces(n, self.block, code.device):
            rows = x[start:stop].view(-1, width)  # [r, B]
            codes = unpack(code, (start, n), (len(rows), width), self.block, self._bits, scratch)
            minus_zero = torch.bitwise_xor(codes, top + 1, out=scratch("minus zero", codes.shape, torch.uint8))
            lowest = torch.minimum(lowest, minus_zero.amin())
            # In units of the smallest power the levels are whole: 0, 1, 2, 4, ... The product is exact.
            sign = scratch("sign", codes.shape, whole).copy_(codes >> self.exponent_bits).mul_(-2).add_(1)
            level = scratch("level", codes.shape, whole).fill_(1)
            level.bitwise_left_shift_(codes.bitwise_and_(top)).bitwise_right_shift_(1).bitwise_and_((1 << top) - 1)
            smallest = scale[start // self.block :][: len(rows)] * 2.0 ** (1 - top)
            rows.copy_(level.mul_(sign)).mul_(smallest.unsqueeze(1))
        if int(lowest) == 0:
            raise PacketError(f"field 'code' holds the reserved code {top + 1}")
        return x

    def contraction(self, n: int) -> float | None:
        nearest = self.rounding == "nearest"
        relative = (1 / 9 if nearest else 1 / 8) + self._underflow(n)
        return contraction(relative, n, self.block, of_largest=1.0 if nearest else 0.0)

    def variance(self, n: int) -> float | None:
        return 1 / 8 + self._underflow(n) if self.rounding == "stochastic" else None

    def _underflow(self, n: int) -> float:
        return min(self.block, n) * 4.0**-self._top

    @property
    def _bits(self) -> int:
        return 1 + self.exponent_bits

    @property
    def _top(self) -> int:
        return (1 << self.exponent_bits) - 1  # T above, the largest c

    @property
    def _tiny(self) -> float:
        return max(TINY, 2.0 ** (self._top - 1 - 126))  # so that the smallest level is no denormal number


e2m0, e3m0, e4m0 = (Log(bits) for bits in (2, 3, 4))
