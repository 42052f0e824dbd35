"""One member of a torch.distributed group, as a program of its own: python node.py TASK OUT RANK WORLD PORT."""

from __future__ import annotations

import sys

import torch

import thinwire
from thinwire.decentralized import real_time, ridge, ring, run_on, uniform


def part(link, **options):
    """What every member of a ring does; the same arguments everywhere."""
    problem = ridge(len(link.members), seed=5)
    options = {"horizon": 12.0, "seed": 6, **options}
    return run_on(link, problem.gradients[link.rank], uniform(ring(len(link.members))), smoothness=problem.smoothness,
                  convexity=problem.convexity, x0=torch.zeros(10, dtype=torch.float64), **options)  # fmt: skip


def everything(link):
    results = {"quick": part(link), "paced": part(link, pace=real_time(0.01))}
    try:
        part(link, seed=7 if link.rank == 1 else 6)  # member 1 reads other clocks
    except thinwire.ThinwireError as error:
        results["other seed"] = type(error).__name__
    return results


def main() -> None:
    task, out, rank, world, port = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
    torch.set_num_threads(1)
    with thinwire.join(f"127.0.0.1:{port}", rank=rank, world=world, timeout_s=20.0) as link:
        torch.save(globals()[task](link), f"{out}/{rank}.pt")


if __name__ == "__main__":
    main()
