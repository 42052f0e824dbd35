"""EControl: EF21 with a residual that is fed back by a controlled share, so that nothing is lost for good.

    c = C(x - h + eta e)        e' = e + x - h - c        h' = h + c        update = mean of all h'

One message serves both: the estimate h that follows the member's vector, and the residual e of all that h missed.

State   own: the estimate h and the residual e, float32 [n] each; shared: the mean of all estimates. All begin at zero.
Error   the sum of a member's estimates plus its residual is the sum of its vectors, as with `feedback`; and members'
        data may differ, as with ef21: then it bears steps at which `feedback` swings far out. Where data are alike it
        is the other way round. eta must be of the order of delta or smaller: above that the residual swings up and
        diverges (all three pinned in tests/identities/test_feedback_convergence.py).
Cost    one decoding and five passes a round, 12n bytes of memory.
Absent  as in ef21, residual included. A member that is left out has its old estimate in the update, and nobody owes the
        difference: its vector of that round is not known.
Source  Gao, Islamov & Stich 2023, arXiv:2311.05645 (EControl: Fast Distributed Optimization with Compression and Error
        Control).
Differs eta is min(delta / 2, 0.05) if it is not given, with the contraction delta that the codec claims for the
        vector's length; that rule is ours, from runs on quadratics. The estimate begins at zero.
Avoid   where `feedback` is stable, which holds a third of its memory and has no eta to set.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from thinwire.codecs.base import Codec
from thinwire.codecs.feedback.base import Feedback, Place, check_codec, followed, zeros
from thinwire.codecs.options import call, changed, check_number
from thinwire.codecs.stages import Staged, Tensors
from thinwire.errors import ConfigError

_MOST = 0.05  # of the rule for eta


@dataclass(frozen=True)
class EControl(Feedback):
    """Estimates that follow what members send, and a residual of what they missed.

    codec  what writes change and residual
    eta    share of the residual that is added to the change, in [0, 1]; 0 is EF21, None the rule of the card
    """

    codec: Codec | Staged
    eta: float | None = None
    tracks = True

    def __post_init__(self) -> None:
        if self.eta is not None:
            mend = "leave it out for half the codec's contraction, at most 0.05; 0 is ef21"
            check_number("econtrol", "with eta", self.eta, at_least=0, at_most=1, mend=mend)
        check_codec("econtrol", self.codec)
        if self.eta is None and isinstance(self.codec, Staged):
            raise ConfigError(
                f"econtrol around {self.codec.spec} without eta: its contraction depends on the data",
                expected="eta, where the codec claims no number for its contraction",
                mend=f"econtrol({self.codec.spec}, eta=0.01), or ef21, which needs none",
            )

    @property
    def spec(self) -> str:
        return call("econtrol", self.codec.spec, **changed(self))

    def share_fed_back(self, n: int) -> float:
        """eta for vectors of n elements."""
        if self.eta is not None:
            return self.eta
        assert isinstance(self.codec, Codec), "others are refused without eta"
        return min(0.5 * (self.codec.contraction(n) or 0.0), _MOST)

    def prepare(self, x: Tensor, own: Tensors, shared: Tensors, place: Place) -> tuple[Tensor, Tensors]:
        estimate, residual = zeros(own, "estimate", x), zeros(own, "residual", x)
        missed = x - estimate
        target = missed.add(residual, alpha=self.share_fed_back(len(x)))
        return target, {"estimate": estimate, "owed": missed.add_(residual)}

    def commit(self, target: Tensor, held: Tensors, sent: Tensor) -> Tensors:
        return {"estimate": held["estimate"] + sent, "residual": held["owed"] - sent}

    def receive(self, combined: Tensor, shared: Tensors, share: float) -> tuple[Tensor, Tensors]:
        return followed(combined, shared, share)


econtrol = EControl
