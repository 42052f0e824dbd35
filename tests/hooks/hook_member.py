"""One process of a group whose model is DDP's or FSDP's: python hook_member.py TASK OUT RANK WORLD PORT."""

from __future__ import annotations

import copy
import os
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from hook_doubles import ScaleFirst  # noqa: E402

import thinwire  # noqa: E402
from doubles import Halves  # noqa: E402
from small import WIDTH, batch, loss_of, make_model, sgd  # noqa: E402
from thinwire.codecs import ErrorFeedback, parse  # noqa: E402

FEW_BYTES = 0.0006  # MB a bucket: several of them for a model of 2 kB
CODECS = {
    "int8": "int8",
    "topk": "topk(1/8) | int4",
    "staged": ErrorFeedback(ScaleFirst()),
}


class Branches(nn.Module):
    """On even steps no member uses `odd`; on odd steps members of odd rank do not use `even`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.trunk, self.even, self.odd = nn.Linear(WIDTH, 16), nn.Linear(16, 5), nn.Linear(16, 5)
        self.step, self.rank = 0, dist.get_rank()

    def forward(self, x):
        hidden = self.trunk(x).tanh()
        if self.step % 2 == 0:
            return self.even(hidden)
        return self.odd(hidden) if self.rank % 2 else self.odd(hidden) + self.even(hidden)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.second, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.last(self.second(self.first(x).tanh()).tanh())


class Narrow(nn.Module):
    """bfloat16 in the middle, float32 around it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.last = nn.Linear(WIDTH, 16), nn.Linear(16, 5)
        self.middle = nn.Linear(16, 16).bfloat16()

    def forward(self, x):
        return self.last(self.middle(self.first(x).tanh().bfloat16()).tanh().float())


def train_ddp(codec, steps=6, *, build=make_model, accumulate=1, cap=FEW_BYTES, start=None, stop=None, **options):
    """Parameters, gradients of the last step and losses after `steps` steps; `start` and `stop`: see `resumes`."""
    model = build()
    if start:
        model.load_state_dict(start["model"])
    wrapped = DistributedDataParallel(model, bucket_cap_mb=cap, **options)
    state = None
    if codec is not None:
        state, hook = thinwire.hooks.ddp(wrapped, codec)
        wrapped.register_comm_hook(state, hook)
    if start:
        state.load_state_dict(start["hook"])
    optimizer, losses, rank = sgd(model), [], dist.get_rank()
    for step in range(start["step"] if start else 0, steps):
        optimizer.zero_grad()
        if isinstance(model, Branches):
            model.step = step
        for part in range(accumulate):
            quiet = wrapped.no_sync() if part < accumulate - 1 else nullcontext()
            with quiet:
                loss = loss_of(wrapped, *batch(10 * step + part, rank))
                loss.backward()
        losses.append(loss.item())
        optimizer.step()
        if stop == step + 1:
            kept = {"model": copy.deepcopy(model.state_dict()), "hook": state.state_dict(), "step": stop}
    return {
        "parameters": [p.detach().clone() for p in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.detach().clone() for p in model.parameters()],
        "losses": losses,
        "units": len(state._units) if state else 0,
        "saved": kept if stop else None,
        "sent_bytes": state.meter.total().sent_bytes if state else 0,
    }


OPTIONS = {
    "plainly": {},
    "as bucket view": {"gradient_as_bucket_view": True},
    "static graph": {"static_graph": True},
    "accumulated": {"accumulate": 3},
    "unused": {"find_unused_parameters": True, "build": Branches},
    "unused as bucket view": {"find_unused_parameters": True, "build": Branches, "gradient_as_bucket_view": True},
    "tied": {"build": Tied, "cap": 0.0003},
    "mixed dtypes": {"build": Narrow},
}


def ddp_pair():
    """Everything that two members of DDP are asked for."""
    found = {}
    for name, options in OPTIONS.items():
        found[name] = train_ddp(None, **options), train_ddp("fp32", **options)
    for name, codec in CODECS.items():
        found[name] = train_ddp(codec, 30)
    whole = {"cap": 25}
    found["hook, one unit"] = train_ddp("topk(1/8)", **whole)
    found["every step"] = every_step("topk(1/8)", 6)
    for name, codec in {"resumed topk": "topk(1/8) | int4", "resumed staged": ErrorFeedback(ScaleFirst())}.items():
        through = train_ddp(codec, 6, stop=3)
        found[name] = through, train_ddp(codec, 6, start=through["saved"], cap=25)
    found["plain"] = train_ddp(None, 30)
    return found


