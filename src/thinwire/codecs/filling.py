"""Who sends what to a receiver that wants much and may get little: messages that fill its demand without overlap.

    `budget` times:  i, c = argmax min(D(c), S_i(c));   i sends cell c;   D(c) <- max(0, D(c) - S_i(c))

No cell is sent twice where once is enough, and none that nobody wants. The sum of what is filled is the largest that so
many messages can fill: within a cell, each further sender adds less than the one before.

Cost    a sort of each cell's senders, and one of all messages.
Source  Hu et al. 2024, arXiv:2405.04966 (CodeFilling).
Differs worked out at once from sorted senders; of those that fill a cell alike, the one with most to give sends it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fill_demand(demand: Tensor, confidence: Tensor, budget: int) -> Tensor:
    """The messages to send to one receiver.

    demand      float32 [cells], not negative: how much it wants of each cell
    confidence  float32 [senders, cells], not negative: how much of it each sender can fill
    budget      messages at most
    returns     bool [senders, cells]; of equals the one of the earlier cell
    """
    offered, order = confidence.sort(dim=0, descending=True, stable=True)  # [senders, cells]
    before = offered.cumsum(dim=0) - offered
    fills = torch.minimum((demand - before).clamp_(min=0), offered)
    best = fills.T.reshape(-1).sort(descending=True, stable=True)  # cell after cell, senders as they are best
    wanted = best.indices[: max(0, budget)][best.values[: max(0, budget)] > 0]
    cells, places = wanted // len(confidence), wanted % len(confidence)
    chosen = torch.zeros_like(confidence, dtype=torch.bool)
    chosen[order[places, cells], cells] = True
    return chosen
