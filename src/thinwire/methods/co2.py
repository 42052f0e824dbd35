"""CO2: local steps all the time, outer steps a round late, with a clipped momentum and a penalty for staleness.

    end of phase t, with D^{t-1} just arrived:   m <- beta m + D^{t-1} / L,  a <- a - alpha clip(m, -phi, phi),
                                                 theta_i <- a;  send D_i^t, what the phase did

Error   L=1 without clipping is `delayed` with heavy ball, to the bit; stable for alpha kappa < 1 - beta.
Size    as DiLoCo's, hidden as long as a round takes no longer than H local steps.
State   a, m, alike on all members; the round under way.
Source  Sun et al. 2024, arXiv:2401.16265. Their code has alpha=1, phi=1, L=1, 48 steps, and takes beta by the number of
        workers: 0 up to 16, 0.2 up to 32, 0.5 up to 64, then 0.6.
Differs what is sent is the change of the parameters, not the parameters: the same, and safer in few bits. Members do
        not average among themselves within a phase. See thinwire.outer.clipped for the penalty and what is clipped.
"""

from __future__ import annotations

from typing import Literal

from thinwire.codecs import How, fp32
from thinwire.method import Method
from thinwire.outer import ClippedMomentum, Gap
from thinwire.payloads import Delta
from thinwire.schedules import Every


def co2(
    *,
    every: int = 48,
    outer_lr: float = 1.0,
    momentum: float = 0.0,
    clip: float | None = 1.0,
    penalty: float | Literal["gap"] = 1.0,
    codec: How = fp32,
) -> Method:
    """One outer step every `every` local steps (tau), with what was sent `every` steps before.

    clip     largest move of an element (phi), before `outer_lr`; None for none
    penalty  what an update is divided by (Lambda), or "gap" to measure it every round
    """
    outer = ClippedMomentum(outer_lr, momentum, clip, Gap() if penalty == "gap" else float(penalty))
    return Method(schedule=Every(every, overlap=every), payload=Delta(), codec=codec, outer=outer)
