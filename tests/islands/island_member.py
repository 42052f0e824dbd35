"""One process of two islands of two: python island_member.py TASK OUT RANK WORLD PORT."""

from __future__ import annotations

import copy
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import thinwire  # noqa: E402
from small import adamw, batch, loss_of, make_model, sgd  # noqa: E402
from thinwire.aggregators import Mean, WeightedMean  # noqa: E402
from thinwire.codecs import parse  # noqa: E402
from thinwire.fragments import Fragments  # noqa: E402
from thinwire.links.islands import IslandLink  # noqa: E402
from thinwire.sharding import local  # noqa: E402

ISLANDS, MEMBERS = 2, 2


def unequal(link) -> None:
    """Samples of a step: other numbers on other members."""


#: What is trained, by name: a method, and what else `trained` takes.
METHODS = {
    "ddp": thinwire.every_step(),
    "local_sgd": thinwire.local_sgd(every=2),
    "diloco": thinwire.diloco(every=3),
    "streaming": thinwire.streaming_diloco(every=4, fragments=2, overlap=1, codec=parse("fp32")),
    "weighted": thinwire.diloco(every=3).but(aggregator=WeightedMean()),
}
ENGINES = ("fsdp", "ddp", "zero")


def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (ISLANDS, MEMBERS), mesh_dim_names=("across", "within"))


def placed(engine: str, both, model: nn.Module):
    """The model as an engine holds it within an island, and an optimizer for it."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.optim import ZeroRedundancyOptimizer

    group = both["within"].get_group()
    if engine == "fsdp":
        for layer in (model[0], model[2], model[4]):
            fully_shard(layer, mesh=both["within"])
        return fully_shard(model, mesh=both["within"]), adamw(model)
    wrapped = DistributedDataParallel(model, process_group=group)
    if engine == "ddp":
        return wrapped, adamw(model)
    zero = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, process_group=group, lr=1e-2)
    return wrapped, zero


def samples(step: int, island: int) -> int:
    """Of all of an island's members; both members of one see as many."""
    return 2 + (step + island) % 3


def trained(engine, method, steps=8, *, weighs=False, clip=None, both=None, start=None, stop=None, poison=None):
    """Train within the islands and across; what this member has at the end.

    poison  (step, rank, engine): before that step this process writes NaN to what it holds of the first parameter
    """
    both = both or mesh()
    rank = dist.get_rank()
    model = make_model()
    if start:
        model.load_state_dict(start["model"])
    model, optimizer = placed(engine, both, model)
    norms, outcomes = [], []
    with thinwire.join(across=both["across"], within=both["within"]) as link:
        with thinwire.synchronize(model, optimizer, method, link, observer=outcomes.append) as sync:
            if start:
                optimizer.load_state_dict(start["optimizer"])
                sync.load_state_dict(start["sync"])
            for step in range(start["step"] if start else 0, steps):
                loss_of(model, *batch(step, rank)).backward()
                if weighs:
                    sync.count(samples(step, link.rank))
                if clip is not None:
                    norms.append(sync.clip_grad_norm_(clip))
                if poison == (step, rank):
                    with torch.no_grad():
                        local(next(model.parameters())).view(-1)[-1] = torch.nan
                optimizer.step()
                optimizer.zero_grad()
                if stop == step + 1:
                    kept = {
                        "model": {name: whole(value).clone() for name, value in state_of(model).items()},
                        "optimizer": copy.deepcopy(optimizer.state_dict()),
                        "sync": copy.deepcopy(sync.state_dict()),
                        "step": stop,
                    }
            sync.finish()
            with sync.evaluating():
                consensus = [whole(p).detach().clone() for p in model.parameters()]
            names = [sync._fragments.names(f) for f in range(sync._fragments.count)]
            sizes = sync._fragments.sizes
        return {
            "live": [whole(p).detach().clone() for p in model.parameters()],
            "consensus": consensus,
            "norms": norms,
            "outcomes": outcomes,
            "names": names,
            "sizes": sizes,
            "sent": {purpose: traffic.sent_bytes for purpose, traffic in link.meter.by_purpose().items()},
            "within": {purpose: traffic.sent_bytes for purpose, traffic in link.within.meter.by_purpose().items()},
            "saved": kept if stop else None,
        }


def state_of(model: nn.Module):
    return model.module.state_dict() if isinstance(model, DistributedDataParallel) else model.state_dict()


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def reference(link, method, steps=8, *, weighs=False, clip=None):
    """The same on two members that hold the whole model: each takes the batches of one island, one after the other."""
    model = make_model()
    optimizer, norms, outcomes = adamw(model), [], []
    with thinwire.synchronize(model, optimizer, method, link, observer=outcomes.append) as sync:
        for step in range(steps):
            for member in range(MEMBERS):
                loss_of(model, *batch(step, link.rank * MEMBERS + member)).backward()
            for p in model.parameters():
                p.grad /= MEMBERS
            if weighs:
                sync.count(samples(step, link.rank))
            if clip is not None:
                norms.append(sync.clip_grad_norm_(clip))
            optimizer.step()
            optimizer.zero_grad()
        sync.finish()
        with sync.evaluating():
            consensus = [p.detach().clone() for p in model.parameters()]
        sizes = sync._fragments.sizes
    live = [p.detach().clone() for p in model.parameters()]
    sent = {purpose: traffic.sent_bytes for purpose, traffic in link.meter.by_purpose().items()}
    return {
        "live": live, "consensus": consensus, "norms": norms, "outcomes": outcomes, "sent": sent, "sizes": sizes,
    }  # fmt: skip


def quad():
    both = mesh()
    found = {}
    for engine in ENGINES:
        for name, method in METHODS.items():
            found[engine, name] = trained(engine, method, both=both, weighs=name == "weighted")
        found[engine, "clipped"] = trained(engine, METHODS["diloco"], both=both, clip=0.3)
    return found


def main() -> None:
    task, out, rank, world, port = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    torch.save(globals()[task](), f"{out}/{rank}.pt")
    if task.startswith("loses"):
        os._exit(0)  # a broken group has nothing to take apart
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
