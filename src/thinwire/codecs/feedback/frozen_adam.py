"""Adam whose variance is frozen, so that its momentum can be sent at one bit (1-bit Adam).

    rounds t <= freeze    g = mean x;  m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2        sent as float32
    rounds t >  freeze    p_i = b1 m + (1 - b1) x_i + e_i;  m <- mean C(p_i),  e_i' = p_i - C(p_i)
    update                m / (1 - b1^t) / (sqrt(v / (1 - b2^min(t, freeze))) + eps)

The update is Adam's direction and takes the gradient's place: the optimizer is SGD without momentum, whose learning
rate (with its schedule) is Adam's and whose weight decay is AdamW's.

State   own: the residual e; shared: m, v and the number of rounds; float32 [n] each. A member that a round did not
        count keeps e. One that joins begins with e=0 and the others' m and v.
Error   never frozen it is Adam. With the variance frozen the update is linear in what is sent, so that error feedback
        does its work; Adam's own division by sqrt(v) would undo it.
        Where v is zero, no member has had a gradient: nothing is sent or moved there, since one bit cannot be zero.
Size    4n bytes while warming up, then the codec's.
Cost    seven passes a round; 12n bytes of memory.
Source  Tang et al. 2021, arXiv:2102.02888, Alg. 1; freeze at 15 to 25 % of all steps is their advice.
Differs the biases of m and v are corrected as torch.optim.Adam does, and v's correction is frozen with v, so that the
        step does not jump at the freeze; their code corrects neither.
Avoid   where gradients still change in size when the variance is frozen, as with short warm-ups; with more layers to
        come (fine-tuning in stages), v says nothing of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.codecs.base import Codec
from thinwire.codecs.feedback.base import Feedback, Place, check_codec, zeros
from thinwire.codecs.options import call, changed, check_number
from thinwire.codecs.stages import Staged, Tensors
from thinwire.codecs.switch import Switch
from thinwire.errors import ConfigError


@dataclass(frozen=True)
class FrozenAdam(Feedback):
    """Adam's direction of gradients that are sent exactly, then of a momentum that is not.

    codec   switch(fp32, freeze, sign): the variance is frozen where the codec changes; fp32 alone is Adam for ever
    beta1, beta2, eps   Adam's
    """

    codec: Codec | Staged
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        mend = "leave it out for Adam's usual one"
        check_number("frozen_adam", "with beta1", self.beta1, at_least=0, below=1, mend=mend)
        check_number("frozen_adam", "with beta2", self.beta2, at_least=0, below=1, mend=mend)
        check_number("frozen_adam", "with eps", self.eps, above=0, mend=mend)
        check_codec("frozen_adam", self.codec)
        first = self.codec.first if isinstance(self.codec, Switch) else self.codec
        if not (isinstance(first, Codec) and first.traits.lossless):
            raise ConfigError(
                f"frozen_adam around {self.codec.spec}: it loses something before the variance is known",
                expected="a codec that is lossless at first",
                mend=f"write frozen_adam(switch(fp32, 1000, {self.codec.spec})), at 15 to 25 % of all steps",
            )

    @property
    def spec(self) -> str:
        return call("frozen_adam", self.codec.spec, **changed(self))

    @property
    def accelerates(self) -> bool:
        return True

    @property
    def freeze(self) -> float:
        """Rounds after which the variance stays as it is."""
        return self.codec.rounds if isinstance(self.codec, Switch) else math.inf

    def prepare(self, x: Tensor, own: Tensors, shared: Tensors, place: Place) -> tuple[Tensor, Tensors]:
        if _rounds(shared) < self.freeze:
            return x, {}
        unmoved = shared["variance"] == 0
        target = torch.lerp(shared["momentum"], x, 1 - self.beta1).add_(zeros(own, "residual", x))
        return target.masked_fill_(unmoved, 0.0), {"unmoved": unmoved}

    def commit(self, target: Tensor, held: Tensors, sent: Tensor) -> Tensors:
        return {"residual": (target - sent).masked_fill_(held["unmoved"], 0.0)} if held else {}

    def receive(self, combined: Tensor, shared: Tensors, share: float) -> tuple[Tensor, Tensors]:
        done = _rounds(shared)
        momentum, variance = zeros(shared, "momentum", combined), zeros(shared, "variance", combined)
        if done < self.freeze:
            # Products and sums, rounded one by one: shared state is to be alike on all processors.
            momentum = momentum * self.beta1 + combined * (1 - self.beta1)
            variance = variance * self.beta2 + (combined * combined).mul_(1 - self.beta2)
        else:
            momentum = combined.masked_fill(variance == 0, 0.0)
        counted = done + 1
        scale = variance.sqrt().div_((1 - self.beta2 ** min(counted, self.freeze)) ** 0.5).add_(self.eps)
        update = (momentum / (1 - self.beta1**counted)).div_(scale)
        return update, {"momentum": momentum, "variance": variance, "rounds": torch.tensor(counted)}


def _rounds(shared: Tensors) -> int:
    return int(shared["rounds"]) if shared else 0


frozen_adam = FrozenAdam
