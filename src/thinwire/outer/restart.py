"""Inner optimizers that begin anew after every round."""

from __future__ import annotations

from dataclasses import dataclass

from thinwire.outer.base import Around


@dataclass(frozen=True)
class Restart(Around):
    """`outer`, after which inner optimizers have no state for what has changed: no moments, no count of steps.

    DiLoCo and its family keep the moments, each member its own; that is what happens without this. Moments that were
    made elsewhere say little where the outer step goes far, or where fine-tuning is short.
    """

    @property
    def restarts(self) -> bool:
        return True
