"""Post-local SGD: every-step data parallel training first, local SGD afterwards.

    step t <= switch:  g <- mean_i g_i before the step
    step t >  switch:  theta <- mean_i theta_i after steps switch + H, switch + 2H, ...

Size    that of every_step up to the switch, that of local_sgd after it.
Source  Lin et al. 2020, arXiv:1808.07217 (their switch is the first drop of the learning rate, H = 16).
Differs torch's averager also averages at the switch itself, where all models are equal: we send nothing there.
"""

from __future__ import annotations

from thinwire.codecs import How, fp32
from thinwire.method import Phases
from thinwire.methods.every_step import every_step
from thinwire.methods.local_sgd import local_sgd


def post_local_sgd(*, switch: int = 100, every: int = 16, codec: How = fp32) -> Phases:
    """Combine gradients up to step `switch`, then average models every `every` steps."""
    return Phases(every_step(codec=codec), switch, local_sgd(every=every, codec=codec))
