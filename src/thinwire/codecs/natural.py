"""Natural compression: every number to one of the two powers of two beside it, at random.

    C(x)_i = sign(x_i) 2^(e+b)        2^e <= |x_i| < 2^(e+1), b = 1 with probability |x_i| / 2^e - 1, else 0

Below 2^-126 the two are 0 and 2^-126; at the upper end they are 2^127 and the largest float.

Error   unbiased (to 2^-16 of 2^e, see blocks.dither); omega = 1/8, reached by numbers of 4/3 times a power of two.
Size    9 bits an element, 8 of exponent and one of sign: n bytes and n/8. Exponents of one tensor are much alike: with
        zstd behind it normal numbers take half of that.
Cost    integer arithmetic: the sum of a float's bits and of 23 random ones carries into the exponent when it should.
Source  Horvath et al. 2019, arXiv:1905.10988, Def. 1 and Thm. 1.
Differs the exact form of 9 bits; the common one of 8 cuts exponents to seven bits, and is wrong beyond 2^18.
Avoid   where loss counts: int8 has the same size and a thousandth of this error. It is for means over many members.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.codecs.base import Codec, Traits, require
from thinwire.codecs.blocks import HUGE, carry, dither, pieces
from thinwire.codecs.memory import Scratch, empty
from thinwire.codecs.memory import fields as fresh
from thinwire.codecs.planar import pack, packed_bytes, unpack
from thinwire.packet import Fields, Layout

_ROW = 1024  # signs are packed in rows of so many


@dataclass(frozen=True)
class Natural(Codec):
    """Signs and exponents."""

    def __call__(self) -> Natural:
        """Itself: there are no options."""
        return self

    @property
    def spec(self) -> str:
        return "natural"

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=True)

    def layout(self, n: int) -> Layout:
        return {"exponent": (torch.uint8, n), "sign": (torch.uint8, packed_bytes(n, _ROW, 1))}

    def encode(self, x: Tensor, key: int) -> Fields:
        n, device = len(x), x.device
        fields, scratch = fresh(self.layout(n), device), Scratch(device)
        for start, stop, width in pieces(n, _ROW, device):
            rows = x[start:stop].reshape(-1, width)
            bits = torch.abs(rows, out=scratch("magnitude", rows.shape)).view(torch.int32)
            bits.add_(carry(dither(key, start, bits.shape, scratch), scratch)).bitwise_right_shift_(23)
            fields["exponent"][start:stop].view(-1, width).copy_(bits)
            negative = torch.lt(rows, 0, out=scratch("negative", rows.shape, torch.bool)).view(torch.uint8)
            pack(negative, fields["sign"], (start, n), _ROW, 1, 0, scratch)
        return fields

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        require(fields, self.layout(n))
        exponent = fields["exponent"]
        x, scratch = empty(n, torch.float32, exponent.device), Scratch(exponent.device)
        for start, stop, width in pieces(n, _ROW, exponent.device):
            rows = x[start:stop].view(-1, width)
            rows.view(torch.int32).copy_(exponent[start:stop].view(-1, width)).bitwise_left_shift_(23)
            rows.clamp_(max=HUGE)  # the power of two above it would be infinite
            negative = unpack(fields["sign"], (start, n), (len(rows), width), _ROW, 1, scratch).view(torch.int8)
            rows.mul_(scratch("factor", rows.shape).copy_(negative.mul_(-2).add_(1)))
        return x

    def variance(self, n: int) -> float | None:
        return 1 / 8


natural = Natural()
