"""The feedback contract: what members remember of a lossy codec's rounds, so that what it dropped is not lost.

A scheme goes around a codec and has two memories. `own` is a member's: what it still owes. `shared` is the same on all
members: what they know of each other. Both are values; the synchronizer keeps them, commits them together with the
round, and keeps the old ones when the round fails or the member was not counted in it:

    prepare   x, own, shared  ->  target to encode, own as it stands before the round is known
    commit    own of prepare, what was sent  ->  own after the round
    receive   the combined targets, shared  ->  the update, shared after the round

Joining and leaving. A member counts as left out of a round when its values were not finite or it had no samples: its
`own` stays as it was, and `receive` is told which share of the members took part. A group that resumes with other
members starts with empty memories on all of them, since `shared` is about members who are no longer there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import NoReturn, Self

from torch import Tensor

from thinwire.codecs.base import Codec, Shapes
from thinwire.codecs.stages import Staged, Tensors, is_contractive
from thinwire.errors import ConfigError

_REFERENCE = 1 << 16  # elements for which a codec's class is asked


@dataclass(frozen=True)
class Place:
    """Where a member stands in a round: its rank among those that combine, ascending."""

    rank: int
    ranks: tuple[int, ...]


class Feedback(ABC):
    """A memory around a codec; no codec itself, since it has state. Subclasses are final and frozen dataclasses."""

    codec: Codec | Staged

    #: Whether `shared` is the mean of what members hold in `own`, but for what second encodings have dropped and still
    #: owe: then a member must weigh the same in every round.
    tracks: bool = False
    #: Whether it says itself what a member weighs.
    weighs: bool = False
    #: Whether local steps are corrected between rounds (`drift`).
    corrects: bool = False

    @property
    def keeps(self) -> float | None:
        """Share of what the second encoding of a combined shard dropped that goes with the next round's.

        None: nothing is encoded a second time, so that what is combined is what was sent, to rounding.
        """
        return 1.0

    @property
    def accelerates(self) -> bool:
        """Whether it has a momentum of its own, so that an optimizer that is fed with its gradients is to have none."""
        return False

    @property
    @abstractmethod
    def spec(self) -> str:
        """Canonical expression; `thinwire.codecs.parse(feedback.spec) == feedback`."""

    def fit(self, shapes: Shapes) -> Self:
        """The same memory around the fitted codec."""
        return replace(self, codec=self.codec.fit(shapes))  # type: ignore[type-var]

    @abstractmethod
    def prepare(self, x: Tensor, own: Tensors, shared: Tensors, place: Place) -> tuple[Tensor, Tensors]:
        """What to encode, and what to hold until the round is known.

        x        float32 [n], finite; not changed, nor are the memories; its memory is the caller's: after the round
                 something else may be in it
        own      as the last committed round left it; empty before the first
        shared   likewise
        returns  target [n] for the codec, and what `commit` is given
        """

    @abstractmethod
    def commit(self, target: Tensor, held: Tensors, sent: Tensor) -> Tensors:
        """`own` after a round that counted this member; `sent` [n] is what others read of `target`."""

    def receive(self, combined: Tensor, shared: Tensors, share: float) -> tuple[Tensor, Tensors]:
        """The update [n], and `shared` after the round.

        combined  [n] what the aggregator made of the targets of those who took part
        share     as below
        """
        return combined, shared

    def weight(self, place: Place) -> float | None:
        """What this member's contributions weigh; None leaves it to the samples it has seen."""
        return None

    def share(self, present: tuple[int, ...], ranks: tuple[int, ...]) -> float:
        """Of the members' weight, how much took part; in (0, 1]."""
        return len(present) / len(ranks)

    def drift(self, own: Tensors, shared: Tensors) -> Tensor | None:
        """What the local steps of one round are to be corrected by, in units of parameters; None for nothing.  [n]

        Added to the parameters in equal parts, one after each local step.
        """
        return None

    def __or__(self, then: object) -> NoReturn:
        raise ConfigError(
            f"{self.spec} | ...: what follows would be outside the error memory",
            expected="feedback around the whole chain",
            mend=f"write {self.spec.split('(')[0]}({self.codec.spec} | ...)",
        )


def check_codec(name: str, codec: object, *, needs: str = "contractive") -> None:
    """Refuse what a scheme cannot go around.

    needs  the class of codecs that the scheme converges with: "contractive", "unbiased", or "selection", which keeps
           elements and drops the others
    """
    if not isinstance(codec, Codec | Staged):
        raise ConfigError(
            f"{name} around {codec!r}",
            expected="a codec, or a chain of them",
            mend=f"write {name}(topk(1/64) | int4), one feedback around the whole chain",
        )
    if needs == "selection" and not codec.selects:
        raise ConfigError(
            f"{name} around {codec.spec}: it does not keep some elements and drop the others",
            expected="a codec that selects, or a chain that begins with one: topk(1/64), topk(1/64) | int4",
            mend=f"write {name}(topk(1/64)), or feedback({codec.spec})",
        )
    if needs in ("contractive", "selection") and not is_contractive(codec):
        raise ConfigError(
            f"{name} around {codec.spec}: its error may be larger than what it is given, and would grow in the memory",
            expected="a contractive codec: topk, sign, int8 and others whose contraction `thinwire codecs` shows",
            mend="use a finer or a contractive variant, or the codec alone if it is unbiased",
        )
    if needs == "unbiased" and not (isinstance(codec, Codec) and codec.variance(_REFERENCE) is not None):
        raise ConfigError(
            f"{name} around {codec.spec}: it is not unbiased with a bounded variance",
            expected="a codec that is right in the mean: randk(scaled=True), qsgd, int4(rounding='stochastic')",
            mend="use such a codec, or a scheme for contractive ones: feedback, ef21, scafcom",
        )


def followed(combined: Tensor, shared: Tensors, share: float) -> tuple[Tensor, Tensors]:
    """`receive` of schemes whose update is the mean of all members' estimates, each of which grows by what is sent.

    Those who were left out sent nothing, and count as that: hence the share.
    """
    estimate = zeros(shared, "estimate", combined) + share * combined  # two roundings, alike on all processors
    return estimate, {"estimate": estimate}


def zeros(memory: Tensors, name: str, like: Tensor) -> Tensor:
    """A vector of a memory, or zeros before the first round.  [n]"""
    found = memory.get(name)
    return like.new_zeros(len(like)) if found is None else found
