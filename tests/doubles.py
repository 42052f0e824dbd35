"""Codecs for float64, which rounds over links have not: a stand-in for topk, and one that is unbiased."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.codecs import Codec, Traits
from thinwire.packet import Fields, Layout


@dataclass(frozen=True)
class Largest(Codec):
    """topk for float64 vectors, without a wire."""

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
    """Random entries in the place of the largest, scaled to be right in the mean: omega = 1 / share - 1."""

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
