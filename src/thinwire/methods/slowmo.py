"""SlowMo: a slow momentum around local SGD, in units of its gradients.

    u <- beta u + D / gamma,  a <- a - alpha gamma u,  theta_i <- a    every H local steps, gamma their learning rate

Error   beta=0, alpha=1 is local SGD; H=1 with plain SGD inside is SGD with momentum beta.
Size    as local SGD's.
State   a, u, alike on all members; inner optimizers' moments stay local and are kept.
Source  Wang et al. 2020, arXiv:1910.00643, Alg. 1. alpha=1, beta=0.5 and H=48 are the fairscale library's, which
        suggests betas from 0.2 for 4 nodes to 0.6 for 16.
Differs members do not average within a phase, as that library does every third step. u is kept in units of parameters
        (thinwire.outer.slowmo).
"""

from __future__ import annotations

from thinwire.codecs import How, fp32
from thinwire.method import Method
from thinwire.outer import SlowMo
from thinwire.payloads import Delta
from thinwire.schedules import Every


def slowmo(*, every: int = 48, outer_lr: float = 1.0, momentum: float = 0.5, codec: How = fp32) -> Method:
    """One outer step every `every` local steps (tau in the paper)."""
    return Method(schedule=Every(every), payload=Delta(), codec=codec, outer=SlowMo(outer_lr, momentum))
