"""1-bit Adam: Adam at full precision first, then with its variance frozen and its momentum sent at one bit.

    step t <= freeze:  g <- Adam's direction of mean g_i                               before every optimizer step
    step t >  freeze:  m <- mean of sign(b1 m + (1 - b1) g_i + what waits);  g <- m / sqrt(v)

Error   never frozen it is Adam; frozen and without loss it is Adam with the variance of step `freeze`.
Size    2 (N-1)/N * 4n bytes sent per member and step up to the freeze, then a 31st of it.
State   m and v, alike on all members; what waits, of every member's own and of the shard that it combines.
Source  Tang et al. 2021, arXiv:2102.02888; freeze at 15 to 25 % of all steps.
Differs the optimizer is SGD without momentum, with Adam's learning rate (thinwire.codecs.frozen_adam says why and how).
        A magnitude for every 1024 entries, not one for each shard.
"""

from __future__ import annotations

from thinwire.codecs import How, fp32, frozen_adam, sign, switch
from thinwire.codecs.feedback import Feedback
from thinwire.errors import ConfigError
from thinwire.method import Method
from thinwire.outer import NoStep
from thinwire.payloads import Gradient
from thinwire.schedules import Every


def one_bit_adam(
    *,
    freeze: int = 1000,
    codec: How = sign,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
) -> Method:
    """Adam's direction in the place of the gradient, before every step.

    freeze  steps at full precision
    codec   how the momentum is written after them
    """
    if isinstance(codec, Feedback):
        raise ConfigError(
            f"one_bit_adam with codec {codec.spec}: it has a memory of its own",
            expected="a codec without feedback",
            mend=f"codec={codec.codec.spec}",
        )
    memory = frozen_adam(switch(fp32, freeze, codec), beta1=beta1, beta2=beta2, eps=eps)
    return Method(schedule=Every(1), payload=Gradient(), codec=memory, outer=NoStep())
