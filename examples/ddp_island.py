"""Islands that train one GPT each with DDP within, and together with DiLoCo across; --zero shards optimizer state.

torchrun --nproc-per-node 4 examples/ddp_island.py [--zero]

Each member sends its share of the parameters across, and gets the others' within its island: together an island sends
the model once. `docs/islands.md` shows who talks to whom.
"""

import argparse
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import thinwire
from thinwire.train.text import TextOptions

parser = argparse.ArgumentParser()
parser.add_argument("--islands", type=int, default=2)
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--every", type=int, default=10)
parser.add_argument("--zero", action="store_true", help="ZeRO's first stage within the island")
options = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
dist.init_process_group()
rank, world = dist.get_rank(), dist.get_world_size()
if device == "cuda":
    torch.cuda.set_device(rank % torch.cuda.device_count())
mesh = init_device_mesh(device, (options.islands, world // options.islands), mesh_dim_names=("across", "within"))
island = mesh["within"].get_group()

task = TextOptions(size="0.2M", context=32, batch_size=8).build(seed=0)
torch.manual_seed(0)  # the same weights on all members
model = DistributedDataParallel(task.model().to(device), process_group=island)
if options.zero:
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, process_group=island, lr=3e-3)
else:
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
        sync.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with sync.evaluating(), torch.no_grad():  # all members of an island, since each has a share
        found = task.evaluate(model)["loss"]
    rounds, sent = sync.committed, link.meter.by_purpose()["rounds"].sent_bytes

parameters = sum(p.numel() for p in model.parameters())
sys.stdout.write(  # whole: members share the terminal
    f"member {rank} of island {link.rank}: loss {losses[0]:.3f} -> {losses[-1]:.3f}, validation {found:.6f}, "
    f"{rounds} rounds, sent across {sent / rounds / parameters:.3f} bytes a parameter and round\n"
)
dist.destroy_process_group()
