"""Control variates of members and of all of them, in units of parameters: what SCALLION and SCAFCOM have in common.

A member's C_i stands for what its own local steps of a round would move the model by, C for the mean of all members'.
Between rounds each local step is corrected by (C_i - C) / K, K the steps of a round, so that members do not drift to
where their own data would have them.

    after each step     y <- y + (C_i - C) / K
    D = anchor - y      the payload, so that G = D + C_i - C is what the gradients of the round came to
    C_i <- C_i + sent
    C   <- C + share * combined        share: of the members, how many took part
"""

from __future__ import annotations

from torch import Tensor

from thinwire.codecs.stages import Tensors


def updated(combined: Tensor, shared: Tensors, share: float) -> tuple[Tensor, Tensors]:
    """The mean change of members' variates and their mean before it: the update [n]; and C after the round."""
    if not shared:
        return combined, {"control": combined * share}
    # A product and a sum, rounded one by one: shared state is to be alike on all processors.
    return combined + shared["control"], {"control": shared["control"] + combined * share}


def drift_of(own: Tensors, shared: Tensors) -> Tensor | None:
    """C_i - C [n]; None before the first round."""
    if "control" in own:
        return own["control"] - shared["control"]
    return -shared["control"] if shared else None
