"""The codec contract: a flat float32 vector becomes named fields, and fields become a vector again.

A codec is a frozen dataclass of its options. It has no memory (error feedback is a wrapper, feedback/), reads no
clock and no global generator: equal input, options and key give equal fields on every member and device kind.
What it promises it declares in `traits`, `layout`, `contraction` and `variance`; tests/conformance holds it to that.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from thinwire.errors import ConfigError, PacketError
from thinwire.packet import Fields, Layout

#: Shapes of the parameters whose elements a vector holds, one after the other.
Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Traits:
    """What a codec promises of every input.

    lossless        decode(encode(x)) equals x to the bit
    unbiased        the mean of decode(encode(x, key)) over keys is x
    linear          its one field is a float32 vector, linear in x to float32 rounding, so that the members' fields add
                    up to the field of their sum: a plain all-reduce carries it
    summable        `add` joins what several members wrote without decoding it, and the sum decodes to the sum of what
                    each wrote, exactly: a reduce-scatter of packets carries it
    fixed_size      `layout` is exact; otherwise it is an upper bound
    reencodes       may be applied again to a combined result at a second, bounded loss (a quantiser may; a
                    sparsifier would drop what other members kept)
    wants_feedback  loses so much that it needs error feedback to converge
    """

    lossless: bool = False
    unbiased: bool = False
    linear: bool = False
    summable: bool = False
    fixed_size: bool = True
    reencodes: bool = True
    wants_feedback: bool = False


class Codec(ABC):
    """How a vector is written. Subclasses are final and frozen dataclasses."""

    #: Name of the float32 field that a later codec in a chain may encode in its turn; None if there is none. The field
    #: holds coordinates of x in an orthonormal basis (elements as they are, or cosine coefficients), all times one
    #: constant; `decode` takes zeros for those not kept. That is why a chain's bounds multiply (chain.py).
    values: str | None = None
    #: Whether it is a lossless stage around another codec's bytes; a second one after it is refused.
    squeezes: bool = False

    @property
    @abstractmethod
    def spec(self) -> str:
        """Canonical expression; `thinwire.codecs.parse(codec.spec) == codec`."""

    @property
    @abstractmethod
    def traits(self) -> Traits:
        """What it promises."""

    @abstractmethod
    def layout(self, n: int) -> Layout:
        """Fields written for n elements, in order: name -> (dtype, elements). An upper bound if the size varies."""

    @abstractmethod
    def encode(self, x: Tensor, key: int) -> Fields:
        """Write a vector.

        x        float32 [n], finite, on any device; it is not changed
        key      64-bit; codecs that round at random draw from it (see thinwire.randomness)
        returns  fields as `layout(n)` says, on x's device
        """

    @abstractmethod
    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        """Read a vector.

        n        elements expected; the caller knows it, a packet is not believed
        key      that `encode` was given: what follows from it (chosen indices, signs) need not be sent
        returns  float32 [n], on the fields' device
        raises   PacketError if the fields cannot come from `encode` of n elements
        """

    def fit(self, shapes: Shapes) -> Codec:
        """The codec for vectors that hold parameters of these shapes; itself, unless shapes mean something to it.

        A fitted codec has the same `spec`: members agree on the model's shapes when they meet.
        """
        return self

    def part(self, begin: int, end: int) -> Codec:
        """The codec for elements [begin, end) of the vector alone, combined on their own; it may be itself."""
        return self

    @property
    def leads(self) -> tuple[Codec, ...]:
        """Those that the vector itself is given to: a chain's first. Overridden by codecs that go around others."""
        return (self,)

    def lead(self, change: Callable[[Codec], Codec]) -> Codec:
        """The same with each of `leads` changed."""
        return change(self)

    @property
    def selection(self) -> Codec:
        """What of it selects, without what is done to the selected values; itself, unless it goes around others."""
        return self

    @property
    @final
    def selects(self) -> bool:
        """Whether it keeps elements of the vector, rounded or not, and drops the others."""
        return all(codec.values is not None for codec in self.leads)

    def add(self, contributions: Sequence[Fields], n: int) -> Fields:
        """Join what several members wrote of n elements each, for summable codecs.

        raises  PacketError if a contribution cannot come from `encode` of n elements
        """
        raise NotImplementedError(f"{self.spec} does not declare that it is summable")

    def contraction(self, n: int) -> float | None:
        """Largest delta claimed with E||C(x) - x||^2 <= (1 - delta) ||x||^2; None claims nothing."""
        return 1.0 if self.traits.lossless else None

    def variance(self, n: int) -> float | None:
        """Smallest omega claimed with E||C(x) - x||^2 <= omega ||x||^2, for unbiased codecs; None claims nothing."""
        return 0.0 if self.traits.lossless else None

    def after(self, first: Codec) -> Codec:
        """The chain `first | self`; overridden by codecs that work on bytes."""
        from thinwire.codecs.chain import Chain

        return Chain(first, self)

    @final
    def __or__(self, then: Codec) -> Codec:
        """`topk(1/64) | int4 | zstd`: write with the left one, then its values or bytes with the right one."""
        if not isinstance(then, Codec):
            raise ConfigError(
                f"{self.spec} | {then!r}: the right side is no codec",
                expected="a codec on both sides of |",
                mend="error feedback goes around the whole chain: feedback(topk(1/64) | int4)",
            )
        return then.after(self)


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a parameter seen as a matrix: the first dimension, and all others; a vector has one row."""
    rows = shape[0] if len(shape) > 1 else 1
    return rows, math.prod(shape) // max(1, rows)


def require(fields: Fields, layout: Layout, *, exact: bool = True) -> None:
    """Check decoded fields against what was due.

    raises  PacketError naming the first field that is missing, surplus, of another type or of another length
    """
    if list(fields) != list(layout):
        raise PacketError(f"fields {list(fields)}", expected=f"fields {list(layout)}")
    for name, (dtype, count) in layout.items():
        got = fields[name]
        if got.dtype != dtype or got.ndim != 1 or (got.numel() != count if exact else got.numel() > count):
            raise PacketError(
                f"field {name!r} is {got.dtype} {list(got.shape)}",
                expected=f"{dtype} [{count}]" if exact else f"{dtype} [at most {count}]",
            )
