"""EF21-W: EF21 in which members whose losses are rougher weigh more, so that the step may be larger.

    c = C(x / (N w) - g)        g' = g + c        update = sum_i w_i g'_i        w_i = L_i / (L_1 + ... + L_N)

State   as of ef21: own the estimate g of the member's scaled vector, shared the weighted mean of all; float32 [n] each.
Error   as of ef21. The step that theory allows has the mean of the L_i where EF21's first analysis has the root of the
        mean of their squares: never smaller, and by up to sqrt(N) larger if one member is much rougher than the rest.
        What is optimised stays the plain mean of the members' losses: the factor 1 / (N w) makes up for the weights.
Cost    that of ef21, and one pass.
Absent  as in ef21; the weights of those who are there stay what they are.
Source  Richtarik, Gasanov & Burlachenko 2024, arXiv:2402.10774 (Error Feedback Reloaded).
Differs starts from zero, as ef21 does here. The paper shows too that EF21 without weights may take the larger step: at
        equal steps the two need equally many rounds, and with a codec that scales as its input does, such as topk, they
        are one sequence to rounding (tests/identities/test_feedback_convergence.py).
Avoid   where the members' smoothness is alike or not known: ef21 is the same without weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from thinwire.codecs.base import Codec
from thinwire.codecs.feedback.base import Feedback, Place, check_codec, followed, zeros
from thinwire.codecs.options import call, is_number
from thinwire.codecs.stages import Staged, Tensors
from thinwire.errors import ConfigError


@dataclass(frozen=True)
class EF21W(Feedback):
    """Estimates that follow what members send, weighted by the smoothness of their losses.

    codec       what writes the change
    smoothness  L_i of each member's loss, in ascending order of rank; only their ratios matter
    """

    codec: Codec | Staged
    smoothness: tuple[float, ...]
    tracks = True
    weighs = True

    def __post_init__(self) -> None:
        given = self.smoothness
        if not (isinstance(given, tuple | list) and given and all(map(_is_positive, given))):
            raise ConfigError(
                f"ef21w with smoothness {given!r}",
                expected="a finite number above 0 for each member, in order of rank",
                mend="write ef21w(topk(1/64), smoothness=(1, 1, 4)) for three members; equal ones make it ef21",
            )
        object.__setattr__(self, "smoothness", tuple(map(float, given)))
        check_codec("ef21w", self.codec)

    @property
    def spec(self) -> str:
        return call("ef21w", self.codec.spec, smoothness=self.smoothness)

    def prepare(self, x: Tensor, own: Tensors, shared: Tensors, place: Place) -> tuple[Tensor, Tensors]:
        estimate = zeros(own, "estimate", x)
        scale = sum(self.smoothness) / (len(self.smoothness) * self._of(place.rank, place.ranks))
        return (x * scale).sub_(estimate), {"estimate": estimate}

    def commit(self, target: Tensor, held: Tensors, sent: Tensor) -> Tensors:
        return {"estimate": held["estimate"] + sent}

    def receive(self, combined: Tensor, shared: Tensors, share: float) -> tuple[Tensor, Tensors]:
        return followed(combined, shared, share)

    def weight(self, place: Place) -> float:
        return self._of(place.rank, place.ranks) / sum(self.smoothness)

    def share(self, present: tuple[int, ...], ranks: tuple[int, ...]) -> float:
        return sum(self._of(rank, ranks) for rank in present) / sum(self.smoothness)

    def _of(self, rank: int, ranks: tuple[int, ...]) -> float:
        if len(ranks) != len(self.smoothness):
            raise ConfigError(
                f"ef21w with the smoothness of {len(self.smoothness)} members, in a group of {len(ranks)}",
                expected="one number for each member",
                mend="give as many numbers as there are members, or use ef21, which needs none",
            )
        return self.smoothness[ranks.index(rank)]


def _is_positive(value: object) -> bool:
    return is_number(value) and math.isfinite(value) and value > 0


ef21w = EF21W
