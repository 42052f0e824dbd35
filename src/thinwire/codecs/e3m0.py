"""Four-bit floats without mantissa: a sign and a power of two below the block's largest magnitude.

    C(x)_i = sign(x_i) m 2^(c_i - 7) for c_i = 1..7, else 0        m = max_block |x|

    nearest      c_i is the nearest of these numbers, in linear distance: boundaries at 1.5 times a power of two, and at
                 2^-7 m between zero and the smallest; ties go to the larger
    stochastic   one of the two neighbours, with the probabilities that make the mean x_i

Error   nearest: at most a third of an element above 2^-6 m, at most 2^-7 m below, so
        ||x - C(x)||^2 <= (1/9 + B 2^-14) ||x||^2. stochastic: omega = 1/8 + B 2^-14, unbiased to 2^-16 of a step.
        Better than int4 where the tails are heavier than Laplace's, worse on what is nearly Gaussian.
        A block whose largest magnitude is below 2^-120 decodes to zeros.
Size    4 ceil(n/B) bytes of maxima and half a byte an element, packed block by block.
Source  Douillard et al. 2025, arXiv:2501.18512 (4-bit floats for outer gradients); the rounding at random is
        Horvath et al. 2019, arXiv:1905.10988.
Differs the paper does not say how its numbers are scaled; we use a float32 maximum a block, sent exactly.
Avoid   for pseudo-gradients and other nearly Gaussian vectors: int4 loses less there at about the same size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from thinwire.codecs.base import Codec, Traits, require
from thinwire.codecs.blocks import (
    HUGE,
    TINY,
    Rounding,
    call,
    check_options,
    contraction,
    dither,
    nibble_bytes,
    num_blocks,
    pack,
    pieces,
    require_scales,
    unit,
    unpack,
)
from thinwire.errors import PacketError
from thinwire.packet import Fields, Layout

_DEFAULT_BLOCK = 256
_MINUS_ZERO = 8  # sign bit and code 0: reserved, encoders write 0


@dataclass(frozen=True)
class E3M0(Codec):
    """One sign bit, three exponent bits.

    block     elements that share a maximum, even; B above
    rounding  "nearest" loses least in one round; "stochastic" is right in the mean over rounds and members
    """

    block: int = _DEFAULT_BLOCK
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        check_options("e3m0", self.block, self.rounding)

    def __call__(self, block: int | None = None, *, rounding: Rounding | None = None) -> E3M0:
        """The same codec with other options: `e3m0(block=64)`."""
        return replace(
            self,
            block=self.block if block is None else block,
            rounding=self.rounding if rounding is None else rounding,
        )

    @property
    def spec(self) -> str:
        options: dict[str, object] = {} if self.block == _DEFAULT_BLOCK else {"block": self.block}
        return call("e3m0", **options, **({} if self.rounding == "nearest" else {"rounding": self.rounding}))

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=self.rounding == "stochastic")

    def layout(self, n: int) -> Layout:
        return {
            "scale": (torch.float32, num_blocks(n, self.block)),
            "code": (torch.uint8, nibble_bytes(n, self.block)),
        }

    def encode(self, x: Tensor, key: int) -> Fields:
        n, device = len(x), x.device
        fields = {name: torch.empty(size, dtype=t, device=device) for name, (t, size) in self.layout(n).items()}
        for start, stop, width in pieces(n, self.block, device):
            v = dither(key, start, stop, device).view(-1, width) if self.rounding == "stochastic" else None
            rows = x[start:stop].reshape(-1, width)  # [r, B]
            ratio = rows.abs()
            largest = ratio.amax(dim=1)  # [r]
            largest.masked_fill_(largest < TINY, 0.0)
            fields["scale"][start // self.block :][: len(largest)] = largest
            ratio.div_(largest.masked_fill(largest == 0, torch.inf).unsqueeze(1))
            codes = _codes(rows, ratio, v)
            packed = pack(codes, zero=0)  # [r, B/2]
            fields["code"][start // 2 :][: packed.numel()] = packed.view(-1)
        return fields

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        require(fields, self.layout(n))
        scale, code = fields["scale"], fields["code"]
        require_scales(scale, HUGE, "scale")
        x = torch.empty(n, device=code.device)
        lowest = code.new_full((), 15)
        for start, stop, width in pieces(n, self.block, code.device):
            rows = x[start:stop].view(-1, width)  # [r, B]
            packed = code[start // 2 : (stop + 1) // 2].view(len(rows), -1)
            codes = unpack(packed, width)
            lowest = torch.minimum(lowest, (codes ^ _MINUS_ZERO).amin())
            # In 64ths of the maximum the levels are whole: 0, 1, 2, 4, .. 64. The product is exact.
            magnitude = torch.ones_like(codes).bitwise_left_shift_(codes & 7).bitwise_right_shift_(1)
            sign = (codes >> 2).bitwise_and_(2).view(torch.int8).neg_().add_(1)  # 1 or -1
            level = magnitude.view(torch.int8).mul_(sign)
            rows.copy_(level).mul_(scale[start // self.block :][: len(rows)].mul(2.0**-6).unsqueeze(1))
        if int(lowest) == 0:
            raise PacketError(f"field 'code' holds the reserved code {_MINUS_ZERO}")
        return x

    def contraction(self, n: int) -> float | None:
        nearest = self.rounding == "nearest"
        relative = (1 / 9 if nearest else 1 / 8) + self._underflow(n)
        return contraction(relative, n, self.block, keeps_largest=nearest)

    def variance(self, n: int) -> float | None:
        return 1 / 8 + self._underflow(n) if self.rounding == "stochastic" else None

    def _underflow(self, n: int) -> float:
        return min(self.block, n) * 2.0**-14


def _codes(x: Tensor, ratio: Tensor, v: Tensor | None) -> Tensor:
    """sign << 3 | c as uint8, for ratio = |x| / m in [0, 1] (overwritten) and this piece's dither v (None: nearest).

    Adding a u in [0, 1), scaled to the 23 bits of the mantissa, to the bits of a float carries into the exponent with
    probability mantissa / 2^23: the power of two above instead of the one below. Nearest is u = 1/2. Below 2^-6, the
    smallest power there is, the choice is between it and zero. Comparisons would do, but are slow on processors.
    """
    # From 1 on the element is not zero. Nearest: a * 128, exact, and not a * 64 + 1/2, which rounds up just below 1.
    level = ratio * 128 if v is None else (ratio * 64).add_(unit(v))
    some = level.clamp_(max=1).to(torch.int8)
    carry = 1 << 22 if v is None else (v.int() + (1 << 15)).mul_(128).add_(64)
    code = ratio.view(torch.int32).add_(carry).bitwise_right_shift_(23).sub_(120).clamp_(1, 7).to(torch.int8)
    sign = (x.view(torch.int32) >> 28).to(torch.int8).bitwise_and_(8)
    return code.add_(sign).mul_(some).view(torch.uint8)


e3m0 = E3M0()