def every_step(codec, steps):
    """The same training with thinwire's own synchronizer."""
    model = make_model()
    optimizer, rank = sgd(model), dist.get_rank()
    method = thinwire.every_step(codec=parse(codec))
    with thinwire.join() as link, thinwire.synchronize(model, optimizer, method, link):
        for step in range(steps):
            optimizer.zero_grad()
            loss_of(model, *batch(10 * step, rank)).backward()
            optimizer.step()
    return {"parameters": [p.detach().clone() for p in model.parameters()]}


def one_gradient(codec, world):
    """Gradients of one step with the hook and without it, and every member's own."""
    with_hook, plain = train_ddp(codec, 1), train_ddp(None, 1)
    own = []
    for rank in range(world):
        model = make_model()
        loss_of(model, *batch(0, rank)).backward()
        own.append([p.grad for p in model.parameters()])
    return {"hook": with_hook["gradients"], "plain": plain["gradients"], "own": own}


# --- FSDP -------------------------------------------------------------------------------------------------------------


def train_fsdp(codec, steps=6, *, islands=False, policy=None, start=None, stop=None, seed=0):
    """The whole model's parameters, gradients and losses."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    model, world, rank = make_model(), dist.get_world_size(), dist.get_rank()
    if start:
        model.load_state_dict(start["model"])
    options = {"mp_policy": policy} if policy else {}
    if islands:
        both = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("across", "within"))
        mesh, across = both["within"], both["across"].get_group()
    else:
        mesh, across = init_device_mesh("cpu", (world,)), None
    for layer in (model[0], model[2], model[4]):
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    assert isinstance(model, FSDPModule)
    shards = None if codec is None else thinwire.hooks.fsdp(model, codec, across=across, seed=seed)
    if start:
        shards.load_state_dict(start["hook"])
    optimizer, losses = sgd(model), []
    for step in range(start["step"] if start else 0, steps):
        optimizer.zero_grad()
        loss = loss_of(model, *batch(10 * step, rank))
        loss.backward()
        losses.append(loss.item())
        gradients = [p.grad.full_tensor().clone() for p in model.parameters()]
        optimizer.step()
        if stop == step + 1:
            kept = {
                "model": {name: value.full_tensor().clone() for name, value in model.state_dict().items()},
                "hook": copy.deepcopy(shards.state_dict()),
                "step": stop,
            }
    return {
        "parameters": [p.full_tensor().detach().clone() for p in model.parameters()],
        "gradients": gradients,
        "losses": losses,
        "saved": kept if stop else None,
        "sent_bytes": shards.meter.total().sent_bytes if shards else 0,
    }


def fsdp_pair():
    """Everything that two members of FSDP2 are asked for."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    narrow = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    found = {
        "as it is": train_fsdp(None),
        "plain": train_fsdp(None, 30),
        "fp32": train_fsdp("fp32"),
        "in two exchanges": train_fsdp(Halves()),
        "plain, narrow": train_fsdp(None, policy=narrow),
        "fp32, narrow": train_fsdp("fp32", policy=narrow),
    }
    found |= {name: train_fsdp(codec, 30) for name, codec in CODECS.items()}
    through = train_fsdp("topk(1/8) | int4", 6, stop=3)
    found["resumed"] = through, train_fsdp("topk(1/8) | int4", 6, start=through["saved"])
    return found


def pair():
    """Two processes for all of it: starting them is what takes time."""
    return {"ddp": ddp_pair(), "fsdp": fsdp_pair()}


def quad():
    """What only more than two members show, of DDP and of FSDP."""
    own = one_gradient("fp32", dist.get_world_size())
    return {
        "ddp": own,
        "ddp codecs": {name: train_ddp(codec) for name, codec in CODECS.items()},
        "fsdp plain": train_fsdp(None, 1),
        "fsdp fp32": train_fsdp("fp32", 1),
        "fsdp across": train_fsdp("fp32", 1, islands=True),
        "fsdp plain, long": train_fsdp(None, 30),
        "fsdp across topk": train_fsdp("topk(1/8) | int4", 30, islands=True),
    }


def dies_in_backward():
    """Member 1 leaves without a word before the third backward pass; the others say whom they lost."""
    rank, found = dist.get_rank(), None
    model = make_model()
    wrapped = DistributedDataParallel(model, bucket_cap_mb=FEW_BYTES, broadcast_buffers=False)
    wrapped.register_comm_hook(*thinwire.hooks.ddp(wrapped, "int8"))
    for step in range(5):
        loss = loss_of(wrapped, *batch(step, rank))
        if rank == 1 and step == 2:
            os._exit(9)
        try:
            loss.backward()
        except thinwire.PeerLost as lost:
            found = {"ranks": lost.ranks, "text": str(lost), "step": step}
            break
    return found


def main() -> None:
    task, out, rank, world, port = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    torch.save(globals()[task](), f"{out}/{rank}.pt")
    if task == "dies_in_backward":
        os._exit(0)  # a broken group has nothing to take apart
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
