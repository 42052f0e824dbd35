"""SlowMo: a slow heavy ball around any local steps, in units of their gradients.

    u <- beta u + D / gamma;   a <- a - alpha gamma u        gamma the inner learning rate when the round ends

Error   with a learning rate that stays, it is SGD(alpha, beta), to the bit: H=1 and plain SGD inside is then SGD with
        momentum beta. beta=0, alpha=1 is averaging.
State   v = gamma u, in units of parameters, and gamma; alike on all members.
Source  Wang et al. 2020, arXiv:1910.00643, Alg. 1 and eq. 2; alpha=1.
Differs v <- beta (gamma / gamma_before) v + D and a <- a - alpha v are the same, and divide by no small number. At a
        learning rate of 0, where u has no value, the momentum begins anew: a warm-up may begin at 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.outer.base import Memory, Now, Outer, check


@dataclass(frozen=True)
class SlowMo(Outer):
    """See above: alpha and beta of the paper. The learning rate is that of the optimizer's first group."""

    lr: float = 1.0
    momentum: float = 0.5

    def __post_init__(self) -> None:
        check(self.lr, self.momentum)

    @property
    def linear(self) -> bool:
        return True

    def step(self, anchor: Tensor, update: Tensor, memory: Memory, now: Now) -> tuple[Tensor, Memory]:
        before = memory["gamma"].item() if "gamma" in memory else 0.0
        v = update
        if before > 0 and now.lr > 0:
            v = memory["v"] * (self.momentum * (now.lr / before)) + update
        gamma = torch.tensor(now.lr, dtype=torch.float64)
        return torch.add(anchor, v, alpha=-self.lr * now.scale), {"v": v, "gamma": gamma}
