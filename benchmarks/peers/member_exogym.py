"""exogym's strategies, which its own trainer runs as processes of one machine; here each process has its own host.

options  strategy: diloco, sparta or demo; every: for diloco; p: for sparta, the share of parameters averaged a step
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from exogym.strategy import DeMoStrategy, DiLoCoStrategy, SPARTAStrategy, Strategy
from exogym.strategy.optim import OptimSpec
from member import Member, flat
from torch import Tensor, nn


def strategy_of(work: Member) -> Strategy:
    """Its own defaults, but for the inner optimizer, which all contenders share (DeMo brings its own)."""
    inner, most = OptimSpec(torch.optim.AdamW, lr=work.work["lr"]), work.work["clip_norm"]
    kind = work.options["strategy"]
    if kind == "diloco":
        return DiLoCoStrategy(inner, H=work.options["every"], max_norm=most)
    if kind == "sparta":
        return SPARTAStrategy(inner, p_sparta=work.options["p"], max_norm=most)
    return DeMoStrategy()


def consensus(work: Member, model: nn.Module) -> Callable[[], Tensor]:
    """DiLoCo: the model of the last round, which is after steps H+1, 2H+1, ... there; the others: member 0's own."""
    if work.options["strategy"] == "diloco":
        return work.last_equal(model, work.options["every"], late=1)
    return lambda: flat(model)


def main() -> None:
    work = Member(Path(sys.argv[1]))
    dist.init_process_group("gloo", timeout=timedelta(seconds=600))
    model = work.model()
    strategy = strategy_of(work)
    strategy._init_node(model, work.rank, work.world)
    work.begin(consensus(work, model))
    for _ in work.steps():
        strategy.zero_grad()
        work.loss(model).backward()
        strategy.step()
        work.stepped()


if __name__ == "__main__":
    main()
