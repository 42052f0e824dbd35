"""torch's DistributedDataParallel: plain, or with one of torch's communication hooks.

options  hook: none, fp16 or powersgd; for powersgd: rank, start (steps before compression), bucket_mb
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from member import Member, flat
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    work = Member(Path(sys.argv[1]))
    dist.init_process_group("gloo", timeout=timedelta(seconds=600))
    model = DistributedDataParallel(work.model(), bucket_cap_mb=work.options.get("bucket_mb", 25))
    hook = work.options["hook"]
    if hook == "fp16":
        model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif hook == "powersgd":
        state = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=work.options["rank"], start_powerSGD_iter=work.options["start"]
        )
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    optimizer = work.optimizer(model.parameters())
    work.begin(lambda: flat(model))
    for _ in work.steps():
        work.loss(model).backward()
        work.clip(model)
        optimizer.step()
        optimizer.zero_grad()
        work.stepped()


if __name__ == "__main__":
    main()
