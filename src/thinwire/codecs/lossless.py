"""What the lossless stages share: all that is the inner codec's, and a field of any type as rows of bytes, and back.

Bytes are grouped by position (all first bytes, all second bytes, ...): numbers of like size share their exponents, so
what repeats stands side by side.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from thinwire.codecs.base import Codec, Shapes, Traits, require
from thinwire.codecs.precision import fp32
from thinwire.errors import ConfigError
from thinwire.packet import Fields

Bytes = npt.NDArray[np.uint8]


class Lossless(Codec):
    """A stage around the bytes that `inner` writes. Subclasses are final and frozen dataclasses."""

    inner: Codec
    squeezes = True

    @abstractmethod
    def unfold(self, name: str, data: Tensor, dtype: torch.dtype, count: int) -> Tensor:
        """The field of `count` elements that was squeezed, or at most so many if the left side varies in size.

        raises  PacketError if the bytes cannot be those of such a field
        """

    @property
    def traits(self) -> Traits:
        return replace(self.inner.traits, linear=False, summable=False, fixed_size=False)

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        require(fields, self.layout(n), exact=False)
        due = self.inner.layout(n)
        return self.inner.decode({name: self.unfold(name, fields[name], *due[name]) for name in due}, n, key)

    def after(self, first: Codec) -> Codec:
        """The chain `first | self`: around everything that `first` writes."""
        return self._around(first if self.inner == fp32 else first | self.inner)

    def fit(self, shapes: Shapes) -> Codec:
        return self._around(self.inner.fit(shapes))

    def part(self, begin: int, end: int) -> Codec:
        return self._around(self.inner.part(begin, end))

    @property
    def leads(self) -> tuple[Codec, ...]:
        return self.inner.leads

    def lead(self, change: Callable[[Codec], Codec]) -> Codec:
        return self._around(self.inner.lead(change))

    @property
    def selection(self) -> Codec:
        return self.inner.selection

    def contraction(self, n: int) -> float | None:
        return self.inner.contraction(n)

    def variance(self, n: int) -> float | None:
        return self.inner.variance(n)

    def _around(self, inner: Codec) -> Codec:
        return replace(self, inner=inner)  # type: ignore[type-var]


def check_left(stage: str, inner: Codec) -> None:
    """Refuse a lossless stage after another one."""
    if inner.squeezes:
        raise ConfigError(
            f"{inner.spec} | {stage}: the left side already writes as few bytes as it can",
            expected=f"a codec that squeezes no bytes before {stage}",
            mend="use one such stage, at the end",
        )


def planes(field: Tensor) -> Bytes:
    """The bytes of a field of any dtype by their position, on the CPU.  uint8 [bytes an element, elements]"""
    # A tensor of one element counts as contiguous whatever its stride, but view(uint8) looks at the stride.
    flat = field.detach().contiguous().as_strided(field.shape, (1,))
    raw = flat.view(torch.uint8).view(-1, field.element_size())
    return raw.t().contiguous().cpu().numpy()


def from_planes(rows: Bytes, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The inverse of `planes`; the field keeps no hold on `rows` unless elements have one byte."""
    return torch.from_numpy(rows).t().contiguous().view(-1).view(dtype).to(device)
