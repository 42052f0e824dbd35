"""One process of two islands of two: python island_member.py TASK OUT RANK WORLD PORT."""

from __future__ import annotations

import copy
import os
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from collective_counts import ENGINES as PLACED  # noqa: E402
from collective_counts import step_bytes  # noqa: E402

import thinwire  # noqa: E402
from small import adamw, batch, loss_of, make_model  # noqa: E402
from thinwire.aggregators import WeightedMean  # noqa: E402
from thinwire.codecs import parse  # noqa: E402
from thinwire.links.base import Channel, Link  # noqa: E402
from thinwire.links.islands import IslandLink  # noqa: E402
from thinwire.pace import ByLink  # noqa: E402
from thinwire.schedules import Every, Paced  # noqa: E402
from thinwire.sharding import local  # noqa: E402

ISLANDS, MEMBERS = 2, 2


#: What is trained, by name: a method, and what else `trained` takes.
METHODS = {
    "ddp": thinwire.every_step(),
    "local_sgd": thinwire.local_sgd(every=2),
    "diloco": thinwire.diloco(every=3),
    "streaming": thinwire.streaming_diloco(every=4, fragments=2, overlap=1, codec=parse("fp32")),
    "back to back": thinwire.diloco(every=3).but(schedule=Every(3, overlap=3)),
    "paced": thinwire.diloco(every=2).but(schedule=Paced(Every(2), ByLink(least=3, most=3))),
    "weighted": thinwire.diloco(every=3).but(aggregator=WeightedMean()),
}
ENGINES = ("fsdp", "ddp", "zero")
CODECS = ("int8", "topk(1/8) | int4", "powersgd(2)", "dct(1/4)", "rows(1/2)", "layers(int4, small=8)")


def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (ISLANDS, MEMBERS), mesh_dim_names=("across", "within"))


