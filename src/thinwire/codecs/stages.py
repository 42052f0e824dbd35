"""Rounds of several exchanges: what PowerSGD, sketches that are fetched and budgets that are agreed on have in common.

A staged codec is written down as a generator. It yields what is to be combined next and is sent what became of it, so
that it reads like its paper's algorithm box and knows nothing of links:

    def run(self, x, shared, key):
        combined, sent = yield Stage(x)             # one exchange, by the method's own aggregator, at full precision
        return Result(combined, sent, shared)

Every member runs the same stages with vectors of the same lengths, whatever its data and whatever came of the stages
before: how many there are, and how long, may follow from shapes and from `shared` alone, since a member that lost a
packet on the way goes on with zeros. One whose values are not finite runs them with zeros and is not counted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn

from torch import Tensor

from thinwire.aggregators import Aggregator
from thinwire.codecs.base import Codec, Shapes
from thinwire.codecs.precision import FP32
from thinwire.errors import ConfigError

#: What is remembered from round to round, by name; a value that nobody writes to.
Tensors = Mapping[str, Tensor]

_REFERENCE = 1 << 16  # elements for which a codec's class is asked


@dataclass(frozen=True)
class Stage:
    """One exchange.

    vector  float32 [any], finite
    codec   how it is written; the same on all members
    rule    how the vectors are merged; None is the method's own aggregator
    whole   whether the vector is x itself or the same part of it in every round, so that what a second encoding drops
            of it may go with the next round's; factors and sketches mean something else in every round
    """

    vector: Tensor
    codec: Codec = field(default_factory=FP32)
    rule: Aggregator | None = None
    whole: bool = False


class Exchanged(NamedTuple):
    """What a stage is answered with.

    combined  the merged vector, the same bits on all members; zeros if nothing came of it
    sent      what the others read of this member's vector
    """

    combined: Tensor
    sent: Tensor


@dataclass(frozen=True)
class Result:
    """The end of a staged round.

    update  [n] the same on all members
    sent    [n] this member's share of it: what error feedback counts as sent
    shared  to be remembered, alike on all members
    """

    update: Tensor
    sent: Tensor
    shared: Tensors


#: A round under way: yields stages, is sent what became of them, returns its result.
Stages = Generator[Stage, Exchanged, Result]


class Staged(ABC):
    """How a vector is written when that takes several exchanges. Subclasses are final and frozen dataclasses.

    What they remember (a warm start, a sketch of errors, a choice of options) is the same on all members; what a member
    remembers for itself is error feedback's.
    """

    @property
    @abstractmethod
    def spec(self) -> str:
        """Canonical expression; `thinwire.codecs.parse(staged.spec) == staged`."""

    @property
    @abstractmethod
    def wants_feedback(self) -> bool:
        """Whether it loses so much that it needs error feedback to converge."""

    @property
    def contractive(self) -> bool:
        """Whether ||x - sent||^2 <= (1 - delta) ||x||^2 for some delta > 0: what error feedback asks for."""
        return True

    @property
    def needs_shapes(self) -> bool:
        """Whether it saves nothing on a vector that is not made of whole parameters."""
        return False

    @property
    def selects(self) -> bool:
        """Whether it keeps elements of the vector, rounded or not, and drops the others."""
        return False

    def fit(self, shapes: Shapes) -> Staged:
        """The codec for vectors that hold parameters of these shapes; itself, unless shapes mean something to it."""
        return self

    @abstractmethod
    def run(self, x: Tensor, shared: Tensors, key: int) -> Stages:
        """A round.

        x       float32 [n], finite; not changed
        shared  what the last committed round's result held; empty before the first; not changed
        key     64-bit, the same on all members
        """

    def __or__(self, then: object) -> NoReturn:
        raise ConfigError(
            f"{self.spec} | ...: it is no codec but a round of several exchanges",
            expected="codecs on both sides of |",
            mend=f"see `thinwire codecs {self.spec.split('(')[0]}` for its own options",
        )


def wants_feedback(codec: Codec | Staged) -> bool:
    """Whether it needs error feedback to converge."""
    return codec.traits.wants_feedback if isinstance(codec, Codec) else codec.wants_feedback


def is_contractive(codec: Codec | Staged) -> bool:
    """Whether a delta above zero is claimed."""
    if isinstance(codec, Staged):
        return codec.contractive
    delta = codec.contraction(_REFERENCE)
    return delta is not None and delta > 0
