"""Deep gradient compression: momentum before the selection, not after it.

    u <- m u + x                     u <- m (u + x)
    v <- v + u                       v <- v + u + x          with nesterov
    v' = v - C(v)                    u' = 0 where C(v) is not, else u          with masking

What waits in v has its momentum already, and moves as it would have had it been sent at once. Masking stops the
momentum of what was just sent: what has waited long is stale.

State   own: u and v, float32 [n] each; nothing shared. A member that a round did not count keeps both. One that joins
        begins with none, and what was owed by one that leaves is lost, as with feedback.
Error   with masking off, x_t - lr v_t is where SGD with momentum stands, whatever C drops. Everything sent and masking
        off is SGD with momentum; everything sent and masking on is plain SGD, since u is emptied in every round.
Cost    one decoding and four passes a round, 8n bytes of memory.
Source  Lin et al. 2018, arXiv:1712.01887, Alg. 1 and sec. 3; their share is 0.1 %, after a warm-up (warmup).
Differs v keeps what the codec rounded off of what it sent, where the paper empties it: for topk alone that is the same
        to the bit. clip is a limit for the norm of the sum of N independent gradients, so each is clipped to
        clip / sqrt(N), before it is added; the norm is that of the fragment.
        The optimizer is to have no momentum of its own: it would be applied twice. SGD(momentum=...) is refused.
Avoid   with an optimizer that has momentum or is adaptive: it is SGD's momentum that is corrected here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.codecs.base import Codec
from thinwire.codecs.feedback.base import Feedback, Place, check_codec
from thinwire.codecs.options import call, changed, check_flag, check_number
from thinwire.codecs.stages import Staged, Tensors


@dataclass(frozen=True)
class DGC(Feedback):
    """Momentum correction and momentum factor masking.

    codec     what selects, such as topk(0.001); without masking any contractive codec
    momentum  m above, in [0, 1)
    masking   whether what was sent loses its momentum
    nesterov  whether the momentum is Nesterov's
    clip      limit of the norm, for all members together; None for none
    """

    codec: Codec | Staged
    momentum: float = 0.9
    masking: bool = True
    nesterov: bool = False
    clip: float | None = None

    def __post_init__(self) -> None:
        check_momentum("dgc", self.momentum)
        check_flag("dgc", "with masking", self.masking)
        check_flag("dgc", "with nesterov", self.nesterov)
        if self.clip is not None:
            check_number("dgc", "is to clip at a norm of", self.clip, above=0, mend="leave it out not to clip")
        check_codec("dgc", self.codec, needs="selection" if self.masking else "contractive")

    @property
    def spec(self) -> str:
        return call("dgc", self.codec.spec, **changed(self))

    @property
    def accelerates(self) -> bool:
        return self.momentum > 0

    def prepare(self, x: Tensor, own: Tensors, shared: Tensors, place: Place) -> tuple[Tensor, Tensors]:
        if self.clip is not None:
            x = clipped(x, self.clip / math.sqrt(len(place.ranks)))
        return accumulate(x, own, self.momentum, nesterov=self.nesterov)

    def commit(self, target: Tensor, held: Tensors, sent: Tensor) -> Tensors:
        return left_over(target, held, sent, masking=self.masking)


def accumulate(x: Tensor, own: Tensors, momentum: float, *, nesterov: bool) -> tuple[Tensor, Tensors]:
    """v [n] with this round's x, and u, to be held until the round is known."""
    if not own:
        speed = x * momentum if nesterov else x.clone()  # it outlives x, whose memory is the caller's
        return (x + speed if nesterov else x), {"momentum": speed}
    if nesterov:
        speed = (own["momentum"] + x).mul_(momentum)
        return (own["residual"] + speed).add_(x), {"momentum": speed}
    speed = x.add(own["momentum"], alpha=momentum)
    return own["residual"] + speed, {"momentum": speed}


def left_over(accumulated: Tensor, held: Tensors, sent: Tensor, *, masking: bool) -> Tensors:
    """u and v after a round in which `sent` [n] was sent of v."""
    speed = held["momentum"]
    if masking:
        speed = speed.masked_fill(sent != 0, 0.0)
    return {"momentum": speed, "residual": accumulated - sent}


def clipped(x: Tensor, limit: float) -> Tensor:
    """x [n], shortened to a norm of `limit` if it is longer."""
    norm = float(torch.linalg.vector_norm(x, dtype=torch.float64))
    return x * (limit / norm) if norm > limit else x


def check_momentum(name: str, momentum: object) -> None:
    """Refuse a momentum that does not die away."""
    check_number(name, "with momentum", momentum, at_least=0, below=1, mend="0.9 is the papers' value, 0 for none")


dgc = DGC
