"""Islands that hold one GPT each, sharded by FSDP2 within, and train it together with DiLoCo across.

torchrun --nproc-per-node 4 examples/fsdp_island.py

Between machines: torchrun --nnodes 2 --nproc-per-node 2 --node-rank 0 --master-addr ... on each; consecutive ranks make
an island, so that an island is a machine. `docs/islands.md` shows who talks to whom.
"""

import argparse
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import thinwire
from thinwire.train.text import TextOptions

parser = argparse.ArgumentParser()
parser.add_argument("--islands", type=int, default=2)
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--every", type=int, default=10)
options = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
dist.init_process_group()
rank, world = dist.get_rank(), dist.get_world_size()
if device == "cuda":
    torch.cuda.set_device(rank % torch.cuda.device_count())
mesh = init_device_mesh(device, (options.islands, world // options.islands), mesh_dim_names=("across", "within"))

task = TextOptions(size="0.2M", context=32, batch_size=8).build(seed=0)
torch.manual_seed(0)  # the same weights on all members
model = task.model().to(device)
for block in model.blocks:
    fully_shard(block, mesh=mesh["within"])
fully_shard(model, mesh=mesh["within"])
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

method = thinwire.diloco(every=options.every)
with (
    thinwire.join(across=mesh["across"], within=mesh["within"]) as link,
    thinwire.synchronize(model, optimizer, method, link) as sync,
):
    losses = []
    for step in range(options.steps):
        loss = task.loss(model, task.batch(step, rank, world).to(device))
        loss.backward()
        sync.clip_grad_norm_(1.0)  # by the norm of the whole model
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with sync.evaluating(), torch.no_grad():  # all members of an island, since each has a part
        found = task.evaluate(model)["loss"]
    rounds, sent = sync.committed, link.meter.by_purpose()["rounds"].sent_bytes

parameters = sum(p.numel() for p in model.parameters())
sys.stdout.write(  # whole: members share the terminal
    f"member {rank} of island {link.rank}: loss {losses[0]:.3f} -> {losses[-1]:.3f}, validation {found:.6f}, "
    f"{rounds} rounds, sent across {sent / rounds / parameters:.3f} bytes a parameter and round\n"
)
dist.destroy_process_group()
