"""A byte-level GPT under DDP with one communication hook; started on every host of the lab by ddp_hook.py.

torchrun ... benchmarks/ddp_hook_member.py DATA HOOK BUCKET_MB STEPS SEED OUT.json

HOOK: none, fp16 or powersgd (torch's own), or a codec expression of thinwire. Bytes are the interface's, and with the
time they count after the first three steps: DDP then has its buckets, and powerSGD_hook compresses.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import thinwire
from thinwire.train.text import TextOptions

WARM_UP_STEPS = 3


def sent_bytes() -> int:
    """By this host, on its one interface but for loopback."""
    return sum(io.bytes_sent for name, io in psutil.net_io_counters(pernic=True).items() if name != "lo")


def main() -> None:
    data, hook, bucket_mb, steps, seed, out = (kind(word) for kind, word in zip(
        (str, str, float, int, int, Path), sys.argv[1:], strict=True))  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=40))
    rank, world = dist.get_rank(), dist.get_world_size()
    task = TextOptions(data=data, size="0.9M", context=128, batch_size=8).build(seed=seed)
    torch.manual_seed(seed)
    model = DistributedDataParallel(task.model(), bucket_cap_mb=bucket_mb)
    if hook == "fp16":
        model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif hook == "powersgd":
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=2)
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    elif hook != "none":
        model.register_comm_hook(*thinwire.hooks.ddp(model, hook, seed=seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    start, before = 0.0, 0
    for step in range(steps):
        if step == WARM_UP_STEPS:
            dist.barrier()
            start, before = time.perf_counter(), sent_bytes()
        task.loss(model, task.batch(step, rank, world)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    dist.barrier()
    counted = steps - WARM_UP_STEPS
    took, sent = (time.perf_counter() - start) / counted, (sent_bytes() - before) / counted
    if rank == 0:
        loss = task.evaluate(model.module)["loss"]
        out.write_text(json.dumps({"seconds": took, "sent_bytes": sent, "loss": loss}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
