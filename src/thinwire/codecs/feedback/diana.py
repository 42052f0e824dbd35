"""DIANA: send what is new, by an unbiased codec, and let the estimates follow by a share of it.

    c = C(x - h)        h' = h + alpha c        update = mean of all h + mean of all c

The unbiased counterpart of ef21: the update is right in the mean, and its noise goes with what the estimates miss.

State   own: the estimate h, float32 [n]; shared: the mean of all members' estimates, [n]. Both begin at zero.
Error   unbiased; E||update - mean||^2 <= omega / N^2 sum ||x - h||^2, so it converges with a constant step however much
        members' data differ, where the codec alone has a floor of omega ||x||^2. alpha <= 1 / (1 + omega): above, the
        estimates themselves may diverge.
Cost    one decoding and four passes a round, 8n bytes of memory.
Absent  a member that is left out keeps its estimate, and the update has that in its place. If one member has lost its
        memory, or the group has changed, all begin at zero.
Source  Mishchenko, Gorbunov, Takac & Richtarik 2019, arXiv:1901.09269.
Differs without the momentum and the proximal step of the paper. Nothing is encoded a second time on the way, since with
        omega above 1 what that drops would grow: with three members and more each sends its packet to all others.
Avoid   with codecs of large variance, whose alpha is so small that estimates hardly move: ef21 takes contractive ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from thinwire.codecs.base import Codec
from thinwire.codecs.feedback.base import Feedback, Place, check_codec, zeros
from thinwire.codecs.options import call, changed, check_number
from thinwire.codecs.stages import Staged, Tensors


@dataclass(frozen=True)
class Diana(Feedback):
    """Estimates that follow what members send, for unbiased codecs.

    codec  unbiased, with a bounded variance
    alpha  share of a message by which the estimate follows, in (0, 1]; None for 1 / (1 + omega) of the codec
    """

    codec: Codec | Staged
    alpha: float | None = None
    tracks = True

    def __post_init__(self) -> None:
        if self.alpha is not None:
            mend = "leave it out for 1 / (1 + omega) of the codec, above which it may diverge"
            check_number("diana", "with alpha", self.alpha, above=0, at_most=1, mend=mend)
        check_codec("diana", self.codec, needs="unbiased")

    @property
    def spec(self) -> str:
        return call("diana", self.codec.spec, **changed(self))

    @property
    def keeps(self) -> None:
        return None

    def share_followed(self, n: int) -> float:
        """alpha for vectors of n elements."""
        if self.alpha is not None:
            return self.alpha
        assert isinstance(self.codec, Codec), "others are refused"
        return 1 / (1 + (self.codec.variance(n) or 0.0))

    def prepare(self, x: Tensor, own: Tensors, shared: Tensors, place: Place) -> tuple[Tensor, Tensors]:
        estimate = zeros(own, "estimate", x)
        return x - estimate, {"estimate": estimate}

    def commit(self, target: Tensor, held: Tensors, sent: Tensor) -> Tensors:
        return {"estimate": held["estimate"] + self.share_followed(len(sent)) * sent}

    def receive(self, combined: Tensor, shared: Tensors, share: float) -> tuple[Tensor, Tensors]:
        estimate, new = zeros(shared, "estimate", combined), share * combined  # products rounded by themselves, so
        return estimate + new, {"estimate": estimate + self.share_followed(len(combined)) * new}  # alike everywhere


diana = Diana
