"""Streaming DiLoCo: one fragment at a time, while training goes on, in four bits.

    after step k, for each fragment f that is due:   send D_f = a_f - theta_f
    after step k + tau:                              (a_f, b_f) <- Nesterov(a_f, b_f, mean D_f)
                                                     theta_f <- alpha theta_f + (1 - alpha) a_f

Error   F=1, tau=0, alpha=0 and fp32 is DiLoCo to the bit; alpha=1 takes nothing from the others. How much
        alpha=0.5 weakens the outer step depends on its lr: choose the two together.
Size    as DiLoCo's per H steps; at once only a fragment: 1/F of it. e3m0 is 4.125 bits an element against 32.
State   anchor and momentum of each fragment, alike on all members; rounds under way.
Source  Douillard et al. 2025, arXiv:2501.18512: fragments are strided layers, tau=1, alpha=0.5, H=100, mu=0.9, four-bit
        floats. The outer lr of 0.4 is from others' notes on the paper, and that its four bits are e3m0 (one sign and
        three exponent bits) is likely but was not confirmed.
Differs fragments are four by default, not one for every three layers; embeddings and norms go to the smallest fragment.
"""

from __future__ import annotations

from thinwire.codecs import How, e3m0
from thinwire.method import Method
from thinwire.outer import Mix, Nesterov
from thinwire.payloads import Delta
from thinwire.schedules import Every


def streaming_diloco(
    *,
    every: int = 100,
    fragments: int = 4,
    overlap: int = 1,
    keep: float = 0.5,
    outer_lr: float = 0.4,
    momentum: float = 0.9,
    codec: How = e3m0(),  # noqa: B008 (a frozen value)
) -> Method:
    """Fragments in rotation, each every `every` steps (H), applied `overlap` steps (tau) later.

    keep  share of the local model kept when a fragment arrives (alpha); without overlap there is nothing to keep
    """
    outer = Nesterov(outer_lr, momentum)
    return Method(
        schedule=Every(every, overlap),
        payload=Delta(fragments),
        codec=codec,
        outer=Mix(outer, keep) if overlap else outer,
    )
