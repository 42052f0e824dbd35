"""EF21-SGDM: EF21 of a running mean of the member's vectors, for vectors that are noisy, such as stochastic gradients.

    v = (1 - eta) v + eta x        c = C(v - g)        g' = g + c        update = mean of all g'

With `double`, a second running mean u = (1 - eta) u + eta v is what the estimate g follows.

State   own: the estimate g and the mean v (and u), float32 [n] each; shared: the mean of all estimates. Means begin at
        the first vector, estimates at zero.
Error   of the estimate as of ef21; the noise that reaches it is that of a mean of about 2 / eta - 1 vectors. What it
        follows lags by about 1 / eta rounds. eta=1 is EF21.
Cost    one decoding and four passes a round, 12n bytes of memory; with `double` one pass and 4n bytes more.
Absent  as in ef21; a running mean misses the vectors of rounds that left its member out.
Source  Fatkhullin, Tyurin & Richtarik 2023, arXiv:2305.15155 (Momentum Provably Improves Error Feedback!).
Differs estimates start from zero, as ef21's do here. This is momentum before the codec: an outer step or an optimizer
        with momentum of its own comes on top of it.
Avoid   where memory is short, or the optimizer has momentum that you do not want to lower.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from thinwire.codecs.base import Codec
from thinwire.codecs.feedback.base import Feedback, Place, check_codec, followed, zeros
from thinwire.codecs.options import call, changed, check_flag, check_number
from thinwire.codecs.stages import Staged, Tensors


@dataclass(frozen=True)
class EF21SGDM(Feedback):
    """Estimates that follow a running mean of what members send.

    codec   what writes the change
    eta     what a new vector weighs in the running mean, in (0, 1]
    double  whether the estimate follows a running mean of the running mean
    """

    codec: Codec | Staged
    eta: float = 0.1
    double: bool = False
    tracks = True

    def __post_init__(self) -> None:
        mend = "leave it out for 0.1; 1 is ef21"
        check_number("ef21_sgdm", "with eta", self.eta, above=0, at_most=1, mend=mend)
        check_flag("ef21_sgdm", "with double", self.double)
        check_codec("ef21_sgdm", self.codec)

    @property
    def spec(self) -> str:
        return call("ef21_sgdm", self.codec.spec, **changed(self))

    def prepare(self, x: Tensor, own: Tensors, shared: Tensors, place: Place) -> tuple[Tensor, Tensors]:
        estimate, mean = zeros(own, "estimate", x), self._mean(own, "mean", x)
        held = {"estimate": estimate, "mean": mean}
        if self.double:
            mean = held["second mean"] = self._mean(own, "second mean", mean)
        return mean - estimate, held

    def _mean(self, own: Tensors, name: str, new: Tensor) -> Tensor:
        return own[name].lerp(new, self.eta) if name in own else new.clone()

    def commit(self, target: Tensor, held: Tensors, sent: Tensor) -> Tensors:
        return {**held, "estimate": held["estimate"] + sent}

    def receive(self, combined: Tensor, shared: Tensors, share: float) -> tuple[Tensor, Tensors]:
        return followed(combined, shared, share)


ef21_sgdm = EF21SGDM
