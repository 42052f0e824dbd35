"""One bit an element: its sign, and one magnitude a block.

    C(x)_i = c + a for x_i >= 0, c - a for x_i < 0

    mean        a = mean_block |x|, c = 0
    two-means   c + a and c - a are the means of the block's x_i >= 0 and of its x_i < 0

Error   mean: ||x - C(x)||^2 = (1 - rho^2) ||x||^2 in each block, exactly, with rho^2 = ||x||_1^2 / (B ||x||^2) >= 1/B:
        0.36 of normal numbers, 0.5 of Laplace's, nearly all of a sparse block. two-means: never more than that.
        Biased, and no zero ever decodes to zero: wants ErrorFeedback, and not for rows that get no gradient.
Size    4 ceil(n/B) bytes of a, as many of c for two-means; a bit an element, packed block by block.
Source  Karimireddy et al. 2019, arXiv:1901.09847, Alg. 2 (mean, there over a layer); Seide et al. 2014, "1-bit
        stochastic gradient descent" (two means); Bernstein et al. 2018, arXiv:1802.04434 (signs alone).
Differs a magnitude a block, not a layer. The scale ||x|| / sqrt(B) of 1-bit Adam's code is not offered: its error,
        2 (1 - rho) ||x||^2, exceeds ||x||^2 where rho < 1/2, and then error feedback diverges.
Avoid   without error feedback, and for embeddings and other sparse gradients: no zero decodes to zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from thinwire.codecs.base import Codec, Traits, require
from thinwire.codecs.blocks import HUGE, check_options, num_blocks, pieces, require_scales, sums
from thinwire.codecs.memory import Scratch, empty
from thinwire.codecs.memory import fields as fresh
from thinwire.codecs.options import altered, call, changed
from thinwire.codecs.planar import pack, packed_bytes, unpack
from thinwire.errors import ConfigError, PacketError
from thinwire.packet import Fields, Layout

Scale = Literal["mean", "two-means"]


@dataclass(frozen=True)
class Sign(Codec):
    """Signs with a scale.

    block  elements that share a magnitude, a multiple of 8; B above
    scale  "mean", one magnitude for both signs, or "two-means", one for each
    """

    block: int = 1024
    scale: Scale = "mean"

    def __post_init__(self) -> None:
        check_options("sign", self.block, "nearest", multiple=8)
        if self.scale not in ("mean", "two-means"):
            raise ConfigError(
                f"sign is to have the scale {self.scale!r}",
                expected="scale='mean' or scale='two-means'",
                mend="leave it out for the mean magnitude; two means suit what leans to one side",
            )

    def __call__(self, block: int | None = None, *, scale: Scale | None = None) -> Sign:
        """The same codec with other options: `sign(block=4096)`."""
        return altered(self, block=block, scale=scale)

    @property
    def spec(self) -> str:
        return call("sign", **changed(self))

    @property
    def traits(self) -> Traits:
        return Traits(wants_feedback=True)

    def layout(self, n: int) -> Layout:
        blocks = num_blocks(n, self.block)
        centre = {"centre": (torch.float32, blocks)} if self.scale == "two-means" else {}
        return {"scale": (torch.float32, blocks), **centre, "code": (torch.uint8, packed_bytes(n, self.block, 1))}

    def encode(self, x: Tensor, key: int) -> Fields:
        n, device = len(x), x.device
        fields, scratch = fresh(self.layout(n), device), Scratch(device)
        for start, stop, width in pieces(n, self.block, device):
            rows = x[start:stop].reshape(-1, width)  # [r, B]
            bits = torch.ge(rows, 0, out=scratch("bits", rows.shape, torch.bool)).view(torch.uint8)
            for name, values in self._fit(rows, bits, scratch("work", rows.shape)).items():
                fields[name][start // self.block :][: len(rows)] = values
            pack(bits, fields["code"], (start, n), self.block, 1, 0, scratch)
        return fields

    def _fit(self, rows: Tensor, bits: Tensor, work: Tensor) -> dict[str, Tensor]:
        """What is sent of each block beside the signs; `work` is overwritten."""
        width = rows.shape[1]
        terms = 1 << (width - 1).bit_length()  # a power of two: dividing by it is exact, and the sums stay finite
        if self.scale == "mean":
            total = sums(torch.mul(rows, 1 / terms, out=work).abs_())
            return {"scale": total.mul_(terms / width).clamp_(max=HUGE)}
        num_above = bits.sum(dim=1)
        above, below = (
            sums(torch.clamp(rows, low, high, out=work).mul_(1 / terms))
            .mul_(torch.full_like(num, terms, dtype=torch.float32).div_(num.clamp(min=1)))
            .clamp_(-HUGE, HUGE)
            .mul_(0.5)
            for low, high, num in ((0, HUGE, num_above), (-HUGE, 0, width - num_above))
        )
        return {"scale": above - below, "centre": above + below}

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        require(fields, self.layout(n))
        scale, code = fields["scale"], fields["code"]
        require_scales(scale, HUGE, "scale")
        centre = fields.get("centre")
        if centre is not None and not bool((centre.abs() + scale <= HUGE).all()):
            raise PacketError("field 'centre' holds a centre that is not finite or too large")
        x, scratch = empty(n, torch.float32, code.device), Scratch(code.device)
        for start, stop, width in pieces(n, self.block, code.device):
            rows = x[start:stop].view(-1, width)  # [r, B]
            bits = unpack(code, (start, n), (len(rows), width), self.block, 1, scratch)
            block = slice(start // self.block, start // self.block + len(rows))
            rows.copy_(bits.view(torch.int8).mul_(2).sub_(1)).mul_(scale[block].unsqueeze(1))
            if centre is not None:
                rows.add_(centre[block].unsqueeze(1))
        return x

    def contraction(self, n: int) -> float | None:
        # Rounding of the mean enters squared, so that next to nothing is taken off.
        return (1 - 2.0**-20) / max(1, min(self.block, n))


sign = Sign()
