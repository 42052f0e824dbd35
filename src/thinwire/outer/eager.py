"""Eager outer steps: a member's own part of a round counts at once, the others' when they have arrived.

    end of phase t, with D^{t-1} just arrived:   (a, b) <- outer(a, b, D^{t-1})
                                                 (theta_i, h_i) <- outer(a, h_i, D_i^t / N)

Local steps go on from theta_i, while D_i^t is sent; (a, b) are alike on all members, h_i is a member's own momentum. In
the papers' form each member has an anchor a_i of its own, fed with its fresh part and the others' old ones:

    (a_i, b_i) <- outer(a_i, b_i, (D_i^t + sum_{j != i} D_j^{t-1}) / N);  theta_i <- a_i

An outer step that is linear splits that in two: what a_i has in common with the others' is fed with all that was
counted, and the rest with D_i^t / N - D_i^{t-1} / N. The sum of such differences is its last term, so the rest is one
step from a with a momentum that knows the member's own parts alone.

Error   none against the form above but for rounding; N=1 is the outer step without delay, to the bit. Without momentum
        members differ by lr / N (D_j - D_i), with it by a filter of that, so they never drift apart.
State   a momentum of the member's own, beside the anchor's. It may be lost at any time: members then begin a round at
        the common anchor.
Source  Kale et al. 2025, arXiv:2502.12996 (eager updates); the split is ours. If a codec drops some of what was sent,
        the anchor misses it, and so does theta_i once the round has arrived.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from thinwire.errors import ConfigError
from thinwire.outer.base import Around, Memory, Mine, Now


@dataclass(frozen=True)
class Eager(Around):
    """`outer`, with the own part of what is being sent taken in advance."""

    def __post_init__(self) -> None:
        if not self.outer.linear or self.outer.anticipates:
            raise ConfigError(
                f"{self.outer!r}, made eager: a member's own part and the rest do not add up there",
                expected="an outer step that is linear in what it is fed with",
                mend="Eager(Nesterov(0.4, 0.9)), or this step with rounds that end before the next one begins",
            )

    @property
    def anticipates(self) -> bool:
        return True

    def merge(self, mine: Mine, anchor: Tensor, own: Memory, now: Now) -> tuple[Tensor, Memory]:
        if not mine.fresh.numel():  # nothing is under way any more
            return anchor, {}
        return self.outer.step(anchor, mine.fresh / mine.members, own, now)
