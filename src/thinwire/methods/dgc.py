"""Deep gradient compression: a thousandth of the gradient in every step, with momentum where it waits.

    u <- m u + g_i,  v <- v + u;  send the largest of v;  g <- mean of what was sent    before every optimizer step

Error   what is not sent waits, and moves as momentum would have moved it (thinwire.codecs.dgc).
Size    5.5n / 1000 bytes sent to each other member and step, after a warm-up that begins with 1.4n.
State   two vectors of every member's own; the number of rounds.
Source  Lin et al. 2018, arXiv:1712.01887: 0.1 %, momentum 0.9, a warm-up of four epochs.
Differs the warm-up is counted in steps. The optimizer is SGD without momentum: the momentum is here.
"""

from __future__ import annotations

from thinwire.codecs import How, topk
from thinwire.codecs import dgc as memory
from thinwire.codecs.base import Codec
from thinwire.codecs.feedback import Feedback
from thinwire.codecs.switch import Warmup
from thinwire.errors import ConfigError
from thinwire.method import Method
from thinwire.outer import NoStep
from thinwire.payloads import Gradient
from thinwire.schedules import Every


def dgc(
    *,
    codec: How = topk(0.001),  # noqa: B008 (a frozen value)
    momentum: float = 0.9,
    masking: bool = True,
    nesterov: bool = False,
    clip: float | None = None,
    warmup: int = 500,
) -> Method:
    """Combine the largest of what has waited, before every step.

    codec   topk, or a chain that begins with it
    clip    limit of the norm of the mean gradient's parts, before they are added; None for none
    warmup  steps with larger shares, in five stages; 0 for none
    """
    if isinstance(codec, Feedback):
        raise ConfigError(
            f"dgc with codec {codec.spec}: it has a memory of its own",
            expected="a codec without feedback",
            mend=f"codec={codec.codec.spec}, or every_step(codec=...) with another memory",
        )
    written = Warmup(codec, warmup, min(5, warmup)) if warmup and isinstance(codec, Codec) else codec
    waiting = memory(written, momentum=momentum, masking=masking, nesterov=nesterov, clip=clip)
    return Method(schedule=Every(1), payload=Gradient(), codec=waiting, outer=NoStep())
