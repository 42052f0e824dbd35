"""torch's DistributedDataParallel on the same work as `thinwire train`: the baseline of lab_gpt.py, run on every host.

torchrun ... benchmarks/ddp_member.py DATA SECONDS OUT.json
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from thinwire.train.text import TextOptions


def main() -> None:
    data, seconds, out = sys.argv[1], float(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    task = TextOptions(data=data, size="0.9M", context=128, batch_size=8).build(seed=0)
    torch.manual_seed(0)
    model = DistributedDataParallel(task.model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    step, start = 0, time.perf_counter()
    running = torch.ones(1)
    while running.item():  # all members stop at the same step: the slowest clock decides, once a step
        batch = task.batch(step, rank, world)
        task.loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        running.fill_(time.perf_counter() - start < seconds)
        dist.all_reduce(running, dist.ReduceOp.MIN)
    took = time.perf_counter() - start
    if rank == 0:
        loss = task.evaluate(model.module)["loss"]
        out.write_text(json.dumps({"steps": step, "seconds": took, "loss": loss}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
