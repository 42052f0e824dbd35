"""DiLoCo: many local steps, then one outer Nesterov step on the mean pseudo-gradient.

    D_i = a - theta_i,  D = mean_i D_i,  b <- mu b + D,  a <- a - eta (D + mu b),  theta_i <- a    every H local steps

Error   eta=1, mu=0 is averaging of the models; H=1 with it and plain SGD inside is every-step data parallel training.
Size    2 (N-1)/N * c(n) bytes sent per member and round, c(n) what the codec writes for n elements (4n for fp32).
State   anchor a and momentum b, alike on all members; inner optimizers' moments stay local and are kept.
Source  Douillard et al. 2023, arXiv:2311.08105, Alg. 1; eta=0.7, mu=0.9, H=500 in their main runs.
Differs H=100 by default, for runs shorter than theirs.
"""

from __future__ import annotations

from thinwire.codecs import How, fp32
from thinwire.method import Method
from thinwire.outer import Nesterov
from thinwire.payloads import Delta
from thinwire.schedules import Every


def diloco(*, every: int = 100, outer_lr: float = 0.7, momentum: float = 0.9, codec: How = fp32) -> Method:
    """One outer step every `every` local steps (H in the paper)."""
    return Method(schedule=Every(every), payload=Delta(), codec=codec, outer=Nesterov(outer_lr, momentum))
