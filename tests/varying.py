"""A codec whose size depends on the data, for what stands around such codecs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.codecs import Codec, Traits, require
from thinwire.errors import PacketError
from thinwire.packet import Fields, Layout


@dataclass(frozen=True)
class Nonzero(Codec):
    """The elements that are not zero, and where they stand."""

    @property
    def spec(self) -> str:
        return "nonzero"

    @property
    def traits(self) -> Traits:
        return Traits(fixed_size=False)

    def layout(self, n: int) -> Layout:
        return {"value": (torch.float32, n), "index": (torch.int32, n)}

    def encode(self, x: Tensor, key: int) -> Fields:
        index = x.nonzero().squeeze(1)
        return {"value": x[index], "index": index.int()}

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        require(fields, self.layout(n), exact=False)
        value, index = fields["value"], fields["index"].long()
        if len(value) != len(index) or not bool(((index >= 0) & (index < n)).all()):
            raise PacketError("positions outside")
        return value.new_zeros(n).index_copy_(0, index, value)
