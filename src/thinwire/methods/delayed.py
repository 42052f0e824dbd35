"""DiLoCo with its outer step a full round late: a round has all of the time to the next one.

    end of phase t, with D^{t-1} just arrived:   b <- mu b + D^{t-1},  a <- a - eta (D^{t-1} + mu b),  theta_i <- a
                                                 send D_i^t, what the phase did

The simplest way to hide a slow link, and what to compare others with. What a phase does to a member's parameters leaves
them with its end and comes back with the others' a phase later, so that the first phase ends where it began.

Error   stable only for smaller steps than without delay: eta kappa < 1 - mu for heavy ball, where kappa is the share of
        the way to the optimum that a phase covers; hence no momentum by default. See thinwire.stability.
Size    as DiLoCo's, hidden as long as a round takes no longer than H local steps.
State   a, b, alike on all members; the round under way.
Source  the asynchronous DiLoCo example of the PCCL library, arXiv:2505.14065: plain SGD, eta=0.7.
Differs H=30, where the example has 8.
"""

from __future__ import annotations

from thinwire.codecs import How, fp32
from thinwire.method import Method
from thinwire.outer import Nesterov
from thinwire.payloads import Delta
from thinwire.schedules import Every


def delayed(
    *, every: int = 30, fragments: int = 1, outer_lr: float = 0.7, momentum: float = 0.0, codec: How = fp32
) -> Method:
    """One outer step every `every` local steps (H), with what was sent `every` steps before."""
    return Method(
        schedule=Every(every, overlap=every),
        payload=Delta(fragments),
        codec=codec,
        outer=Nesterov(outer_lr, momentum),
    )
