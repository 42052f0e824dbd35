"""Small codecs and rounds, each for what is to be seen with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.codecs import Codec, Staged, Traits, fp32, require
from thinwire.codecs.stages import Result, Stage, Stages, Tensors
from thinwire.errors import PacketError
from thinwire.packet import Fields, Layout


@dataclass(frozen=True)
class Largest(Codec):
    """topk for float64 vectors, which rounds over links have not; without a wire."""

    share: float
    values = "value"

    @property
    def spec(self) -> str:
        return f"largest({self.share!r})"

    @property
    def traits(self) -> Traits:
        return Traits(wants_feedback=True, reencodes=False)

    def layout(self, n: int) -> Layout:
        raise NotImplementedError

    def encode(self, x: Tensor, key: int) -> Fields:
        index = x.abs().topk(max(1, round(self.share * len(x)))).indices
        return {"value": x[index], "index": index}

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        return fields["value"].new_zeros(n).index_copy_(0, fields["index"], fields["value"])

    def contraction(self, n: int) -> float | None:
        return self.share


@dataclass(frozen=True)
class Chosen(Largest):
    """The same of random entries, scaled to be right in the mean: omega = 1 / share - 1."""

    @property
    def spec(self) -> str:
        return f"chosen({self.share!r})"

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=True)

    def encode(self, x: Tensor, key: int) -> Fields:
        index = torch.randperm(len(x), generator=torch.Generator().manual_seed(key >> 1))
        index = index[: max(1, round(self.share * len(x)))]
        return {"value": x[index] / self.share, "index": index}

    def contraction(self, n: int) -> float | None:
        return None

    def variance(self, n: int) -> float | None:
        return 1 / self.share - 1


@dataclass(frozen=True)
class Nonzero(Codec):
    """The elements that are not zero, and where they stand: a codec whose size depends on the data."""

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


@dataclass(frozen=True)
class Counted(Codec):
    """Whole numbers of 1 / per, as int32: packets that add up exactly."""

    per: int

    @property
    def spec(self) -> str:
        return f"counted({self.per})"

    @property
    def traits(self) -> Traits:
        return Traits(summable=True)

    def layout(self, n: int) -> Layout:
        return {"count": (torch.int32, n)}

    def encode(self, x: Tensor, key: int) -> Fields:
        return {"count": (x * self.per).round().int()}

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        require(fields, self.layout(n))
        return fields["count"].float() / self.per

    def add(self, contributions: Sequence[Fields], n: int) -> Fields:
        for fields in contributions:
            require(fields, self.layout(n))
        return {"count": torch.stack([fields["count"] for fields in contributions]).sum(dim=0, dtype=torch.int32)}


@dataclass(frozen=True)
class Halves(Staged):
    """Two exchanges: the first half of a vector, then the second; and it counts its rounds."""

    codec: Codec = fp32

    @property
    def spec(self) -> str:
        return f"halves({self.codec.spec})"

    @property
    def wants_feedback(self) -> bool:
        return self.codec.traits.wants_feedback

    def run(self, x: Tensor, shared: Tensors, key: int) -> Stages:
        middle = len(x) // 2
        first = yield Stage(x[:middle], self.codec, whole=True)
        second = yield Stage(x[middle:], self.codec, whole=True)
        count = shared.get("count", torch.tensor(0)) + 1
        combined, sent = (torch.cat(halves) for halves in zip(first, second, strict=True))
        return Result(combined, sent, {"count": count})
