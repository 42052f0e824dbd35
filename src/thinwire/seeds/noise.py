"""What a direction's entries are: kinds of z, each a function of Philox words (philox.py) by its own few bits.

    rademacher    z = 1 - 2 b, a bit b an element              E z z^T = I, and |z|^2 = n exactly
    binomial      z = (popcount of 64 bits - 32) / 4           E z z^T = I; nearly normal: kurtosis 3 - 1/32
    sparse(q, z)  z in a share q of the layers, drawn by seed; zero in the others        E z z^T = q I

A product c z must be exact, so that w - c z is rounded once, with or without fused multiply-add: that of rademacher is;
for binomial c is rounded to 16 significant bits first.

Cost    of a direction's element: rademacher 1/128 of a Philox block, binomial half a one: sixty times as much
Source  Rademacher: Spall 1992 (SPSA). Sparse over layers: Wang et al. 2024, arXiv:2410.09823 (LeZO).
Differs LeZO keeps a fixed number of layers a step; here every layer is drawn by itself, so that it can be drawn without
        the others, and a seed may reach none. What remains of a sparse direction is not scaled up by 1/q: a step is of
        the size that its learning rate says, in fewer layers, and its mean is q times the gradient. No normal
        distribution: logarithms and cosines differ from library to library in the last bit, and a member that differs
        there is lost for good.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from thinwire.codecs.memory import Scratch
from thinwire.codecs.options import call, check_share
from thinwire.errors import ConfigError
from thinwire.expressions import Words, evaluate
from thinwire.seeds.philox import draw, tensor_id
from thinwire.seeds.tables import ROWS, by_table

#: Arrays are numpy's on a processor and torch's elsewhere.
#: Writes c z of some elements into its second argument, float32, from their words, its first.
Times = Callable[[Any, Any], None]
#: Writes a sum of such products for elements `begin` to `end` of a span, both at whole blocks, into its third argument;
#: the fourth is spare, of the same length.
Sum = Callable[[int, int, Any, Any], None]

_LAYER = re.compile(r"^(.*?[0-9])\.")  # part of the portable definition: not to follow whatever fragments.py does
_LAYERS = 2  # the Philox stream that says which layers a seed perturbs
_SIGNS = 1 - 2 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").astype(np.float32)


class Noise(Protocol):
    """A kind of z."""

    @property
    def spec(self) -> str:
        """Its canonical expression: what members compare and logs hold."""

    @property
    def per_block(self) -> int:
        """Elements that a Philox block of 128 bits gives."""

    def times(self, c: float) -> Times:
        """What multiplies z by a float32 number."""

    def sum(self, scalars: Sequence[float], words: Any, scratch: Scratch) -> Sum:
        """What adds up ((c1 z1 + c2 z2) + ...) + cg zg, one to eight products.

        words  int32 [g, w] of a whole span, contiguous; may be overwritten
        """

    def reaches(self, seeds: Sequence[int], names: Sequence[str]) -> np.ndarray | None:
        """Which parameters a seed perturbs.  bool [len(seeds), len(names)]; None: every seed all of them"""


@dataclass(frozen=True)
class Rademacher:
    """Signs: element j is negative where bit j % 32 of word j // 32 is set."""

    @property
    def spec(self) -> str:
        return "rademacher"

    @property
    def per_block(self) -> int:
        return 128

    def times(self, c: float) -> Times:
        """Eight elements at a time, from a table of what a byte of signs makes of c."""
        table = _SIGNS * np.float32(c)  # [256, 8]

        def scaled(words: Any, out: Any) -> None:
            if isinstance(words, Tensor):
                places = torch.arange(32, dtype=torch.int32, device=words.device)
                bits = (words.unsqueeze(1) >> places).bitwise_and_(1)  # [w, 32]
                out.view(-1, 32).copy_(bits).mul_(-2).add_(1).mul_(c)
            else:
                rows = out.reshape(-1, 8)
                table.take(words.view(np.uint8), axis=0, out=rows, mode="clip")  # the mode "raise" would copy `out`

        return scaled

    def sum(self, scalars: Sequence[float], words: Any, scratch: Scratch) -> Sum:
        if len(scalars) < ROWS or isinstance(words, Tensor):
            return _one_by_one(self, scalars, words)
        return by_table(scalars, words, scratch)

    def reaches(self, seeds: Sequence[int], names: Sequence[str]) -> np.ndarray | None:
        return None


