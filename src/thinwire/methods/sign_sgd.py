"""signSGD with majority vote: every coordinate moves by what most members' gradients agree on, and by as much as all.

    g_i <- 1 if at least half of the members have g_ki >= 0, else -1    before every optimizer step

Error   no gradient in the mean: how large anything was is lost, so the learning rate alone says how far to go, and is
        as small as Adam's. Fewer than half of the members, whatever they send, do not turn what the others agree on.
        A gradient of zero votes for 1: freeze parameters that are not used.
Size    2 (N-1)/N * n/8 bytes sent per member and step, and 4 bytes for every 1024 entries.
State   none.
Source  Bernstein et al. 2018, arXiv:1802.04434 and arXiv:1810.05291, Alg. 1.
Differs there is no server: each member counts the votes on one shard of the vector, and sends the others its result.
"""

from __future__ import annotations

from thinwire.aggregators import Majority
from thinwire.codecs import ErrorFeedback, sign
from thinwire.method import Method
from thinwire.outer import NoStep
from thinwire.payloads import Gradient
from thinwire.schedules import Every


def sign_sgd(*, block: int = 1024) -> Method:
    """Vote on the signs of gradients, before every step.

    block  entries that share a magnitude, which nobody reads
    """
    votes = ErrorFeedback(sign(block=block), decay=0.0)  # a vote is on this step's gradient alone
    return Method(schedule=Every(1), payload=Gradient(), codec=votes, aggregator=Majority(), outer=NoStep())
