"""How long a round takes as members grow: all-reduce of everyone, trees of islands, random pairs. In virtual time.

    python benchmarks/noloco_scale.py [--members 8,32,128,512,1000] [--latency 50] [--jitter 0.5] [--out FILE.md]

Real rounds over the local link, verdicts and packet heads included: every message is sent, counted and read. A model of
100M float32 parameters on links of 1 Gbit/s up and down (3.2 s a vector) is scaled down by 390 with its link, to
256,000 entries at 2.56 Mbit/s: transmissions take the same seconds; packet heads and verdicts weigh 390 times more than
they should, which counts against all-reduce (at 1000 members a tenth of its shards). Latencies are one way; with jitter
every message's own is log-normal, its median as given. All begin at once; no time goes into steps or coding. Pairs have
no barrier: a member's round ends when its partner's has.

Then 16 members train a small network for 40 rounds of 5 steps, each on data of its own: how far apart their models are
(root of the mean squared distance from their mean, over their size), every 5 rounds.
"""

from __future__ import annotations

import argparse
import math
import platform
import resource
import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

import thinwire
from thinwire.collectives import Carried, combine
from thinwire.links.base import Link
from thinwire.links.local import run
from thinwire.links.network import Network
from thinwire.method import Method, Phases
from thinwire.methods import METHODS
from thinwire.outer import Average
from thinwire.payloads import Parameters
from thinwire.rounds import Terms, opened
from thinwire.topologies import Everyone, Islands, RandomPairs, Topology

N = 256_000
VECTOR_S = 3.2
EVERY = 5  # local steps between rounds, for the spread
RATE = 32 * N / VECTOR_S


def tree(members: int, size: int) -> Topology:
    """Islands in islands, until their leaders fit into one group."""
    return Everyone() if members <= size else Islands(size, between=tree(math.ceil(members / size), size))


def contenders(members: int) -> dict[str, tuple[Method, int]]:
    """Name -> method, rounds."""
    average = Method(payload=Parameters(), outer=Average())
    once = 1 if members > 128 else 2
    found = {
        "all-reduce of everyone": (average, once),
        "tree of twos": (average.but(topology=tree(members, 2)), 2),
        "tree of eights": (average.but(topology=tree(members, 8)), 2),
        "random pairs, one vector": (average.but(topology=RandomPairs()), 3),
    }
    if "noloco" in METHODS:
        found["random pairs, NoLoCo"] = (METHODS["noloco"](every=1), 3)
    return found


@dataclass(frozen=True)
class Took:
    """Seconds of a round: in the mean over members and rounds, and of the last member; what a member sent in it."""

    mean_s: float
    last_s: float
    messages: float
    megabytes: float


def measured(method: Method, members: int, rounds: int, network: Network) -> Took:
    """Rounds of a group in virtual time."""

    def member(link: Link) -> tuple[list[float], int, int]:
        how, carried, ends = method.codec.fit(((N,),)), Carried(), [link.now()]
        for number in range(rounds):
            exchange = opened(method, Terms(0, 0), link, 0, number, how)
            carried = combine(exchange, torch.ones(N), 1.0, carried, None).carried
            ends.append(link.now())
        total = link.meter.total()
        return [b - a for a, b in pairwise(ends)], total.messages_sent, total.sent_bytes

    told = run(members, member, network)
    return Took(
        statistics.mean(seconds for each, _, _ in told for seconds in each),
        max(seconds for each, _, _ in told for seconds in each),
        statistics.mean(count for _, count, _ in told) / rounds,
        statistics.mean(size for _, _, size in told) / rounds / 1e6,
    )


def spreads(method: Method | Phases, rounds: int = 40, members: int = 16) -> list[float]:
    """How far apart members are after every fifth round."""

    def member(link: Link) -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
        teacher = torch.randn(16, 4)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        draws, told = torch.Generator().manual_seed(link.rank), []
        with thinwire.synchronize(model, optimizer, method, link) as sync:
            for step in range(EVERY * rounds):
                x = torch.randn(16, 16, generator=draws)
                nn.functional.cross_entropy(model(x), (x @ teacher).argmax(dim=1)).backward()
                optimizer.step()
                optimizer.zero_grad()
                if (step + 1) % (5 * EVERY) == 0:
                    told.append(sync.spread())
        return told

    return run(members, member)[0]


def table_of_spreads() -> list[str]:
    """Markdown."""
    known = {"local_sgd over random pairs": METHODS["local_sgd"](every=EVERY).but(topology=RandomPairs())}
    if "noloco" in METHODS:
        known["noloco"] = METHODS["noloco"](every=EVERY)
    known["no rounds"] = METHODS["local_sgd"](every=10**6)
    lines = ["| method | spread after 5, 10, ... 40 rounds |", "|---|---|"]
    for name, method in known.items():
        lines.append(f"| {name} | {' '.join(f'{spread:.4f}' for spread in spreads(method))} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", default="8,32,128,512,1000")
    parser.add_argument("--latency", type=float, default=50, help="ms one way, the median")
    parser.add_argument("--jitter", type=float, default=0.5, help="sigma of the log-normal latencies; 0 for none")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    network = Network(RATE, RATE, args.latency / 1000, args.jitter)
    lines = [
        f"A vector takes {VECTOR_S} s, latency {args.latency:g} ms one way, log-normal with sigma {args.jitter:g}. "
        f"thinwire {thinwire.__version__}, torch {torch.__version__}, Python {platform.python_version()}.",
        "",
        "| members | method | s a round, mean over members | last member | against pairs | messages a member and round "
        "| MB a member and round | processor time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for members in map(int, args.members.split(",")):
        took: dict[str, tuple[Took, float]] = {}
        for name, (method, rounds) in contenders(members).items():
            start = time.process_time()
            took[name] = measured(method, members, rounds, network), time.process_time() - start
        pairs = took["random pairs, one vector"][0].mean_s
        for name, (of, worked_s) in took.items():
            lines.append(
                f"| {members} | {name} | {of.mean_s:.2f} | {of.last_s:.2f} | {of.mean_s / pairs:.2f} "
                f"| {of.messages:,.0f} | {of.megabytes:.2f} | {worked_s:.0f} s |"
            )
            print(lines[-1], flush=True)
    lines += ["", *table_of_spreads()]
    print("\n".join(lines[-5:]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    lines += ["", f"Peak memory of the simulation: {peak:.1f} GiB."]
    print(lines[-1])
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
