"""Blockwise integers of 8, 6, 4, 3 or 2 bits: int8, int6, int4, int3, int2.

    C(x)_i = c + s (q_i - z)        q_i = round((x_i - c) / s + z), a signed integer of b bits

    nearest      half to even
    stochastic   floor((x_i - c) / s + z + u), u uniform in (0, 1)

    grid         scale s                   zero z               centre c             integers used
    symmetric    max |x| / L               0                    0                    -L .. L, L = 2^(b-1) - 1
    minmax       (max x - min x) / M       -1/2                 (max x + min x) / 2  all, M = 2^b - 1
    zero         as minmax of x and 0      round(-min x / s)    0                    all
                                           - 2^(b-1)

with maxima and minima over the block. A symmetric grid has zero in the middle; minmax reaches from the block's smallest
to its largest; zero does so too and has zero among its levels, one end being cut by up to half a step.

Error   nearest: |x_i - C(x)_i| <= s/2, so that ||x - C(x)||^2 <= e ||x||^2 with e = B / (4 L^2) (symmetric) and
        B / (2 M^2) (minmax, zero). symmetric and zero never lose more than 1 - 1/B and 1 - (1 - 1/M^2)/B of it.
        minmax has no such second bound: at few bits it gives every zero of a sparse block half a step, more energy than
        was there (B >= 2 M^2 claims nothing and goes into no error memory). It is for what is far from zero.
        stochastic: unbiased (to 2^-16 of a step, see blocks.dither); variance <= s^2/4 an element: omega = e. There
        zero has a step less, M = 2^b - 2, so that no end is cut.
        A block whose largest magnitude (other grids: half of whose spread) is below 2^-120 decodes to zeros (minmax: to
        its centre).
Size    per block 4 bytes of scale, 4 of centre (minmax), 1 of zero (zero); b bits a code, packed block by block.
Source  Dettmers 2015, arXiv:1511.04561 (8 bits); Dettmers et al. 2021, arXiv:2110.02861 (blockwise absmax);
        stochastic rounding as in Alistarh et al. 2017, arXiv:1610.02132, with the block's maximum as its norm; minmax
        as in Markov et al. 2022, arXiv:2111.08617 (CGX); zero as in Jacob et al. 2017, arXiv:1712.05877.
Differs minmax sends the centre, not the minimum: spreads beyond the largest float then need no care.
Avoid   on vectors with a few large entries in every block: they take the whole grid, and the rest becomes zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from thinwire.codecs.base import Codec, Traits, require
from thinwire.codecs.blocks import (
    HUGE,
    TINY,
    Rounding,
    check_options,
    contraction,
    dither,
    divisor,
    flushed,
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

Grid = Literal["symmetric", "minmax", "zero"]

_DEFAULT_BLOCK = {8: 256, 6: 128, 4: 64, 3: 64, 2: 32}


@dataclass(frozen=True)
class Integer(Codec):
    """Signed integers of a few bits; see `int8`, `int6`, `int4`, `int3`, `int2`.

    block     elements that share a scale, a multiple of what fills whole bytes; B above
    rounding  "nearest" loses least in one round; "stochastic" is right in the mean over rounds and members
    grid      "symmetric" around zero; "minmax" and "zero" where a block's numbers lean to one side
    """

    bits: int
    block: int
    rounding: Rounding = "nearest"
    grid: Grid = "symmetric"

    def __post_init__(self) -> None:
        if self.bits not in _DEFAULT_BLOCK:
            raise ConfigError(
                f"Integer of {self.bits!r} bits", expected="8, 6, 4, 3 or 2 bits", mend="use int8, int4 or another"
            )
        check_options(self._name, self.block, self.rounding, multiple=row_multiple(self.bits))
        if self.grid not in ("symmetric", "minmax", "zero"):
            raise ConfigError(
                f"{self._name} is to have the grid {self.grid!r}",
                expected="grid='symmetric', grid='minmax' or grid='zero'",
                mend="leave it out for symmetric; zero suits numbers that lean to one side, minmax those far from zero",
            )

    def __call__(
        self, block: int | None = None, *, rounding: Rounding | None = None, grid: Grid | None = None
    ) -> Integer:
        """The same codec with other options: `int8(block=64)`."""
        return altered(self, block=block, rounding=rounding, grid=grid)

    @property
    def _name(self) -> str:
        return f"int{self.bits}"

    @property
    def spec(self) -> str:
        block = {} if self.block == _DEFAULT_BLOCK[self.bits] else {"block": self.block}
        return call(self._name, **block, **changed(self))

    @property
    def traits(self) -> Traits:
        # Three levels or four: what is left of a block is often its largest element alone.
        coarse = self.bits == 2 and self.rounding == "nearest" and self.grid != "minmax"
        return Traits(unbiased=self.rounding == "stochastic", wants_feedback=coarse)

    def layout(self, n: int) -> Layout:
        blocks = num_blocks(n, self.block)
        layout = {"scale": (torch.float32, blocks)}
        if self.grid == "minmax":
            layout["centre"] = (torch.float32, blocks)
        if self.grid == "zero":
            layout["zero"] = (torch.int8, blocks)
        code = (torch.int8, n) if self.bits == 8 else (torch.uint8, packed_bytes(n, self.block, self.bits))
        return {**layout, "code": code}

    def encode(self, x: Tensor, key: int) -> Fields:
        n, device = len(x), x.device
        fields, scratch = fresh(self.layout(n), device), Scratch(device)
        for start, stop, width in pieces(n, self.block, device):
            rows = x[start:stop].reshape(-1, width)  # [r, B]
            work = scratch("work", rows.shape)
            grid = self._fit(rows, work)  # [r] each
            for name, values in grid.items():
                fields[name][start // self.block :][: len(rows)] = values
            if self.grid == "minmax":
                rows = torch.sub(rows, grid["centre"].unsqueeze(1), out=work)
            torch.div(rows, divisor(grid["scale"]), out=work)
            if self.grid != "symmetric":
                work.add_(self._zero(grid))
            if self.rounding == "stochastic":
                work.add_(unit(dither(key, start, work.shape, scratch), scratch)).floor_()
            else:
                work.round_()  # half to even
            if self.rounding == "stochastic" or self.grid != "symmetric":
                work.clamp_(self._lowest, self._offset - 1)
            if self.bits == 8:
                fields["code"][start:stop].view_as(work).copy_(work)
            else:
                codes = scratch("code", rows.shape, torch.int8).copy_(work).add_(self._offset).view(torch.uint8)
                pack(codes, fields["code"], (start, n), self.block, self.bits, self._offset, scratch)
        return fields

    def _fit(self, rows: Tensor, work: Tensor) -> dict[str, Tensor]:
        """What is sent of each block beside its codes, by field; `work` is overwritten."""
        # The clamp keeps L * scale finite where the division rounds up; the largest code is the same.
        limit = (1 - 2.0**-22) * HUGE
        if self.grid == "symmetric":
            largest = torch.abs(rows, out=work).amax(dim=1).clamp_(max=limit)
            return {"scale": _divided(flushed(largest), self._steps / 2)}
        low, high = (0.5 * end.clamp_(-limit, limit) for end in (rows.amin(dim=1), rows.amax(dim=1)))
        if self.grid == "zero":
            low.clamp_(max=0)
            high.clamp_(min=0)
        spread = high - low  # halves all three, which the sum of the whole ones might not be: finite
        scale = _divided(flushed(spread), self._steps / 2)
        if self.grid == "minmax":
            centre = high + low
            return {"scale": scale, "centre": centre.masked_fill_(centre.abs() < TINY, 0.0)}
        below = torch.div(-2 * low, divisor(scale).squeeze(1))
        below = below.round_() if self.rounding == "nearest" else below.ceil_()
        return {"scale": scale, "zero": below.clamp_(max=self._steps).sub_(self._offset).to(torch.int8)}

    def _zero(self, grid: Fields) -> Tensor | float:
        """z of a piece, [r, 1] or one for all."""
        return grid["zero"].unsqueeze(1).float() if self.grid == "zero" else -0.5

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        require(fields, self.layout(n))
        self._check_grid(fields)
        code = fields["code"].view(torch.uint8)
        x, scratch = empty(n, torch.float32, code.device), Scratch(code.device)
        lowest = code.new_full((), 127, dtype=torch.int8)
        for start, stop, width in pieces(n, self.block, code.device):
            rows = x[start:stop].view(-1, width)  # [r, B]
            codes = unpack(code, (start, n), (len(rows), width), self.block, self.bits, scratch).view(torch.int8)
            if self.bits < 8:
                codes.sub_(self._offset)
            lowest = torch.minimum(lowest, codes.amin())
            grid = {name: field[start // self.block :][: len(rows)] for name, field in fields.items() if name != "code"}
            rows.copy_(codes)
            if self.grid != "symmetric":
                rows.sub_(self._zero(grid))
            rows.mul_(grid["scale"].unsqueeze(1))
            if self.grid == "minmax":
                rows.add_(grid["centre"].unsqueeze(1))
            if self.grid == "zero":
                rows.clamp_(-HUGE, HUGE)  # the lowest level of a block around the largest float
        if int(lowest) < self._lowest:
            raise PacketError(f"field 'code' holds the reserved code {int(lowest)}")
        return x

    def _check_grid(self, fields: Fields) -> None:
        """Refuse what would decode to other than finite numbers."""
        require_scales(fields["scale"], HUGE / (self._steps / 2), "scale")
        if self.grid == "minmax":
            end = fields["centre"].abs() + fields["scale"] * (self._steps / 2)
            if not bool((end <= HUGE).all()):
                raise PacketError("field 'centre' holds a centre that is not finite or too large")

    def contraction(self, n: int) -> float | None:
        of_largest = {"symmetric": 1.0, "zero": 1 - 1 / self._steps**2, "minmax": 0.0}[self.grid]
        nearest = self.rounding == "nearest"
        return contraction(self._relative_error(n), n, self.block, of_largest=of_largest if nearest else 0.0)

    def variance(self, n: int) -> float | None:
        return self._relative_error(n) if self.rounding == "stochastic" else None

    def _relative_error(self, n: int) -> float:
        # (s/2)^2 an element, s = 2 max / steps or spread / steps; a block's energy is at least max^2 and spread^2 / 2.
        return (1.0 if self.grid == "symmetric" else 0.5) * min(self.block, n) / self._steps**2

    @property
    def _offset(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def _lowest(self) -> int:
        return -self._offset + (self.grid == "symmetric")

    @property
    def _steps(self) -> int:
        """Of size s from end to end: 2 L or M above."""
        cut = self.grid == "symmetric" or (self.grid == "zero" and self.rounding == "stochastic")
        return (1 << self.bits) - 1 - cut


def _divided(x: Tensor, divisor: float) -> Tensor:
    # By a tensor, not by a number: GPUs multiply by a number's reciprocal instead, which is a bit off now and then.
    return x.div(torch.full_like(x, divisor))


int8, int6, int4 = (Integer(bits, _DEFAULT_BLOCK[bits]) for bits in (8, 6, 4))
int3, int2 = (Integer(bits, _DEFAULT_BLOCK[bits]) for bits in (3, 2))
