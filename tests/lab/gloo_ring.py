"""Run by the lab on each host: 4 MB around a ring over torch.distributed, and the ledger of it. Any script would do."""

import os
from pathlib import Path

import torch
import torch.distributed as dist

from thinwire.lab import VARIABLE, write_ledger
from thinwire.links.meter import Meter

BLOCK_BYTES = 1_000_000

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
meter = Meter()
for _ in range(4):
    arrived = torch.empty(BLOCK_BYTES, dtype=torch.uint8)
    sending = dist.isend(torch.zeros(BLOCK_BYTES, dtype=torch.uint8), (rank + 1) % world)
    dist.recv(arrived, (rank - 1) % world)
    assert sending is not None
    sending.wait()
    meter.count("ring", sent_bytes=BLOCK_BYTES, received_bytes=BLOCK_BYTES, messages_sent=1)
write_ledger(Path(os.environ[VARIABLE]), meter)
dist.barrier()
dist.destroy_process_group()
