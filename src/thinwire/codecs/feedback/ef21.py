"""EF21: send what is new. A member's estimate of its vector follows the vector, and all know the estimates' mean.

    c = C(x - g)        g' = g + c        update = mean of all g'

State   own: the estimate g, float32 [n]; shared: the mean of all members' estimates, [n]. Both begin at zero.
Error   ||x - g'||^2 <= (1 - delta) ||x - g||^2: if vectors settle, as they do at an optimum, estimates become exact.
        So it converges with any contractive C and a constant step however much members' data differ, where `feedback`
        stops at a distance. With noisy vectors its floor is above `feedback`'s: see ef21_sgdm.
Cost    one decoding and three passes a round, 8n bytes of memory.
Absent  a member that is left out keeps its estimate, and the mean of all goes on holding it. If one member has lost its
        memory, or the group has changed, all begin at zero.
Source  Richtarik, Sokolov & Fatkhullin 2021, arXiv:2106.05203.
Differs estimates begin at zero rather than at a first vector sent in full: the first message is C(x). Members may be
        left out of a round, which the paper does not treat; then the update is not the mean of those who are there.
        The mean is added up message by message, in float32, and is off the estimates' mean by those roundings.
Avoid   with noisy gradients of small batches (see ef21_sgdm), with few rounds (the estimate begins at zero), and where
        members come and go: their shared estimate is then begun anew.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from thinwire.codecs.base import Codec
from thinwire.codecs.feedback.base import Feedback, Place, check_codec, followed, zeros
from thinwire.codecs.stages import Staged, Tensors


@dataclass(frozen=True)
class EF21(Feedback):
    """Estimates that follow what members send.

    codec  what writes the change
    """

    codec: Codec | Staged
    tracks = True

    def __post_init__(self) -> None:
        check_codec("ef21", self.codec)

    @property
    def spec(self) -> str:
        return f"ef21({self.codec.spec})"

    def prepare(self, x: Tensor, own: Tensors, shared: Tensors, place: Place) -> tuple[Tensor, Tensors]:
        estimate = zeros(own, "estimate", x)
        return x - estimate, {"estimate": estimate}

    def commit(self, target: Tensor, held: Tensors, sent: Tensor) -> Tensors:
        return {"estimate": held["estimate"] + sent}

    def receive(self, combined: Tensor, shared: Tensors, share: float) -> tuple[Tensor, Tensors]:
        return followed(combined, shared, share)


ef21 = EF21