@dataclass(frozen=True)
class Binomial:
    """Of 64 bits, how many more are set than half of them, in units of the standard deviation: -8 to 8 in quarters."""

    @property
    def spec(self) -> str:
        return "binomial"

    @property
    def per_block(self) -> int:
        return 2

    def times(self, c: float) -> Times:
        quarter = _short(c) / 4

        def scaled(words: Any, out: Any) -> None:
            out[:] = _popcount(words.view(torch.int64 if isinstance(words, Tensor) else np.int64)) - 32
            out *= quarter

        return scaled

    def sum(self, scalars: Sequence[float], words: Any, scratch: Scratch) -> Sum:
        return _one_by_one(self, scalars, words)

    def reaches(self, seeds: Sequence[int], names: Sequence[str]) -> np.ndarray | None:
        return None


@dataclass(frozen=True)
class Sparse:
    """A seed perturbs a layer with probability `share`, and leaves it out otherwise.

    share  of layers; a layer is the parameters whose names begin alike up to the first number ("blocks.3."), and a
           parameter without number is one by itself
    kind   of z in the layers that are perturbed
    """

    share: float
    kind: Rademacher | Binomial = field(default_factory=Rademacher)

    def __post_init__(self) -> None:
        check_share(
            "sparse", self.share, of="layers a seed perturbs", mend="sparse(0.25) for a quarter", verb="perturb"
        )
        if not isinstance(self.kind, Rademacher | Binomial):
            raise ConfigError(
                f"sparse of {self.kind!r}", expected="rademacher or binomial", mend="sparse(0.25, binomial)"
            )

    @property
    def spec(self) -> str:
        kind = [] if self.kind == Rademacher() else [self.kind.spec]
        return call("sparse", repr(self.share), *kind)

    @property
    def per_block(self) -> int:
        return self.kind.per_block

    def times(self, c: float) -> Times:
        return self.kind.times(c)

    def sum(self, scalars: Sequence[float], words: Any, scratch: Scratch) -> Sum:
        return self.kind.sum(scalars, words, scratch)

    def reaches(self, seeds: Sequence[int], names: Sequence[str]) -> np.ndarray | None:
        layers = tuple(layer_of(name) for name in names)
        unique = tuple(dict.fromkeys(layers))
        place = {layer: index for index, layer in enumerate(unique)}
        return _drawn(tuple(seeds), unique, int(self.share * 2**32))[:, [place[layer] for layer in layers]]


def _one_by_one(noise: Noise, scalars: Sequence[float], words: Any) -> Sum:
    times = [noise.times(c) for c in scalars]
    per_block = noise.per_block

    def add(begin: int, end: int, u: Any, spare: Any) -> None:
        its = slice(4 * begin // per_block, 4 * end // per_block)
        for row, product in enumerate(times):
            product(words[row, its], spare if row else u)
            if row:
                u += spare

    return add


def layer_of(name: str) -> str:
    """The layer of a parameter: its name up to the first number, or all of it."""
    found = _LAYER.match(name)
    return found.group(1) if found else name


@lru_cache(maxsize=256)  # a tensor after the other asks for the same
def _drawn(seeds: tuple[int, ...], layers: tuple[str, ...], below: int) -> np.ndarray:
    """Whether a seed's word for a layer is below a threshold.  bool [len(seeds), len(layers)]"""
    ids = torch.tensor([tensor_id(layer) for layer in layers], dtype=torch.int64)
    first = draw(seeds, ids, torch.zeros_like(ids), stream=_LAYERS)[:, ::4]
    return first.numpy().view(np.uint32) < below if below < 1 << 32 else np.ones(first.shape, dtype=bool)


def _short(c: float) -> float:
    """A float32 number with 16 significant bits: the nearest, the even one of two that are equally near."""
    bits = int(np.float32(c).view(np.uint32))
    return float(np.uint32((bits + 0x7F + (bits >> 8 & 1)) & 0xFFFFFF00).view(np.float32))


def _popcount(x: Any) -> Any:
    """Bits that are set in each int64."""
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (x * 0x0101010101010101 >> 56) & 0x7F


NOISES = {"rademacher": Rademacher, "binomial": Binomial, "sparse": Sparse}
_WORDS = Words("kind of noise", NOISES, "rademacher or sparse(0.25)", "docs/perturbations.md")


def parse(expression: str) -> Noise:
    """The kind that an expression stands for: "rademacher", "sparse(0.25, binomial)".

    raises  ConfigError naming what is unknown, and what there is
    """
    kind = evaluate(expression, _WORDS)
    if not isinstance(kind, Rademacher | Binomial | Sparse):
        raise ConfigError(
            f"{expression!r} is no kind of noise",
            expected="one of " + ", ".join(sorted(NOISES)),
            mend=f"write {_WORDS.example}; docs/perturbations.md says what each of them is",
        )
    return kind
