"""torchft's LocalSGD or DiLoCo: a replica group of one process on every host, the lighthouse beside host 0.

options  algorithm: local_sgd or diloco; every; for diloco: outer_lr, momentum, fragments (1: the whole model), delay
         (steps between sending a fragment and using it) and alpha (share of the local model kept)
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from member import Member, flat
from torch import Tensor, nn
from torch.distributed import TCPStore
from torchft.local_sgd import DiLoCo, LocalSGD
from torchft.manager import Manager
from torchft.process_group import ProcessGroupGloo

_LIGHTHOUSE_PORT = 29510


def address(rank: int) -> str:
    """Of a host in the lab: host 0's, with another last number."""
    return f"{os.environ['MASTER_ADDR'].rpartition('.')[0]}.{rank + 1}"


def start_lighthouse(world: int) -> None:
    program = Path(sys.executable).with_name("torchft_lighthouse")
    subprocess.Popen([
        str(program), "--bind", f"0.0.0.0:{_LIGHTHOUSE_PORT}", "--min_replicas", str(world),
        "--join_timeout_ms", "60000", "--quorum_tick_ms", "20",
    ])  # fmt: skip


def fragments_of(model: nn.Module, count: int) -> list[nn.Module]:
    """Blocks dealt out evenly; what is beside the blocks goes with the first and the last."""
    if count == 1:
        return [model]
    blocks: list[nn.Module] = list(model.blocks)
    ends = [round(len(blocks) * (i + 1) / count) for i in range(count)]
    parts = [nn.ModuleList(blocks[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
    parts[0].extend([model.embed])
    parts[0].register_parameter("position", model.position)
    parts[-1].append(model.norm)
    return list(parts)


def synchronized(
    work: Member, manager: Manager, model: nn.Module, inner: torch.optim.Optimizer
) -> AbstractContextManager[Any]:
    options = work.options
    if options["algorithm"] == "local_sgd":
        return LocalSGD(manager, model, inner, sync_every=options["every"])
    parts = fragments_of(model, options["fragments"])
    outers = [
        torch.optim.SGD(
            part.parameters(), lr=options["outer_lr"], momentum=options["momentum"], nesterov=options["momentum"] > 0
        )
        for part in parts
    ]
    return DiLoCo(
        manager, parts, inner, outers, sync_every=options["every"], use_bucketization=True,
        fragment_sync_delay=options["delay"], fragment_update_alpha=options["alpha"],
    )  # fmt: skip


def consensus(work: Member, model: nn.Module, rounds: Any) -> Callable[[], Tensor]:
    """What all replica groups agreed on last: the average, or DiLoCo's copy of the global parameters."""
    if not isinstance(rounds, DiLoCo):
        return work.last_equal(model, work.options["every"])
    shown = copy.deepcopy(model)
    here = {id(mine): theirs for mine, theirs in zip(model.parameters(), shown.parameters(), strict=True)}
    agreed = [
        (here[id(parameter)], fragment.original_parameters[name])
        for fragment in rounds._fragments
        for name, parameter in fragment._model_fragment.named_parameters()
    ]

    @torch.no_grad()
    def global_model() -> Tensor:
        for parameter, value in agreed:
            parameter.copy_(value)
        return flat(shown)

    return global_model


def main() -> None:
    work = Member(Path(sys.argv[1]))
    here, limit = address(work.rank), timedelta(seconds=300)
    if work.rank == 0:
        start_lighthouse(work.world)
    store = TCPStore(here, 29520, is_master=True, wait_for_workers=False)
    model = work.model()
    inner = work.optimizer(model.parameters())

    def load(state: dict[str, Any]) -> None:
        model.load_state_dict(state["model"])
        inner.load_state_dict(state["inner"])

    manager = Manager(
        pg=ProcessGroupGloo(timeout=limit), load_state_dict=load,
        state_dict=lambda: {"model": model.state_dict(), "inner": inner.state_dict()},
        min_replica_size=work.world, use_async_quorum=False, timeout=limit, quorum_timeout=limit,
        connect_timeout=limit, rank=0, world_size=1, store_addr=here, store_port=store.port,
        lighthouse_addr=f"http://{address(0)}:{_LIGHTHOUSE_PORT}", replica_id=f"member-{work.rank}", hostname=here,
        init_sync=False,
    )  # fmt: skip
    with synchronized(work, manager, model, inner) as rounds:
        work.begin(consensus(work, model, rounds))
        for _ in work.steps():
            work.loss(model).backward()
            work.clip(model)
            inner.step()
            inner.zero_grad()
            work.stepped()


if __name__ == "__main__":
    main()
