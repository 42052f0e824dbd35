"""Layers: every parameter of a vector is written on its own.

    C(x) = (C_1(x_1), ..., C_L(x_L))        x_l the elements of the l-th parameter

A layer whose entries are small beside another's still gets its share of what is sent, and each may have a codec of its
own. Parameters of one dimension (biases, norms), or of fewer than `small` elements, go at full precision: there is
nothing to be saved on them.

Error   the largest relative error among the layers' codecs: delta = min_l delta_l, omega = max_l omega_l.
Size    the layers' together; four bytes more for each field of a layer if the codecs' sizes vary.
Source  layer-wise compression is how most published systems apply their codecs; that small tensors stay as they are is
        the practice of Lin et al. 2018, arXiv:1712.01887 and Markov et al. 2022, arXiv:2111.08617.
Avoid   where a model has many small matrices: one vector for all needs no share for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from thinwire.codecs.base import Codec, Shapes, Traits, require
from thinwire.codecs.options import call, changed, is_whole
from thinwire.codecs.precision import fp32
from thinwire.errors import ConfigError, PacketError
from thinwire.packet import Fields, Layout
from thinwire.randomness import mix

_SMALL = 1024

#: A layer: its codec and its elements.
Layer = tuple[Codec, int]


@dataclass(frozen=True)
class Layers(Codec):
    """A codec for each parameter; see `layers`.

    codecs  one for all parameters that are not small, or as many as there are such parameters
    small   elements below which a parameter is written as it is
    fitted  every parameter in order, once shapes are known; without, a vector is one layer
    label   stands for `spec` where a composition was agreed on that is too long to be told in every packet
    """

    codecs: tuple[Codec, ...]
    small: int = _SMALL
    fitted: tuple[Layer, ...] = ()
    label: str = ""

    def __post_init__(self) -> None:
        strangers = [codec for codec in self.codecs if not isinstance(codec, Codec)]
        if strangers or not self.codecs:
            raise ConfigError(
                f"layers of {strangers[0]!r}" if strangers else "layers without a codec",
                expected="a codec for all layers, or one for each",
                mend="write layers(topk(1/64)); error feedback goes around: feedback(layers(topk(1/64)))",
            )
        if not is_whole(self.small, 0):
            raise ConfigError(
                f"layers are to be small below {self.small!r} elements",
                expected="a whole number of at least 0",
                mend=f"leave it out for {_SMALL}; 0 writes matrices of any size with the codec",
            )

    @property
    def spec(self) -> str:
        return self.label or call("layers", *(codec.spec for codec in self.codecs), **changed(self, "small"))

    @property
    def traits(self) -> Traits:
        traits = [codec.traits for codec in self.codecs]
        return Traits(
            lossless=all(t.lossless for t in traits),
            unbiased=all(t.unbiased for t in traits),
            fixed_size=all(t.fixed_size for t in traits),
            reencodes=all(t.reencodes for t in traits),
            wants_feedback=any(t.wants_feedback for t in traits),
        )

    def fit(self, shapes: Shapes) -> Layers:
        sizes = [math.prod(shape) for shape in shapes]
        large = [len(shape) > 1 and size >= self.small for shape, size in zip(shapes, sizes, strict=True)]
        if len(self.codecs) not in (1, sum(large)):
            raise ConfigError(
                f"{len(self.codecs)} codecs for {sum(large)} parameters that are not small",
                expected=f"one for all of them, or {sum(large)}",
                mend="give one codec, or change `small`",
            )
        given = iter(self.codecs if len(self.codecs) > 1 else self.codecs * sum(large))
        fitted = tuple(
            ((next(given) if big else fp32).fit((shape,)), size)
            for shape, size, big in zip(shapes, sizes, large, strict=True)
        )
        return replace(self, fitted=fitted)

    @property
    def leads(self) -> tuple[Codec, ...]:
        return tuple(lead for codec in self.codecs for lead in codec.leads)

    def lead(self, change: Callable[[Codec], Codec]) -> Layers:
        return self._each(lambda codec: codec.lead(change))

    @property
    def selection(self) -> Layers:
        return self._each(lambda codec: codec.selection)

    def _each(self, change: Callable[[Codec], Codec]) -> Layers:
        """The same with every layer's codec changed."""
        fitted = tuple((change(codec), size) for codec, size in self.fitted)
        return replace(self, codecs=tuple(map(change, self.codecs)), fitted=fitted, label="")

    def part(self, begin: int, end: int) -> Layers:
        if not self.fitted:
            return self
        cut, start = [], 0
        for codec, size in self.fitted:
            a, b = max(begin - start, 0), min(end - start, size)
            if a < b:
                cut.append((codec if b - a == size else codec.part(a, b), b - a))
            start += size
        return replace(self, fitted=tuple(cut))

    def layout(self, n: int) -> Layout:
        layout: dict[str, tuple[torch.dtype, int]] = {}
        due = self._due(n)
        for dtype, count in due:
            name = str(dtype).removeprefix("torch.")
            layout[name] = (dtype, layout.get(name, (dtype, 0))[1] + count)
        return layout if self.traits.fixed_size else {"size": (torch.int32, len(due)), **layout}

    def encode(self, x: Tensor, key: int) -> Fields:
        written: list[Tensor] = []
        for number, (codec, start, size) in enumerate(self._layers(len(x))):
            written += codec.encode(x[start : start + size], mix(key, number)).values()
        fields: dict[str, Tensor] = {}
        for name, (dtype, _) in self.layout(len(x)).items():
            if name == "size":
                fields[name] = torch.tensor([field.numel() for field in written], dtype=torch.int32, device=x.device)
            else:
                fields[name] = torch.cat([field for field in written if field.dtype == dtype])
        return fields

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        layout, fixed = self.layout(n), self.traits.fixed_size
        require(fields, layout, exact=fixed)
        found = self._cut(fields, n)
        parts = []
        for number, (codec, _, size) in enumerate(self._layers(n)):
            parts.append(codec.decode({name: next(found) for name in codec.layout(size)}, size, mix(key, number)))
        return torch.cat(parts) if parts else next(iter(fields.values())).new_zeros(0, dtype=torch.float32)

    def _cut(self, fields: Fields, n: int) -> Iterator[Tensor]:
        """The layers' fields in order, each checked to lie within what arrived."""
        due = self._due(n)
        counts = fields["size"].tolist() if "size" in fields else [count for _, count in due]
        if len(counts) != len(due):
            raise PacketError(f"field 'size' has {len(counts)} entries", expected=f"{len(due)} entries")
        used = dict.fromkeys(fields, 0)
        pieces = []
        for (dtype, most), count in zip(due, counts, strict=True):
            name = str(dtype).removeprefix("torch.")
            at, used[name] = used[name], used[name] + count
            if not 0 <= count <= most or used[name] > fields[name].numel():
                raise PacketError(f"field 'size' says {count} elements of {name}", expected=f"at most {most}")
            pieces.append(fields[name][at : at + count])
        wrong = [name for name in fields if name != "size" and used[name] != fields[name].numel()]
        if wrong:
            raise PacketError(
                f"field {wrong[0]!r} has {fields[wrong[0]].numel()} elements", expected=f"{used[wrong[0]]} elements"
            )
        return iter(pieces)

    def contraction(self, n: int) -> float | None:
        deltas = [codec.contraction(size) for codec, size in self._classes(n)]
        known = [delta for delta in deltas if delta is not None]
        return min(known, default=1.0) if len(known) == len(deltas) else None

    def variance(self, n: int) -> float | None:
        omegas = [codec.variance(size) for codec, size in self._classes(n)]
        known = [omega for omega in omegas if omega is not None]
        return max(known, default=0.0) if len(known) == len(omegas) else None

    def _classes(self, n: int) -> tuple[Layer, ...]:
        """The layers of n elements in all; of a number that is not theirs, its codecs as if each had all."""
        if self.fitted and sum(size for _, size in self.fitted) == n:
            return self.fitted
        return tuple((codec, n) for codec in self.codecs)

    def _layers(self, n: int) -> list[tuple[Codec, int, int]]:
        """Codec, first element and number of elements of every layer of n elements in all."""
        layers = self.fitted or ((self.codecs[0], n),)
        if sum(size for _, size in layers) != n:
            raise PacketError(
                f"{n} elements", expected=f"{sum(size for _, size in layers)}: the elements of the layers' shapes"
            )
        placed, start = [], 0
        for codec, size in layers:
            placed.append((codec, start, size))
            start += size
        return placed

    def _due(self, n: int) -> list[tuple[torch.dtype, int]]:
        """Dtype and elements of every field of every layer, in order; upper bounds if sizes vary."""
        return [due for codec, _, size in self._layers(n) for due in codec.layout(size).values()]


def layers(*codecs: Codec, small: int = _SMALL) -> Layers:
    """Every parameter written on its own: `layers(topk(1/64) | int4)`."""
    return Layers(codecs, small)
