"""QSGD: whole levels between zero and the block's norm, rounded at random.

    C(x)_i = (a / s) sign(x_i) floor(s |x_i| / a + u)        a = ||x||_2 or ||x||_inf of the block, u uniform in (0, 1)

    fixed   codes of ceil(log2(2s + 1)) bits
    elias   Elias gamma codes of the levels, a sign only where there is something (elias.py): most levels are 0 or 1

Error   unbiased (to 2^-16 of a level, see blocks.dither); the variance is (a/s)^2 sum_i p_i (1 - p_i), with p_i the
        fraction of s |x_i| / a: omega = min(B / (4 s^2), sqrt(B) / s).
        A block whose norm is below 2^-120 decodes to zeros.
Size    4 ceil(n/B) bytes of scales a / s; the codes, packed block by block; or at most (N + 1), N and 1 bits an element
        of prefix, tail and sign, N = floor(log2(s + 1)). Normal numbers at s = sqrt(B): 3 bits an element in all.
Source  Alistarh et al. 2017, arXiv:1610.02132, Sec. 3 and 3.2 (omega there: min(B / s^2, sqrt(B) / s)).
Differs gamma codes instead of omega codes, as short for small levels, and in streams that are read side by side; one
        for every level, zeros included (the paper has another code besides, of the distances between others). The
        rounding is floor(s x_i / a + u) with the sign in it, which has the same distribution.
Avoid   with norm='l2' and large blocks at few levels: the noise exceeds the vector (omega above 1). Elias codes cost
        time that a quick link does not repay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from thinwire.codecs import elias
from thinwire.codecs.base import Codec, Traits, require
from thinwire.codecs.blocks import (
    HUGE,
    check_options,
    dither,
    divisor,
    flushed,
    num_blocks,
    pieces,
    require_scales,
    sums,
    unit,
)
from thinwire.codecs.memory import Scratch, empty
from thinwire.codecs.options import altered, call, changed, is_whole
from thinwire.codecs.planar import pack, packed_bytes, row_multiple, unpack
from thinwire.errors import ConfigError, PacketError
from thinwire.packet import Fields, Layout

Norm = Literal["l2", "max"]
Code = Literal["fixed", "elias"]


@dataclass(frozen=True)
class QSGD(Codec):
    """Levels at random.

    levels  between zero and the norm, 1 to 127; s above
    block   elements that share a norm, a multiple of what fills whole bytes; the paper's bucket, B above
    norm    "l2" or "max": the same number of levels reaches less far down with "l2", and sends fewer large ones
    code    "fixed" or "elias", of variable size
    """

    levels: int = 7
    block: int = 512
    norm: Norm = "l2"
    code: Code = "fixed"

    def __post_init__(self) -> None:
        if not is_whole(self.levels, 1, 127):
            raise ConfigError(
                f"qsgd is to have {self.levels!r} levels",
                expected="a whole number from 1 to 127",
                mend="1 is the coarsest; 7 takes 4 bits, 127 takes 8",
            )
        if self.norm not in ("l2", "max"):
            raise ConfigError(
                f"qsgd is to take the norm {self.norm!r}",
                expected="norm='l2' or norm='max'",
                mend="leave it out for l2; max loses less at 7 levels and more",
            )
        if self.code not in ("fixed", "elias"):
            raise ConfigError(
                f"qsgd is to write the code {self.code!r}",
                expected="code='fixed' or code='elias'",
                mend="leave it out for fixed; elias is smaller and slower",
            )
        check_options("qsgd", self.block, "stochastic", multiple=row_multiple(self._bits))

    def __call__(
        self,
        levels: int | None = None,
        *,
        block: int | None = None,
        norm: Norm | None = None,
        code: Code | None = None,
    ) -> QSGD:
        """The same codec with other options: `qsgd(1, code='elias')`."""
        return altered(self, levels=levels, block=block, norm=norm, code=code)

    @property
    def spec(self) -> str:
        return call("qsgd", **changed(self))

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=True, fixed_size=self.code == "fixed")

    def layout(self, n: int) -> Layout:
        scale: Layout = {"scale": (torch.float32, num_blocks(n, self.block))}
        if self.code == "elias":
            return {**scale, **elias.layout(n, self.levels)}
        return {**scale, "code": (torch.uint8, packed_bytes(n, self.block, self._bits))}

    def encode(self, x: Tensor, key: int) -> Fields:
        n, device, scratch = len(x), x.device, Scratch(x.device)
        scales = empty(num_blocks(n, self.block), torch.float32, device)
        size = n if self.code == "elias" else packed_bytes(n, self.block, self._bits)
        codes = empty(size, torch.uint8, device)
        for start, stop, width in pieces(n, self.block, device):
            rows = x[start:stop].reshape(-1, width)  # [r, B]
            work = scratch("work", rows.shape)
            scale = self._scales(rows, work)  # [r]
            scales[start // self.block :][: len(scale)] = scale
            torch.div(rows, divisor(scale), out=work)
            work.add_(unit(dither(key, start, work.shape, scratch), scratch)).floor_().clamp_(-self.levels, self.levels)
            levels = scratch("levels", rows.shape, torch.int8).copy_(work)
            if self.code == "elias":
                codes[start:stop].view(torch.int8).copy_(levels.view(-1))
            else:
                # Up to 2s = 254: as int8 the sum wraps around, and its bits are right.
                levels.add_(self.levels)
                pack(levels.view(torch.uint8), codes, (start, n), self.block, self._bits, self.levels, scratch)
        if self.code == "elias":
            return {"scale": scales, **elias.encode(codes.view(torch.int8))}
        return {"scale": scales, "code": codes}

    def _scales(self, rows: Tensor, work: Tensor) -> Tensor:
        """a / s of each block, [r]; `work` is overwritten."""
        norm = torch.abs(rows, out=work).amax(dim=1)
        if self.norm == "l2":
            norm *= sums(work.div_(divisor(norm)).square_()).sqrt_()  # squares of what is at most 1: all finite
        flushed(norm).clamp_(max=(1 - 2.0**-22) * HUGE)
        return norm.div_(torch.full_like(norm, self.levels))  # by a tensor: see Integer

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        require(fields, self.layout(n), exact=self.code == "fixed")
        scale = fields["scale"]
        require({"scale": scale}, {"scale": (torch.float32, num_blocks(n, self.block))})
        require_scales(scale, HUGE / self.levels, "scale")
        if self.code == "elias":
            code = elias.decode(fields["prefix"], fields["tail"], fields["sign"], n, self.levels)
        else:
            code = fields["code"]
        x, scratch = empty(n, torch.float32, scale.device), Scratch(scale.device)
        highest = scale.new_zeros((), dtype=torch.uint8)
        for start, stop, width in pieces(n, self.block, scale.device):
            rows = x[start:stop].view(-1, width)  # [r, B]
            if self.code == "elias":
                rows.copy_(code[start:stop].view(-1, width))
            else:
                codes = unpack(code, (start, n), (len(rows), width), self.block, self._bits, scratch)
                highest = torch.maximum(highest, codes.amax())
                rows.copy_(codes).sub_(self.levels)
            rows.mul_(scale[start // self.block :][: len(rows)].unsqueeze(1))
        if int(highest) > 2 * self.levels:
            raise PacketError(f"field 'code' holds {int(highest)}", expected=f"codes up to {2 * self.levels}")
        return x

    def variance(self, n: int) -> float | None:
        block = min(self.block, n)
        return min(block / (4 * self.levels**2), math.sqrt(block) / self.levels)

    @property
    def _bits(self) -> int:
        return (2 * self.levels).bit_length()


qsgd = QSGD()