def placed(engine: str, both, model: nn.Module):
    """The model as an engine holds it within an island, and an optimizer for it."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.optim import ZeroRedundancyOptimizer

    group = both["within"].get_group()
    if engine == "fsdp":
        for layer in (model[0], model[2]):  # the root has the last one, and leaves it whole after a forward pass
            fully_shard(layer, mesh=both["within"])
        return fully_shard(model, mesh=both["within"]), adamw(model)
    wrapped = DistributedDataParallel(model, process_group=group)
    if engine == "ddp":
        return wrapped, adamw(model)
    zero = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, process_group=group, lr=1e-2)
    return wrapped, zero


def samples(step: int, rank: int) -> int:
    """Other numbers on other members, of other sums on other islands."""
    return 1 + step % 2 + rank * rank


def trained(
    engine, method, steps=8, *, both, weighs=False, clip=None, evaluate=None, start=None, stop=None, poison=None
):
    """Train within the islands and across; what this member has at the end.

    evaluate  after that step: the loss of the model that all agree on
    poison    (step, rank): before that step this process writes NaN to one element of what it holds
    """
    rank = dist.get_rank()
    model, optimizer = placed(engine, both, make_model())
    norms, outcomes = [], []
    with thinwire.join(across=both["across"], within=both["within"]) as link:
        with thinwire.synchronize(model, optimizer, method, link, observer=outcomes.append) as sync:
            if start:
                write_all(model, start["model"])
                optimizer.load_state_dict(start["optimizer"])
                sync.load_state_dict(start["sync"])
            for step in range(start["step"] if start else 0, steps):
                loss_of(model, *batch(step, rank)).backward()
                if weighs:
                    sync.count(samples(step, rank))
                if clip is not None:
                    norms.append(sync.clip_grad_norm_(clip))
                if poison == (step, rank):
                    with torch.no_grad():
                        local(next(model.parameters())).view(-1)[-1] = torch.nan
                optimizer.step()
                optimizer.zero_grad()
                if evaluate == step:
                    with sync.evaluating(), torch.no_grad():
                        norms.append(loss_of(model, *batch(99, rank)))
                if stop == step + 1:
                    kept = {
                        "model": [local(p).detach().clone() for p in model.parameters()],
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


@torch.no_grad()
def write_all(model, values) -> None:
    for p, value in zip(model.parameters(), values, strict=True):
        local(p).copy_(value)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def reference(link, method, steps=8, *, weighs=False, clip=None, evaluate=None):
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
                sync.count(sum(samples(step, link.rank * MEMBERS + member) for member in range(MEMBERS)))
            if clip is not None:
                norms.append(sync.clip_grad_norm_(clip))
            optimizer.step()
            optimizer.zero_grad()
            if evaluate == step:
                with sync.evaluating(), torch.no_grad():
                    norms += [loss_of(model, *batch(99, link.rank * MEMBERS + member)) for member in range(MEMBERS)]
        sync.finish()
        with sync.evaluating():
            consensus = [p.detach().clone() for p in model.parameters()]
        sizes = sync._fragments.sizes
    live = [p.detach().clone() for p in model.parameters()]
    sent = {purpose: traffic.sent_bytes for purpose, traffic in link.meter.by_purpose().items()}
    return {
        "live": live, "consensus": consensus, "norms": norms, "outcomes": outcomes, "sent": sent, "sizes": sizes,
    }  # fmt: skip


#: Ways of training beside the methods: a method and options, which `reference` takes too.
OPTIONS = {
    **{name: (method, {"weighs": True} if name == "weighted" else {}) for name, method in METHODS.items()},
    "clipped": (METHODS["diloco"], {"clip": 0.05}),
    "clipped gradients": (METHODS["ddp"], {"clip": 0.05}),
    "evaluated": (METHODS["streaming"], {"evaluate": 4}),
}


def quad():
    """Everything that is asked of four members in peace: starting them is what takes time."""
    both, found = mesh(), {}
    for engine in ENGINES:
        for name, (method, options) in OPTIONS.items():
            found[engine, name] = trained(engine, method, both=both, **options)
        found[engine, "poisoned"] = trained(engine, METHODS["diloco"], both=both, poison=(4, 3))
    found["fsdp", "poisoned, back to back"] = trained("fsdp", METHODS["back to back"], 9, both=both, poison=(4, 3))
    for codec in CODECS:
        found["fsdp", codec] = trained("fsdp", thinwire.diloco(every=3, codec=parse(codec)), 9, both=both)
    late = thinwire.streaming_diloco(every=4, fragments=2, overlap=3)
    for engine in ("fsdp", "ddp"):
        through = trained(engine, late, both=both, stop=5)
        assert through["saved"]["sync"]["under_way"]
        found[engine, "resumed"] = through, trained(engine, late, both=both, start=through["saved"])
    found["given"] = gives(both)
    found["refused"] = refusals(both)
    found["collectives"] = {name: step_bytes(options) for name, options in PLACED.items()}
    found["loses"] = loses(both)  # last: it leaves a broken group
    return found


def gives(both):
    """Parameters before and after member 0 of the islands has given its own to the others, and who is in a subgroup."""
    model, _ = placed("fsdp", both, make_model(seed=dist.get_rank() // MEMBERS))
    before = [whole(p).detach().clone() for p in model.parameters()]
    with thinwire.join(across=both["across"], within=both["within"]) as link:
        thinwire.broadcast(model, link)
    with thinwire.join(across=both["within"].get_group()) as alone:
        place = (alone.rank, alone.members)
    return {"before": before, "after": [whole(p).detach().clone() for p in model.parameters()], "place": place}


def refusals(both):
    """What members are told that were put together wrongly."""
    from torch.distributed.device_mesh import DeviceMesh

    rank, found = dist.get_rank(), {}
    model, optimizer = placed("fsdp", both, make_model())
    wrapped, sgd_of_it = placed("ddp", both, make_model())
    names = ("across", "within")
    crossed = DeviceMesh("cpu", [[0, 1], [3, 2]], mesh_dim_names=names)
    with thinwire.join(across=both["across"]) as link:
        found["sharded"] = refused(lambda: thinwire.synchronize(model, optimizer, thinwire.diloco(), link))
        found["ddp"] = refused(lambda: thinwire.synchronize(wrapped, sgd_of_it, thinwire.diloco(), link))
    with thinwire.join(across=both["across"], within=both["within"]) as link:
        unlike = thinwire.diloco(every=2 + rank % MEMBERS)
        found["unlike"] = refused(lambda: thinwire.synchronize(model, optimizer, unlike, link).__enter__())
        with thinwire.synchronize(model, optimizer, thinwire.diloco(), link) as sync:
            state = {**sync.state_dict(), "shards": "another part"}
            found["state"] = refused(lambda: sync.load_state_dict(state))
    with thinwire.join(across=crossed["across"], within=both["within"]) as link:
        found["crossed"] = refused(lambda: thinwire.synchronize(model, optimizer, thinwire.diloco(), link).__enter__())
    return found


def refused(make) -> str:
    try:
        make()
    except thinwire.ConfigError as error:
        return str(error)
    return "nothing"


@dataclass(frozen=True)
class Lossy:
    """A link whose `count`-th exchange in rounds finds that member 1 is lost."""

    link: Link
    count: int
    done: list[int] = field(default_factory=list)

    def open(self, purpose):
        channel = self.link.open(purpose)
        return LossyChannel(self, channel) if purpose == "rounds" else channel

    def __getattr__(self, name):
        return getattr(self.link, name)


@dataclass(frozen=True)
class LossyChannel:
    link: Lossy
    channel: Channel

    def exchange(self, outgoing, incoming, what):
        self.link.done.append(1)
        if len(self.link.done) == self.link.count:
            raise thinwire.PeerLost([1], during=what, why="the line is cut")
        return self.channel.exchange(outgoing, incoming, what)


def loses(both):
    """Part 1 of island 0 cannot reach island 1 in the second round: all are told, and keep what they had."""
    rank = dist.get_rank()
    model, optimizer = placed("fsdp", both, make_model())
    with thinwire.join(across=both["across"], within=both["within"]) as link:
        if rank == 1:
            link = IslandLink(Lossy(link.across, count=3), link.within)
        sync = thinwire.synchronize(model, optimizer, thinwire.diloco(every=2), link)
        sync.__enter__()
        try:
            for step in range(8):
                loss_of(model, *batch(step, rank)).backward()
                kept = [vector.clone() for vector in sync.consensus()]
                optimizer.step()
                optimizer.zero_grad()
        except thinwire.PeerLost as lost:
            rescued = sync.state_dict(rescue=True)["fragments"][0]
            return {
                "ranks": lost.ranks, "text": str(lost), "committed": sync.committed, "step": sync.step,
                "kept": kept, "now": sync.consensus(), "begun": rescued["committed"],
            }  # fmt: skip


def main() -> None:
    task, out, rank, world, port = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    torch.save(globals()[task](), f"{out}/{rank}.pt")
    os._exit(0)  # a broken group has nothing to take apart


if __name__ == "__main__":
    main()
