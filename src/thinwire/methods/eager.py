"""DiLoCo with eager updates: a round has all of the time to the next one, and a member's own part of it counts at once.

    end of phase t, with D^{t-1} just arrived:   (a, b) <- Nesterov(a, b, D^{t-1})
                                                 (theta_i, h_i) <- Nesterov(a, h_i, D_i^t / N)
                                                 send D_i^t, what the phase did

The link is hidden as by `delayed`, at less of a loss: only the others' parts are late (thinwire.outer.eager).

Error   N=1 is DiLoCo to the bit. The more members, the nearer to `delayed`, and the smaller the steps that are stable:
        see thinwire.stability.
Size    as DiLoCo's, hidden as long as a round takes no longer than H local steps.
State   a, b, alike on all members; h_i, a member's own; the round under way. Members' parameters differ; `consensus()`
        is a.
Source  Kale et al. 2025, arXiv:2502.12996: H=30; eta=0.4, mu=0.9 are from others' notes on it.
Differs the rule is written so that all members have one anchor, which they compare, and hand to who joins.
"""

from __future__ import annotations

from thinwire.codecs import How, fp32
from thinwire.method import Method
from thinwire.outer import Eager, Nesterov
from thinwire.payloads import Delta
from thinwire.schedules import Every


def eager(
    *, every: int = 30, fragments: int = 1, outer_lr: float = 0.4, momentum: float = 0.9, codec: How = fp32
) -> Method:
    """One outer step every `every` local steps (H), with the own part of now and the others' of a phase before."""
    return Method(
        schedule=Every(every, overlap=every),
        payload=Delta(fragments),
        codec=codec,
        outer=Eager(Nesterov(outer_lr, momentum)),
    )
