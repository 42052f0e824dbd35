"""DeMo (decoupled momentum): every step, the few strongest frequencies of each member's momentum; the rest stays there.

    m_i <- beta m_i + g_i,  q_i = top-k of the cosine transform of m_i's chunks,  m_i <- m_i - q_i
    g <- sign(mean_i q_i)                                                  before every optimizer step

Error   all coefficients sent (share=1) is signSGD on the mean gradient, and nothing stays in m. What is not sent waits,
        and decays.
Size    per member and step to each other: k of the 4096 coefficients of a chunk of 64 x 64, 5.5 bytes each; with
        share=1/128 that is 0.043 bytes an element against fp32's 4, and N-1 times that received.
State   m of every member's own, 4n bytes; nothing else: no second moments.
Source  Peng et al. 2024, arXiv:2411.19870, Alg. 1; beta=0.999, k=32 of 4096, learning rate 4e-4.
Differs the optimizer is SGD without momentum, whose rate and weight decay are the paper's. Momentum is kept in gradient
        units, not times the learning rate: a schedule then scales old and new alike. A coefficient is the mean over all
        members, not over those that sent it: signs of sums are the same wherever one chunk's senders agree in number.
        Chunks are the codec's (thinwire.codecs.dct); positions take 12 bits, where the reference code sends int64.
"""

from __future__ import annotations

from thinwire.aggregators.signs import Signs
from thinwire.codecs import Codec, ErrorFeedback, dct
from thinwire.method import Method
from thinwire.outer import NoStep
from thinwire.payloads import Gradient
from thinwire.schedules import Every


def demo(*, codec: Codec = dct(1 / 128), decay: float = 0.999) -> Method:  # noqa: B008 (a frozen value)
    """Send the strongest of what has gathered, before every step; give it to SGD without momentum.

    codec  what is sent of a momentum
    decay  factor on what was not sent, from step to step (beta)
    """
    momentum = ErrorFeedback(codec, decay=decay)
    return Method(schedule=Every(1), payload=Gradient(), codec=momentum, aggregator=Signs(), outer=NoStep())
