"""SCAFCOM: federated averaging with control variates and a local momentum, by a contractive codec.

    G = D + C_i - C                       what the gradients of the local steps came to
    v <- (1 - beta) v + beta G
    send C(v - C_i) = d_i
    C_i <- C_i + d_i
    update = mean d_i + C,   C <- C + (share of members that took part) mean d_i

State   own: C_i and v; shared: C, the mean of all C_i; float32 [n] each. A member that a round did not count keeps
        both, and C moves by as much less. When members change, all begin without: C would be about those who left.
Error   exact: where members' data differ it converges to the optimum with constant steps, whatever contractive codec;
        beta=1 without a codec is SCAFFOLD, beta below 1 averages the noise of gradients.
Size    one packet a round; nothing is sent for C, which members add up themselves.
Cost    one decoding, five passes a round and one a local step; 12n bytes of memory.
Source  Huang, Li & Li 2023, arXiv:2308.08165, SCAFCOM; the rules are reconstructed from others' implementations and
        checked against SCAFFOLD (Karimireddy et al. 2020, arXiv:1910.06378, option II).
Differs variates are in units of parameters, as in scallion. A combined shard that is encoded a second time (three
        members and more, a codec that may be) is off by what that drops, which goes with the next round's. The default
        of beta is ours.
Avoid   where members come and go, or their data are alike: control variates cost memory and correct nothing then.
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
class Scafcom(Feedback):
    """Stochastic controlled averaging with momentum, for contractive codecs.

    codec  contractive, such as topk(1/64) | int4
    beta   weight of this round in the momentum, in (0, 1]
    """

    codec: Codec | Staged
    beta: float = 0.2

    tracks = True
    corrects = True

    def __post_init__(self) -> None:
        mend = "leave it out for 0.2; 1 has no momentum"
        check_number("scafcom", "with beta", self.beta, above=0, at_most=1, mend=mend)
        check_codec("scafcom", self.codec)

    @property
    def spec(self) -> str:
        return call("scafcom", self.codec.spec, **changed(self))

    def prepare(self, x: Tensor, own: Tensors, shared: Tensors, place: Place) -> tuple[Tensor, Tensors]:
        drift = drift_of(own, shared)
        moved = (x if drift is None else x + drift) * self.beta  # beta G
        if not own:
            return moved, {"average": moved}
        average = moved.add_(own["average"], alpha=1 - self.beta)
        return average - own["control"], {"average": average, "before": own["control"]}

    def commit(self, target: Tensor, held: Tensors, sent: Tensor) -> Tensors:
        return {"average": held["average"], "control": held["before"] + sent if "before" in held else sent}

    def receive(self, combined: Tensor, shared: Tensors, share: float) -> tuple[Tensor, Tensors]:
        return updated(combined, shared, share)

    def drift(self, own: Tensors, shared: Tensors) -> Tensor | None:
        return drift_of(own, shared)


scafcom = Scafcom
