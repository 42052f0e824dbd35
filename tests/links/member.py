"""One member of a torch.distributed group, as a program of its own: python member.py TASK OUT RANK WORLD PORT."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "identities")]

import thinwire  # noqa: E402
from small import adamw, batch, loss_of, make_model, train  # noqa: E402
from thinwire.codecs import int8  # noqa: E402


def every_method(link):
    """All methods of the identity tests, one after the other on one link."""
    from test_methods import METHODS

    return {name: train(link, method, 8) for name, method in METHODS.items()}


def dies_in_round(link):
    """Member 1 leaves without a word after the second round; the others say whom they lost and what they kept."""
    model = make_model()
    optimizer = adamw(model)
    kept = []
    try:
        with thinwire.synchronize(model, optimizer, thinwire.diloco(every=2), link) as sync:
            for step in range(8):
                loss_of(model, *batch(step, link.rank)).backward()
                if link.rank == 1 and step == 5:
                    os._exit(9)
                optimizer.step()
                optimizer.zero_grad()
                kept = [vector.clone() for vector in sync.consensus()]
    except thinwire.PeerLost as lost:
        return {
            "ranks": lost.ranks,
            "text": str(lost),
            "committed": sync.committed,
            "kept": kept,
            "now": sync.consensus(),
        }


def stands_still(link):
    """Member 1 is there but silent; the others say so after five seconds and give up at the time limit."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    start = time.monotonic()
    if link.rank == 1:
        time.sleep(12)
        return None
    try:
        link.open("test").exchange({}, {1: 8}, "round 3, fragment 0")
    except thinwire.PeerLost as lost:
        return {"text": str(lost), "took": time.monotonic() - start}


def many_at_once(link):
    """Twenty exchanges, begun in another order by every member: places for eight would hold other ones on each."""
    channels = [link.open("test") for _ in range(20)]
    first = 7 * link.rank
    jobs = {n % 20: _to_all(link, channels[n % 20], n % 20) for n in range(first, first + 20)}
    return [jobs[n].wait() for n in range(20)]


def one_by_one(link):
    """Jobs of two exchanges each as an engine without tags runs them, and one exchange of the caller's after them."""
    link.one_by_one = True
    log = []
    channels = [link.open("test") for _ in range(7)]
    jobs = [_to_all(link, channels[n], n, times=2, log=log) for n in range(6)]
    others = {rank: torch.full((1,), 6, dtype=torch.uint8) for rank in link.members if rank != link.rank}
    channels[6].exchange(others, dict.fromkeys(others, 1), "the last one")
    log.append(6)
    return log, [job.wait() for job in jobs]


def _to_all(link, channel, number, times=1, log=None):
    others = [rank for rank in link.members if rank != link.rank]

    def job():
        for _ in range(times):
            if log is not None:
                log.append(number)
            sent = dict.fromkeys(others, torch.full((1,), number, dtype=torch.uint8))
            arrived = channel.exchange(sent, dict.fromkeys(others, 1), f"exchange {number}")
        return {rank: buffer.item() for rank, buffer in arrived.items()}

    return link.spawn(job, f"job {number}")


def asynchronous(link):
    """Pushes as they come, member 1 more slowly, until all have made thirty; overlapped with local steps."""
    model = make_model()
    optimizer = adamw(model)
    options = {"every": 4, "overlap": 2, "until": 30, "codec": int8}
    with thinwire.asynchronous(model, optimizer, link, **options) as sync:
        while not sync.over:
            loss_of(model, *batch(sync.step, link.rank)).backward()
            if link.rank == 1:
                time.sleep(0.01)
            optimizer.step()
            optimizer.zero_grad()
        sync.finish()
        live = torch.cat([p.detach().flatten() for p in model.parameters()])
        loss = loss_of(model, *batch(10_000, 99, 200)).item()
        return {"live": live, "log": [(p.member, p.staleness) for p in sync.log], "loss": loss, "pushes": sync.pushes}


def odd_weights(link):
    """Member 2 starts from other weights."""
    model = make_model(seed=5 if link.rank == 2 else 0)
    try:
        with thinwire.synchronize(model, adamw(model), thinwire.diloco(), link):
            return None
    except thinwire.ConfigError as error:
        return str(error)


def main() -> None:
    task, out, rank, world, port = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
    torch.set_num_threads(1)
    timeout_s = {"stands_still": 7.0, "many_at_once": 20.0}.get(task)
    with thinwire.join(f"127.0.0.1:{port}", rank=rank, world=world, timeout_s=timeout_s) as link:
        result = globals()[task](link)
        torch.save(result, f"{out}/{rank}.pt")
        if task in ("dies_in_round", "stands_still"):
            os._exit(0)  # a broken group has nothing to take apart


if __name__ == "__main__":
    main()
