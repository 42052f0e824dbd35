"""Float casts: fp32 as it is, bf16 and fp16 rounded to nearest even.

    C(x)_i = the nearest number of the narrower format, clamped to its finite range

Error   relative 2^-8 (bf16) and 2^-11 (fp16) in the normal range. No finite number becomes infinite: bf16 is clamped
        to +-3.39e38, fp16 to +-65504; fp16 rounds below 2^-14 to a grid of 2^-24, so it claims no contraction.
Size    4n bytes (fp32), 2n bytes (bf16, fp16).
Source  IEEE 754-2019; bfloat16 as in Kalamkar et al. 2019, arXiv:1905.12322.
Avoid   fp32: where the link is what you wait for; bf16: where int8 will do, at half the size; fp16: for gradients with
        many entries below 2^-25, which become zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.codecs.base import Codec, Traits, require
from thinwire.codecs.blocks import pieces
from thinwire.codecs.memory import empty
from thinwire.packet import Fields, Layout


@dataclass(frozen=True)
class FP32(Codec):
    """Four bytes an element, nothing lost."""

    values = "value"

    @property
    def spec(self) -> str:
        return "fp32"

    @property
    def traits(self) -> Traits:
        return Traits(lossless=True, unbiased=True, linear=True)

    def layout(self, n: int) -> Layout:
        return {"value": (torch.float32, n)}

    def encode(self, x: Tensor, key: int) -> Fields:
        return {"value": x}

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        require(fields, self.layout(n))
        return fields["value"]


@dataclass(frozen=True)
class BF16(Codec):
    """Two bytes an element: the range of float32, 8 bits of precision."""

    @property
    def spec(self) -> str:
        return "bf16"

    @property
    def traits(self) -> Traits:
        return Traits()

    def layout(self, n: int) -> Layout:
        return {"value": (torch.bfloat16, n)}

    def encode(self, x: Tensor, key: int) -> Fields:
        return {"value": _narrow(x, torch.bfloat16)}

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        require(fields, self.layout(n))
        return _widened(fields["value"])

    def contraction(self, n: int) -> float | None:
        return 1 - 2.0**-16  # the square of the relative error; below 2^-126 it is absolute and far below TINY


@dataclass(frozen=True)
class FP16(Codec):
    """Two bytes an element: 11 bits of precision between 2^-14 and 65504."""

    @property
    def spec(self) -> str:
        return "fp16"

    @property
    def traits(self) -> Traits:
        return Traits()

    def layout(self, n: int) -> Layout:
        return {"value": (torch.float16, n)}

    def encode(self, x: Tensor, key: int) -> Fields:
        return {"value": _narrow(x, torch.float16)}

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        require(fields, self.layout(n))
        return _widened(fields["value"])


def _narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [n] in another float type, clamped to its range."""
    largest = torch.finfo(dtype).max
    narrow = empty(len(x), dtype, x.device)
    for start, stop, _ in pieces(len(x), 2, x.device):
        narrow[start:stop].copy_(x[start:stop]).clamp_(-largest, largest)
    return narrow


def _widened(x: Tensor) -> Tensor:
    """x [n] as float32."""
    return empty(len(x), torch.float32, x.device).copy_(x)


fp32, bf16, fp16 = FP32(), BF16(), FP16()
