"""What torch's engines ask of their collectives in a step, counted where they are called."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

#: By option: shape of the mesh, and what fully_shard is given; None is ZeRO-1.
ENGINES = {
    "zero 3": ((4,), True),
    "zero 2": ((4,), False),
    "weights in pairs": ((4,), 2),
    "replicas": ((2, 2), True),
    "replicas, zero 2": ((2, 2), False),
    "zero 1": None,
}
#: Collective -> how often (n - 1) / n of what it is about is sent by a member; some have two names, by version.
TIMES = {
    "all_gather_single": 1,
    "all_gather_into_tensor": 1,
    "reduce_scatter_single": 1,
    "reduce_scatter_tensor": 1,
    "all_reduce": 2,
    "broadcast": 1,
}
KINDS = {name: times for name, times in TIMES.items() if name in dir(dist)}


def model() -> nn.Module:
    """Rows that divide by four, so that no shard is padded."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))


@contextmanager
def counted(sent: Counter):
    """Bytes a member sends on the average, by the outermost tier (of two pairs) that a group spans."""

    def wrapped(name, times, plain):
        def call(*args, **kwargs):
            group = kwargs.get("group") or dist.group.WORLD
            ranks = dist.get_process_group_ranks(group)
            told = [*args, *(value for value in kwargs.values() if isinstance(value, torch.Tensor))]
            n, whole = len(ranks), max((each for each in told if isinstance(each, torch.Tensor)), key=torch.numel)
            tier = "site" if len({rank // 2 for rank in ranks}) > 1 else "pair"
            sent[tier] += times * whole.numel() * whole.element_size() * (n - 1) / n
            return plain(*args, **kwargs)

        return call

    kept = {name: getattr(dist, name) for name in KINDS}
    for name, times in KINDS.items():
        setattr(dist, name, wrapped(name, times, kept[name]))
    try:
        yield
    finally:
        for name, plain in kept.items():
            setattr(dist, name, plain)


def added(group, bucket):
    """DDP's own all-reduce, where it can be counted."""
    work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), group=group, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def step_bytes(options) -> dict[str, float]:
    """Of the second of two steps: in the first, engines set themselves up."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.optim import ZeroRedundancyOptimizer

    net = model()
    if options is None:
        wrapped = DistributedDataParallel(net)
        wrapped.register_comm_hook(dist.group.WORLD, added)
        optimizer = ZeroRedundancyOptimizer(net.parameters(), torch.optim.Adam, lr=1e-3)
    else:
        shape, again = options
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])
        for layer in (net[0], net[2]):
            fully_shard(layer, mesh=mesh, reshard_after_forward=again)
        wrapped = fully_shard(net, mesh=mesh, reshard_after_forward=again)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(2):
        sent: Counter = Counter()
        with counted(sent):
            wrapped(torch.ones(4, 16)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    inner = optimizer.optim.state if options is None else optimizer.state
    kept = [v.to_local() if hasattr(v, "to_local") else v for state in inner.values() for v in state.values()]
    shards = [p.to_local() if hasattr(p, "to_local") else p for p in net.parameters()]
    return {
        "pair": sent["pair"], "site": sent["site"],
        "optimizer": sum(v.numel() * 4 for v in kept if v.ndim), "weights": sum(p.numel() * 4 for p in shards),
    }  # fmt: skip
