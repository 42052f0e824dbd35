"""thinwire: any method of its table around the plain loop.

options  method: its name; the rest are the method's options, as a configuration file has them
"""

from __future__ import annotations

import sys
from pathlib import Path

from member import Member, flat
from torch import Tensor, nn

import thinwire
from thinwire.config import MethodOptions


def consensus(model: nn.Module, sync: thinwire.Synchronizer) -> Tensor:
    """The anchors; with methods that have none in common (gossip), member 0's model."""
    if not sync.has_consensus:
        return flat(model)
    with sync.evaluating():
        return flat(model)


def main() -> None:
    work = Member(Path(sys.argv[1]))
    model = work.model()
    optimizer = work.optimizer(model.parameters())
    options = {name: value for name, value in work.options.items() if name != "method"}
    method = MethodOptions(work.options["method"], options).build()
    with (
        thinwire.join() as link,
        thinwire.synchronize(model, optimizer, method, link, seed=work.seed) as sync,
    ):
        work.begin(lambda: consensus(model, sync))
        for _ in work.steps():
            work.loss(model).backward()
            sync.clip_grad_norm_(work.work["clip_norm"])
            optimizer.step()
            optimizer.zero_grad()
            work.stepped()


if __name__ == "__main__":
    main()
