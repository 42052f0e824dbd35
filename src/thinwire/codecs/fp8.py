"""Eight-bit floats with one float32 scale a block: E4M3 (more digits) and E5M2 (more range).

    C(x)_i = s r(x_i / s)        s = max_block |x| / F, r to the nearest 8-bit float, half to even

    e4m3    largest F = 448, 3 bits of mantissa, steps of 2^-9 below 2^-6
    e5m2    largest F = 57344, 2 bits of mantissa, steps of 2^-16 below 2^-14

Error   |x_i - C(x)_i| <= 2^-4 |x_i| (e4m3), 2^-3 |x_i| (e5m2), or half the smallest step where that is more:
        ||x - C(x)||^2 <= (r^2 + B (step / 2F)^2) ||x||^2. Nothing becomes infinite: the largest is F by construction.
        A block whose largest magnitude is below 2^-120 decodes to zeros.
Size    4 ceil(n/B) bytes of scales, n bytes of codes.
Source  Micikevicius et al. 2022, arXiv:2209.05433 (both formats); OCP 8-bit Floating Point Specification 1.0, 2023.
Differs the framework's casts make the codes, which are sent as bytes; they are read with integer arithmetic, since the
        framework reads E4M3 many times slower than that. A scale a block, where the paper has one a tensor.
Avoid   where int8 does: at the same size that loses a tenth as much of gradients, unless most of a block is far below
        its largest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from thinwire.codecs.base import Codec, Traits, require
from thinwire.codecs.blocks import (
    HUGE,
    check_options,
    contraction,
    divisor,
    flushed,
    num_blocks,
    pieces,
    require_scales,
)
from thinwire.codecs.memory import Scratch, empty
from thinwire.codecs.memory import fields as fresh
from thinwire.codecs.options import altered, call, changed
from thinwire.errors import ConfigError, PacketError
from thinwire.packet import Fields, Layout

Format = Literal["e4m3", "e5m2"]

#: Bits of mantissa, exponent of the smallest normal number, code of the largest finite one.
_FORMATS: dict[str, tuple[int, int, int]] = {"e4m3": (3, -6, 0x7E), "e5m2": (2, -14, 0x7B)}


@dataclass(frozen=True)
class FP8(Codec):
    """One byte an element and a scale a block.

    format  "e4m3" or "e5m2"
    block   elements that share a scale, even; B above
    """

    format: Format = "e4m3"
    block: int = 256

    def __post_init__(self) -> None:
        if self.format not in _FORMATS:
            raise ConfigError(
                f"fp8 is to have the format {self.format!r}",
                expected="format='e4m3' or format='e5m2'",
                mend="leave it out for e4m3, which loses four times less of what has a scale to every block",
            )
        check_options("fp8", self.block, "nearest")

    def __call__(self, format: Format | None = None, *, block: int | None = None) -> FP8:
        """The same codec with other options: `fp8('e5m2')`."""
        return altered(self, format=format, block=block)

    @property
    def spec(self) -> str:
        return call("fp8", **changed(self))

    @property
    def traits(self) -> Traits:
        return Traits()

    def layout(self, n: int) -> Layout:
        return {"scale": (torch.float32, num_blocks(n, self.block)), "code": (torch.uint8, n)}

    def encode(self, x: Tensor, key: int) -> Fields:
        n, device = len(x), x.device
        fields, scratch = fresh(self.layout(n), device), Scratch(device)
        for start, stop, width in pieces(n, self.block, device):
            rows = x[start:stop].reshape(-1, width)  # [r, B]
            work = scratch("work", rows.shape)
            largest = flushed(torch.abs(rows, out=work).amax(dim=1)).clamp_(max=(1 - 2.0**-22) * HUGE)
            scale = largest.div_(torch.full_like(largest, self._largest))  # by a tensor: see Integer
            fields["scale"][start // self.block :][: len(scale)] = scale
            torch.div(rows, divisor(scale), out=work).add_(0.0)  # minus zero becomes zero
            # At most F and a rounding, which is far from the middle between F and what is none.
            fields["code"][start:stop].view_as(work).view(self._dtype).copy_(work)
        return fields

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        require(fields, self.layout(n))
        scale, code = fields["scale"], fields["code"]
        require_scales(scale, HUGE / self._largest, "scale")
        mantissa, lowest, finite = _FORMATS[self.format]
        x, scratch = empty(n, torch.float32, code.device), Scratch(code.device)
        highest = code.new_zeros(())
        for start, stop, width in pieces(n, self.block, code.device):
            rows = x[start:stop].view(-1, width)  # [r, B]
            codes = code[start:stop].view(-1, width)
            magnitude = torch.bitwise_and(codes, 0x7F, out=scratch("magnitude", codes.shape, torch.uint8))
            highest = torch.maximum(highest, magnitude.amax())
            # As the upper bits of a 16-bit float, whose smallest normal number is 2^-14.
            sign = scratch("sign", codes.shape, torch.int16).copy_(codes).bitwise_right_shift_(7)
            half = scratch("half", codes.shape, torch.int16).copy_(magnitude)
            half.bitwise_left_shift_(10 - mantissa).add_(sign, alpha=-(1 << 15))
            rows.copy_(half.view(torch.float16)).mul_(2.0 ** (lowest + 14))
            rows.mul_(scale[start // self.block :][: len(rows)].unsqueeze(1))
        if int(highest) > finite:
            raise PacketError(f"field 'code' holds {int(highest):#04x}, which is no finite number")
        return x

    def contraction(self, n: int) -> float | None:
        mantissa, lowest, _ = _FORMATS[self.format]
        underflow = min(self.block, n) * (2.0 ** (lowest - mantissa - 1) / self._largest) ** 2
        return contraction(4.0 ** -(mantissa + 1) + underflow, n, self.block, of_largest=0.0)

    @property
    def _dtype(self) -> torch.dtype:
        return {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[self.format]

    @property
    def _largest(self) -> float:
        return {"e4m3": 448.0, "e5m2": 57344.0}[self.format]  # F above


fp8 = FP8()
