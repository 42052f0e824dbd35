"""SCALLION: federated averaging with control variates, whose changes are all that is sent, by an unbiased codec.

    G = D + C_i - C                       what the gradients of the local steps came to
    send C(alpha (G - C_i)) = d_i
    C_i <- C_i + d_i
    update = mean d_i + C,   C <- C + (share of members that took part) mean d_i

State   own: C_i; shared: C, the mean of all C_i; float32 [n] each. A member that a round did not count keeps C_i, and C
        moves by as much less. When members change, all begin without: C would be about those who left.
Error   exact: where members' data differ it converges to the optimum with constant steps, given
        alpha <= 1 / (1 + omega) of the codec; above that it diverges. alpha=1 without a codec is SCAFFOLD.
Size    one packet a round; nothing is sent for C, which members add up themselves.
Cost    one decoding, three passes a round and one a local step; 8n bytes of memory.
Source  Huang, Li & Li 2023, arXiv:2308.08165, SCALLION; SCAFFOLD is Karimireddy et al. 2020, arXiv:1910.06378,
        option II. The rules are reconstructed from others' implementations and checked against SCAFFOLD.
Differs variates are in units of parameters (learning rate and local steps in them), as the payload is: a learning rate
        that changes makes old variates larger or smaller than the new steps, and they follow within some rounds.
        Nothing is encoded a second time on the way, since C would keep that error for ever: with three members and
        more each sends its packet to all others. After a round that was skipped there are more local steps in D than
        one round's: a single disturbance, which dies away.
Avoid   with codecs of large variance, whose alpha is so small that variates hardly move (scafcom takes biased ones),
        and where members come and go.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from thinwire.codecs.base import Codec
from thinwire.codecs.feedback.base import Feedback, Place, check_codec
from thinwire.codecs.feedback.control import drift_of, updated
from thinwire.codecs.options import call, changed, check_number
from thinwire.codecs.stages import Staged, Tensors


@dataclass(frozen=True)
class Scallion(Feedback):
    """Stochastic controlled averaging for unbiased codecs.

    codec  unbiased, with a bounded variance
    alpha  share of the change that is sent, in (0, 1]; None for 1 / (1 + omega) of the codec
    """

    codec: Codec | Staged
    alpha: float | None = None

    tracks = True
    corrects = True

    def __post_init__(self) -> None:
        if self.alpha is not None:
            mend = "leave it out for 1 / (1 + omega) of the codec, above which it diverges"
            check_number("scallion", "with alpha", self.alpha, above=0, at_most=1, mend=mend)
        check_codec("scallion", self.codec, needs="unbiased")

    @property
    def spec(self) -> str:
        return call("scallion", self.codec.spec, **changed(self))

    @property
    def keeps(self) -> None:
        return None

    def prepare(self, x: Tensor, own: Tensors, shared: Tensors, place: Place) -> tuple[Tensor, Tensors]:
        change = x - shared["control"] if shared else x  # G - C_i
        return change * self._alpha(len(x)), {"before": own["control"]} if own else {}

    def commit(self, target: Tensor, held: Tensors, sent: Tensor) -> Tensors:
        return {"control": held["before"] + sent if held else sent}

    def receive(self, combined: Tensor, shared: Tensors, share: float) -> tuple[Tensor, Tensors]:
        return updated(combined, shared, share)

    def drift(self, own: Tensors, shared: Tensors) -> Tensor | None:
        return drift_of(own, shared)

    def _alpha(self, n: int) -> float:
        if self.alpha is not None:
            return self.alpha
        assert isinstance(self.codec, Codec)
        return 1 / (1 + (self.codec.variance(n) or 0.0))


scallion = Scallion
