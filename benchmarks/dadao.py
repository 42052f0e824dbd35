"""DADAO beside synchronous gossip on ridge regression: gradients and communications until the error is a millionth.

    python benchmarks/dadao.py [--seeds 3] [--nodes 16] [--condition 20] [--precision 1e-6] [--star 300] [--out FILE.md]

The error is the mean over nodes of the squared distance to the minimiser, over what it is at the start (all zero). It
is looked at after each synchronous round, and in DADAO after as many gradients as there are nodes. A communication is
an edge used once, a vector each way. Seeds change data and clocks. Counts depend on nothing of this machine.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import cvxpy
import scipy
import torch

import thinwire
from thinwire.decentralized import (
    Event,
    Gossip,
    Graph,
    Node,
    Quadratics,
    barbell,
    complete,
    grid,
    optimal,
    path,
    ridge,
    ring,
    simulate,
    star,
    uniform,
)
from thinwire.decentralized.synchronous import chebyshev, msda, nids, opapc, plain

SYNCHRONOUS = {
    "nids": (nids, plain),
    "nids, Chebyshev": (nids, chebyshev),
    "opapc": (opapc, plain),
    "opapc, Chebyshev": (opapc, chebyshev),
    "msda, Chebyshev": (msda, chebyshev),
}
MOST = 100_000  # rounds, before a method is said not to get there

Count = tuple[int, int]  # gradients, communications


def synchronous(problem: Quadratics, graph: Graph, name: str, precision: float) -> Count:
    method, mixing = SYNCHRONOUS[name]
    way, target = mixing(graph), precision * at_start(problem)
    for rounds, x in enumerate(islice(method(problem, way), MOST), 1):
        if problem.error(x) <= target:
            return rounds * graph.nodes, rounds * way.events
    raise SystemExit(f"{name} did not get to {precision} in {MOST} rounds")


def asynchronous(problem: Quadratics, gossip: Gossip, precision: float, seed: int) -> Count:
    n, target, taken = gossip.graph.nodes, precision * at_start(problem), 0

    def there(event: Event, nodes: Sequence[Node]) -> bool:
        nonlocal taken
        taken += len(event.nodes) == 1
        if len(event.nodes) == 2 or taken % n:
            return False
        return problem.error(torch.stack([node.x for node in nodes])) <= target

    rate = math.sqrt(problem.convexity / problem.smoothness) / (8 * math.sqrt(2))  # at least: the theorem's
    run = simulate(
        problem.gradients,
        gossip,
        smoothness=problem.smoothness,
        convexity=problem.convexity,
        x0=torch.zeros_like(problem.minimiser),
        horizon=2 * math.log(100 / precision) / rate,
        seed=seed,
        watch=there,
    )
    return run.gradients, run.gossips


def at_start(problem: Quadratics) -> float:
    return problem.error(torch.zeros_like(problem.linear))


def told(counts: list[int]) -> str:
    if min(counts) == max(counts):
        return f"{counts[0]:,}"
    return f"{round(statistics.mean(counts)):,} ({min(counts):,} to {max(counts):,})"


def rows(name: str, graph: Graph, problems: list[Quadratics], precision: float) -> list[str]:
    """One line a method."""
    found: dict[str, list[Count]] = {}
    for method in SYNCHRONOUS:
        found[method] = [synchronous(problem, graph, method, precision) for problem in problems]
    even = uniform(graph)
    best = optimal(graph) if graph.nodes <= 40 else even
    found[f"DADAO, uniform rates ({even.rate:.1f} a unit)"] = [
        asynchronous(problem, even, precision, seed) for seed, problem in enumerate(problems)
    ]
    if best.rate < 0.999 * even.rate:
        found[f"DADAO, optimal rates ({best.rate:.1f} a unit)"] = [
            asynchronous(problem, best, precision, seed) for seed, problem in enumerate(problems)
        ]
    lines = []
    for method, counts in found.items():
        gradients, communications = zip(*counts, strict=True)
        lines.append(f"| {name} | {method} | {told(list(gradients))} | {told(list(communications))} |")
        print(lines[-1], flush=True)
    return lines


def saved() -> list[str]:
    """What the programme saves: events in a unit of time."""
    graphs = {f"two cliques of {each}, a bridge": barbell(each) for each in (4, 8, 16)}
    tail = Graph(16, (*complete(8).edges, *((i, i + 1) for i in range(7, 15))))
    graphs |= {"clique of 8, tail of 8": tail, "grid 4 x 4": grid(4, 4), "star of 16": star(16), "path of 16": path(16)}
    lines = ["| graph | edges | uniform | optimal | saved | no rates below |", "|---|---|---|---|---|---|"]
    for name, graph in graphs.items():
        even, best = uniform(graph).rate, optimal(graph).rate
        bound = (graph.nodes - 1) / math.sqrt(2)
        lines.append(f"| {name} | {len(graph.edges)} | {even:.1f} | {best:.1f} | {even / best:.2f} x | {bound:.1f} |")
        print(lines[-1], flush=True)
    return lines


def quickness() -> float:
    """Events a second in virtual time, on a ring of 16."""
    problem, gossip = ridge(16), uniform(ring(16))
    began = time.process_time()
    run = simulate(
        problem.gradients,
        gossip,
        smoothness=problem.smoothness,
        convexity=problem.convexity,
        x0=torch.zeros(10, dtype=torch.float64),
        horizon=100.0,
    )
    return (run.gradients + run.gossips) / (time.process_time() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--nodes", type=int, default=16, help="a square, even")
    parser.add_argument("--condition", type=float, default=20.0)
    parser.add_argument("--precision", type=float, default=1e-6)
    parser.add_argument("--star", type=int, default=300, help="nodes of the large star; 0: without")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    n, side = args.nodes, math.isqrt(args.nodes)
    head = ["| graph | method | gradients of all nodes | communications |", "|---|---|---|---|"]
    lines = [
        "`python benchmarks/dadao.py`. "
        f"Until the error is {args.precision:g} of what it was: mean over {args.seeds} seeds (lowest to highest). "
        f"thinwire {thinwire.__version__}, torch {torch.__version__}, scipy {scipy.__version__}, "
        f"cvxpy {cvxpy.__version__}, Python {platform.python_version()}. "
        f"Virtual time: {quickness():.0f} events a second of one core.",
        "",
        f"## {n} nodes, ridge regression in 10 dimensions, condition {args.condition:g}",
        "",
        *head,
    ]
    graphs = {
        "ring": ring(n),
        "torus": grid(side, side, torus=True),
        "star": star(n),
        "complete": complete(n),
        "barbell": barbell(n // 2),
    }
    problems = [ridge(n, condition=args.condition, seed=seed) for seed in range(args.seeds)]
    for name, graph in graphs.items():
        lines += rows(name, graph, problems, args.precision)
    if args.star:
        lines += ["", f"## {args.star} nodes, 2 dimensions, condition 2.5: near the authors' example", "", *head]
        options = {"dimension": 2, "samples": 2, "condition": 2.5}
        problems = [ridge(args.star, **options, seed=seed) for seed in range(args.seeds)]
        lines += rows(f"star of {args.star}", star(args.star), problems, args.precision)
    lines += ["", "## What rates cost: gossip events of the graph in a unit of time", "", *saved()]
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
