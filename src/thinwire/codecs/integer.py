"""Blockwise symmetric integers: int8 and int4 with one float32 scale a block.

    C(x)_i = s q_i        s = max_block |x| / L,   q_i = round(x_i / s),   L = 2^(bits-1) - 1

    nearest      half to even
    stochastic   floor(x_i / s + u), u uniform in (0, 1)

Error   nearest: |x_i - C(x)_i| <= s/2, so ||x - C(x)||^2 <= B / (4 L^2) ||x||^2, and never more than (1 - 1/B) ||x||^2.
        stochastic: unbiased (to 2^-16 of a step, see blocks.dither), variance <= s^2/4 an element: omega = B / (4 L^2).
        A block whose largest magnitude is below 2^-120 decodes to zeros.
Size    4 ceil(n/B) bytes of scales; n bytes of codes (int8), or half a byte a code, packed block by block (int4).
Source  Dettmers 2015, arXiv:1511.04561 (8 bits); Dettmers et al. 2021, arXiv:2110.02861 (blockwise absmax);
        stochastic rounding as in Alistarh et al. 2017, arXiv:1610.02132, with the block's maximum as its norm.
Avoid   on vectors with a few large entries in every block: they take the whole grid, and the rest becomes zero.
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
from thinwire.errors import ConfigError, PacketError
from thinwire.packet import Fields, Layout

_DEFAULT_BLOCK = {8: 256, 4: 64}


@dataclass(frozen=True)
class Integer(Codec):
    """Signed integers of 8 or 4 bits; see `int8` and `int4`.

    block     elements that share a scale, even; B above
    rounding  "nearest" loses least in one round; "stochastic" is right in the mean over rounds and members
    """

    bits: int
    block: int
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        if self.bits not in _DEFAULT_BLOCK:
            raise ConfigError(f"Integer of {self.bits!r} bits", expected="8 or 4 bits", mend="use int8 or int4")
        check_options(self._name, self.block, self.rounding)

    def __call__(self, block: int | None = None, *, rounding: Rounding | None = None) -> Integer:
        """The same codec with other options: `int8(block=64)`."""
        return replace(
            self,
            block=self.block if block is None else block,
            rounding=self.rounding if rounding is None else rounding,
        )

    @property
    def _name(self) -> str:
        return f"int{self.bits}"

    @property
    def _largest_code(self) -> int:
        return (1 << (self.bits - 1)) - 1  # L above

    @property
    def spec(self) -> str:
        options: dict[str, object] = {} if self.block == _DEFAULT_BLOCK[self.bits] else {"block": self.block}
        return call(self._name, **options, **({} if self.rounding == "nearest" else {"rounding": self.rounding}))

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=self.rounding == "stochastic")

    def layout(self, n: int) -> Layout:
        code = (torch.int8, n) if self.bits == 8 else (torch.uint8, nibble_bytes(n, self.block))
        return {"scale": (torch.float32, num_blocks(n, self.block)), "code": code}

    def encode(self, x: Tensor, key: int) -> Fields:
        n, device = len(x), x.device
        fields = {name: torch.empty(size, dtype=t, device=device) for name, (t, size) in self.layout(n).items()}
        for start, stop, width in pieces(n, self.block, device):
            v = dither(key, start, stop, device).view(-1, width) if self.rounding == "stochastic" else None
            rows = x[start:stop].reshape(-1, width)  # [r, B]
            work = rows.abs()
            scale = self._scales(work.amax(dim=1))  # [r]
            fields["scale"][start // self.block :][: len(scale)] = scale
            torch.div(rows, scale.masked_fill(scale == 0, torch.inf).unsqueeze(1), out=work)
            self._round(work, v)
            codes = work.to(torch.int8)
            if self.bits == 8:
                fields["code"][start:stop] = codes.view(-1)
            else:
                packed = pack(codes.add_(8).view(torch.uint8), zero=8)  # [r, B/2]
                fields["code"][start // 2 :][: packed.numel()] = packed.view(-1)
        return fields

    def _scales(self, largest: Tensor) -> Tensor:
        # The clamp keeps L * scale finite where the division rounds up; the largest code is the same.
        # By a tensor, not by a number: GPUs multiply by a number's reciprocal instead, which is a bit off now and then.
        divisor = torch.full_like(largest, self._largest_code)
        return largest.clamp(max=(1 - 2.0**-22) * HUGE).div_(divisor).masked_fill_(largest < TINY, 0.0)

    def _round(self, quotient: Tensor, v: Tensor | None) -> None:
        """In place; v is this piece's dither, None for nearest."""
        if v is None:
            quotient.round_()  # half to even
        else:
            quotient.add_(unit(v)).floor_().clamp_(-self._largest_code, self._largest_code)

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        require(fields, self.layout(n))
        scale, code = fields["scale"], fields["code"]
        require_scales(scale, HUGE / self._largest_code, "scale")
        x = torch.empty(n, device=code.device)
        lowest = code.new_full((), 15, dtype=torch.int8)
        for start, stop, width in pieces(n, self.block, code.device):
            rows = x[start:stop].view(-1, width)  # [r, B]
            if self.bits == 8:
                codes = code[start:stop].view(-1, width)
            else:
                packed = code[start // 2 : (stop + 1) // 2].view(len(rows), -1)
                codes = unpack(packed, width).view(torch.int8).sub_(8)
            lowest = torch.minimum(lowest, codes.amin())
            rows.copy_(codes).mul_(scale[start // self.block :][: len(rows)].unsqueeze(1))
        if int(lowest) < -self._largest_code:
            raise PacketError(f"field 'code' holds the reserved code {-self._largest_code - 1}")
        return x

    def contraction(self, n: int) -> float | None:
        nearest = self.rounding == "nearest"
        return contraction(self._relative_error(n), n, self.block, keeps_largest=nearest)

    def variance(self, n: int) -> float | None:
        return self._relative_error(n) if self.rounding == "stochastic" else None

    def _relative_error(self, n: int) -> float:
        return min(self.block, n) / (2 * self._largest_code) ** 2


int8, int4 = Integer(8, _DEFAULT_BLOCK[8]), Integer(4, _DEFAULT_BLOCK[4])
