"""Two codecs in a row: the second writes the float32 values that the first one left.

    encode   fields = first.encode(x); fields[values] -> values.* = then.encode(fields[values])

`first | then` builds it. The fields of `then` carry the name of the field they stand for: "value.code".

Error   `first` keeps some coordinates of an orthonormal basis and drops the others (see Codec.values), and `then`
        errs on those kept alone, so the two errors are at right angles: delta = delta_1 delta_2; and
        omega = omega_1 + omega_2 + omega_1 omega_2.
Size    first's without the values, and then's of as many elements as there were values.
Source  Basu et al. 2019, arXiv:1906.02367 (quantisers composed with top-k).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from thinwire.codecs.base import Codec, Shapes, Traits, require
from thinwire.errors import ConfigError
from thinwire.packet import Fields, Layout
from thinwire.randomness import mix

T = TypeVar("T")


@dataclass(frozen=True)
class Chain(Codec):
    """`first | then`; chains lean left, so that every expression has one form."""

    first: Codec
    then: Codec

    def __post_init__(self) -> None:
        if isinstance(self.then, Chain):
            object.__setattr__(self, "first", Chain(self.first, self.then.first))
            object.__setattr__(self, "then", self.then.then)
        if self.first.values is None:
            raise ConfigError(
                f"{self.spec}: {self.first.spec} leaves no float32 values that {self.then.spec} could write",
                expected="on the left of | a codec that leaves values to be written: topk, dct, rotation, fp32",
                mend=f"take one of the two, or put {self.first.spec} last",
            )
        if not self.then.traits.fixed_size:
            raise ConfigError(
                f"{self.spec}: a codec of variable size inside a chain",
                expected="every codec but the last to have a fixed size",
                mend="join them with |, which puts it around the whole chain",
            )
        # What the chain leaves for a third codec; not an option, so no dataclass field.
        inner = self.then.values
        object.__setattr__(self, "values", None if inner is None else f"{self.first.values}.{inner}")

    @property
    def spec(self) -> str:
        return f"{self.first.spec} | {self.then.spec}"

    @property
    def traits(self) -> Traits:
        a, b = self.first.traits, self.then.traits
        return Traits(
            lossless=a.lossless and b.lossless,
            unbiased=a.unbiased and b.unbiased,
            linear=a.linear and b.linear,
            fixed_size=a.fixed_size and b.fixed_size,
            reencodes=a.reencodes and b.reencodes,
            wants_feedback=a.wants_feedback or b.wants_feedback,
        )

    def layout(self, n: int) -> Layout:
        return self._with_values(self.first.layout(n), self.then.layout(self._num_values(n)))

    def encode(self, x: Tensor, key: int) -> Fields:
        fields = self.first.encode(x, key)
        # Another key for the second: the two round independently of each other.
        return self._with_values(fields, self.then.encode(fields[self._values], mix(key, 1)))

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        require(fields, self.layout(n), exact=self.traits.fixed_size)
        due, prefix = self.first.layout(n), f"{self._values}."
        written = {name.removeprefix(prefix): field for name, field in fields.items() if name.startswith(prefix)}
        values = self.then.decode(written, due[self._values][1], mix(key, 1))
        return self.first.decode({name: values if name == self._values else fields[name] for name in due}, n, key)

    def fit(self, shapes: Shapes) -> Codec:
        return Chain(self.first.fit(shapes), self.then)  # the values that `then` writes have lost their shapes

    @property
    def leads(self) -> tuple[Codec, ...]:
        return self.first.leads

    def lead(self, change: Callable[[Codec], Codec]) -> Codec:
        return Chain(self.first.lead(change), self.then)

    @property
    def selection(self) -> Codec:
        return self.first.selection

    def part(self, begin: int, end: int) -> Codec:
        return Chain(self.first.part(begin, end), self.then)

    def contraction(self, n: int) -> float | None:
        first, then = self.first.contraction(n), self.then.contraction(self._num_values(n))
        return None if first is None or then is None else first * then

    def variance(self, n: int) -> float | None:
        first, then = self.first.variance(n), self.then.variance(self._num_values(n))
        return None if first is None or then is None else first + then + first * then

    @property
    def _values(self) -> str:
        assert self.first.values is not None  # refused when composed
        return self.first.values

    def _num_values(self, n: int) -> int:
        return self.first.layout(n)[self._values][1]

    def _with_values(self, first: Mapping[str, T], then: Mapping[str, T]) -> dict[str, T]:
        """What `first` has, in its order, with what `then` has in the place of the values."""
        joined: dict[str, T] = {}
        for name, item in first.items():
            joined |= {f"{name}.{inner}": i for inner, i in then.items()} if name == self._values else {name: item}
        return joined
