"""TernGrad: nothing, or the block's largest magnitude with a sign, at random.

    C(x)_i = m sign(x_i) b_i        m = max_block |x|, b_i = 1 with probability |x_i| / m, else 0

    clip    x_i is cut to +-clip sigma before, sigma^2 = mean_block (x - mean_block x)^2; 0 cuts nothing
    bits    2 bits a code
    trits   5 codes a byte: 1.6 bits

Error   without clip: unbiased (to 2^-16 of m, see blocks.dither); the variance is sum_i |x_i| (m - |x_i|), so that
        omega = (sqrt(B) - 1) / 2, reached by one element of 1 beside others of 1 / (1 + sqrt(B)).
        With clip: less noise, since m is smaller, for a bias on what is cut; nothing is claimed.
        A block whose largest magnitude is below 2^-120 decodes to zeros.
Size    4 ceil(n/B) bytes of m; a quarter of a byte or a fifth an element, packed block by block.
Source  Wen et al. 2017, arXiv:1705.07878, eq. 1-3 and Sec. 3.3 (clip = 2.5 there).
Differs a maximum a block, not a layer: the variance grows with the largest over the mean. No maximum shared by members.
Avoid   with few members: one round's noise is larger than the vector, and only the mean over many is of use. Not in
        error feedback, which wants a contraction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

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
from thinwire.codecs.memory import fields as fresh
from thinwire.codecs.options import altered, call, changed, is_number
from thinwire.codecs.planar import digits, pack, packed_bytes, unpack
from thinwire.errors import ConfigError, PacketError
from thinwire.packet import Fields, Layout

Code = Literal["bits", "trits"]

_PER_BYTE = 5  # 3^5 = 243


@dataclass(frozen=True)
class TernGrad(Codec):
    """Three levels at random.

    block  elements that share a maximum, a multiple of 4; B above
    clip   standard deviations that an element may have, at least 1; 0 for as many as it has
    code   "bits", or "trits", smaller and slower
    """

    block: int = 1024
    clip: float = 0.0
    code: Code = "bits"

    def __post_init__(self) -> None:
        check_options("terngrad", self.block, "stochastic", multiple=4)
        if not (is_number(self.clip) and (self.clip == 0 or 1 <= self.clip < math.inf)):
            raise ConfigError(
                f"terngrad is to clip at {self.clip!r} standard deviations",
                expected="a number of at least 1, or 0 to cut nothing",
                mend="clip=2.5 is the paper's; leave it out to stay unbiased",
            )
        if self.code not in ("bits", "trits"):
            raise ConfigError(
                f"terngrad is to write the code {self.code!r}",
                expected="code='bits' or code='trits'",
                mend="leave it out for bits; trits take a fifth less and more time",
            )

    def __call__(self, block: int | None = None, *, clip: float | None = None, code: Code | None = None) -> TernGrad:
        """The same codec with other options: `terngrad(clip=2.5)`."""
        return altered(self, block=block, clip=clip, code=code)

    @property
    def spec(self) -> str:
        return call("terngrad", **changed(replace(self, clip=float(self.clip))))

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=not self.clip)

    def layout(self, n: int) -> Layout:
        return {"scale": (torch.float32, num_blocks(n, self.block)), "code": (torch.uint8, self._code_bytes(n))}

    def _code_bytes(self, n: int) -> int:
        if self.code == "bits":
            return packed_bytes(n, self.block, 2)
        return n // self.block * -(-self.block // _PER_BYTE) + -(-(n % self.block) // _PER_BYTE)

    def encode(self, x: Tensor, key: int) -> Fields:
        n, device = len(x), x.device
        fields, scratch = fresh(self.layout(n), device), Scratch(device)
        for start, stop, width in pieces(n, self.block, device):
            rows = x[start:stop].reshape(-1, width)  # [r, B]
            work = scratch("work", rows.shape)
            largest = flushed(torch.abs(rows, out=work).amax(dim=1))  # [r]
            torch.div(rows, divisor(largest), out=work)
            if self.clip:
                largest *= self._cut(work, scratch("squares", rows.shape))
            fields["scale"][start // self.block :][: len(rows)] = largest
            work.add_(unit(dither(key, start, work.shape, scratch), scratch)).floor_().clamp_(-1, 1).add_(1)
            codes = scratch("code", rows.shape, torch.int8).copy_(work).view(torch.uint8)
            if self.code == "bits":
                pack(codes, fields["code"], (start, n), self.block, 2, 1, scratch)
            else:
                digits(codes, 3, _PER_BYTE, 1, self._trits(fields["code"], start, codes.shape))
        return fields

    def _cut(self, ratio: Tensor, work: Tensor) -> Tensor:
        """Cut ratio = x / m in place to the clip and divide it by what is then its largest, which is returned: [r]."""
        width = ratio.shape[1]
        mean = sums(work.copy_(ratio)).div_(width)
        variance = sums(torch.sub(ratio, mean.unsqueeze(1), out=work).square_()).div_(width)
        limit = variance.sqrt_().mul_(self.clip).clamp_(max=1).unsqueeze(1)  # 1 is the largest as it was
        # A constant has no spread, and is not cut to nothing.
        limit.masked_fill_(limit < 2.0**-20, 1.0)
        ratio.clamp_(-limit, limit).div_(limit)
        return limit.squeeze(1)

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        require(fields, self.layout(n))
        scale, code = fields["scale"], fields["code"]
        require_scales(scale, HUGE, "scale")
        x, scratch = empty(n, torch.float32, code.device), Scratch(code.device)
        highest = code.new_zeros(())
        for start, stop, width in pieces(n, self.block, code.device):
            rows = x[start:stop].view(-1, width)  # [r, B]
            if self.code == "bits":
                codes = unpack(code, (start, n), (len(rows), width), self.block, 2, scratch)
            else:
                codes = _untrits(self._trits(code, start, rows.shape))
            highest = torch.maximum(highest, codes.amax())
            rows.copy_(codes[:, :width]).sub_(1).mul_(scale[start // self.block :][: len(rows)].unsqueeze(1))
        if int(highest) > 2:
            raise PacketError("field 'code' holds a code of more than three values")
        return x

    def _trits(self, code: Tensor, start: int, shape: tuple[int, ...]) -> Tensor:
        """The trits of rows [r, B] from element `start` on: uint8 [r, ceil(B / 5)], t_0 + 3 t_1 + .. + 81 t_4."""
        (rows, width), per_block = shape, -(-self.block // _PER_BYTE)
        size = -(-width // _PER_BYTE)
        return code[start // self.block * per_block :][: rows * size].view(rows, size)

    def variance(self, n: int) -> float | None:
        return None if self.clip else (math.sqrt(max(1, min(self.block, n))) - 1) / 2


def _untrits(packed: Tensor) -> Tensor:
    """The inverse of `digits`: uint8 [rows, 5 ceil(B / 5)]; of a byte that no encoder writes, the last code is 3."""
    rest, parts = packed.int(), []
    for _ in range(_PER_BYTE - 1):
        third = (rest * 171).bitwise_right_shift_(9)  # rest / 3, rounded down, for all up to 255
        parts.append(rest.sub_(third, alpha=3).to(torch.uint8))
        rest = third
    return torch.cat([*parts, rest.to(torch.uint8)], dim=1)


terngrad = TernGrad()
