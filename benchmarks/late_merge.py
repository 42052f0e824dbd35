"""When to spend what may be sent: gossip, late merges and averages in every round, on data that differ.

    python benchmarks/late_merge.py [--seeds 3] [--rounds 60] [--steps 40] [--out FILE.md]

Sixteen members learn a teacher's ten labels. A member's 1024 samples have labels in proportions of their own, drawn
from a Dirichlet distribution of concentration 0.1: it sees two or three labels and hardly any others. The student is
32-64-10 with ReLU; AdamW 3e-3, batch 64, 60 rounds of 40 steps; accuracy on 4000 samples as the teacher labels them.
About four minutes on one core.

All members train at once in one tensor, and a round is the product of `mixing_matrix(...)` and all models: that this is
what a round over a link does is held by tests/identities/test_gossip.py. Models sent are counted from the routes.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import thinwire
from thinwire.graphs import mixing_matrix
from thinwire.methods.late_merge import late_budget
from thinwire.rounds import Terms
from thinwire.topologies import Everyone, Exponential, RandomPairs, Ring, Topology

MEMBERS, FEATURES, HIDDEN, CLASSES, SAMPLES, BATCH = 16, 32, 64, 10, 1024, 64

#: The topology of a round, by its number; None for no round at all.
Plan = Callable[[int], Topology | None]


@dataclass(frozen=True)
class Result:
    """Accuracies in [0, 1]: of members before the last round's average of all, of their mean, of what they end with."""

    sent_models: float
    spread: float
    own: float
    mean: float
    end: float


def plans(rounds: int) -> dict[str, Plan]:
    """What is compared."""
    merge, last = Everyone(), rounds - 1

    def late(topology: Topology, window: int = 1) -> Plan:
        return lambda number: merge if number > last - window else topology

    models = 0.2 * last + _price()
    thin = late_budget(models, steps=rounds, every=1, members=MEMBERS, share=0.05)
    gap = round(rounds / (models / _price()))
    return {
        "nothing, then one merge": lambda number: merge if number == last else None,
        "R(0.05), then one merge": late(RandomPairs(0.05)),
        "R(0.2), then one merge": late(RandomPairs(0.2)),
        f"as many models: R({models / rounds:.3f})": lambda number: RandomPairs(models / rounds),
        f"as many models: all, every {gap} rounds": lambda number: merge if number % gap == last % gap else None,
        f"as many models: R({thin.share:g}), then {thin.rounds} merges": late(RandomPairs(thin.share), thin.rounds),
        f"as many models: {thin.rounds} merges, then R({thin.share:g})": (
            lambda number: merge if number < thin.rounds else RandomPairs(thin.share)
        ),
        "R(1), pairs in every round, then one merge": late(RandomPairs(1.0)),
        "one_peer exponential, then one merge": late(Exponential()),
        "ring, then one merge": late(Ring()),
        "all in every round": lambda number: merge,
    }


def _price() -> float:
    return 2 * (MEMBERS - 1) / MEMBERS


def train(plan: Plan, seed: int, rounds: int, steps: int, *, common_start: bool = True) -> Result:
    """One run of all members."""
    x, y, test_x, test_y = data(seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    weights = [_start(shape, generator, common_start) for shape in ((FEATURES, HIDDEN), (HIDDEN, CLASSES))]
    model = [weights[0], torch.zeros(MEMBERS, 1, HIDDEN), weights[1], torch.zeros(MEMBERS, 1, CLASSES)]
    model = [p.requires_grad_() for p in model]
    optimizer = torch.optim.AdamW(model, lr=3e-3, betas=(0.9, 0.99), weight_decay=0.0, foreach=True)
    key, sent, member = Terms(0, seed).key, 0.0, torch.arange(MEMBERS).unsqueeze(1)
    own = spread = 0.0
    for number in range(rounds):
        for _ in range(steps):
            chosen = torch.randint(SAMPLES, (MEMBERS, BATCH), generator=generator)
            scores = forward(model, x[member, chosen])
            loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), y[member, chosen].flatten(), reduction="sum")
            optimizer.zero_grad()
            (loss / BATCH).backward()  # of each member its own: no weight is shared
            optimizer.step()
        if number == rounds - 1:
            own, spread = accuracy(model, test_x, test_y), spread_of(model)
        topology = plan(number)
        if topology is not None:
            matrix = mixing_matrix(topology, MEMBERS, key(number, 0), number)
            sent += sent_models(topology, matrix)
            mix_all(model, matrix.float())
    end = accuracy(model, test_x, test_y)
    mix_all(model, torch.full((MEMBERS, MEMBERS), 1 / MEMBERS))
    return Result(sent, spread, own, accuracy(model, test_x, test_y), end)


def data(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [members, samples, features], y [members, samples], and a test set of all labels."""
    generator = torch.Generator().manual_seed(seed)
    hidden = 1.5 * torch.randn(FEATURES, 48, generator=generator) / FEATURES**0.5
    out = 4 * torch.randn(48, CLASSES, generator=generator) / 48**0.5

    def drawn(count: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, FEATURES, generator=generator)
        return x, ((x @ hidden).relu() @ out).argmax(dim=1)

    pool_x, pool_y = drawn(200_000)
    of_label = [(pool_y == label).nonzero().squeeze(1) for label in range(CLASSES)]
    gamma = torch.distributions.Gamma(0.1, 1.0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        skew = gamma.sample((MEMBERS, CLASSES)) + 1e-12  # normalised gammas are Dirichlet's
    skew *= torch.tensor([float(len(places) > 0) for places in of_label])  # a teacher may never name a label
    labels = torch.multinomial(skew, SAMPLES, replacement=True, generator=generator)
    places = torch.stack([
        torch.stack([
            of_label[label][torch.randint(len(of_label[label]), (), generator=generator)] for label in row.tolist()
        ])
        for row in labels
    ])  # fmt: skip
    return pool_x[places], pool_y[places], *drawn(4000)


def _start(shape: tuple[int, int], generator: torch.Generator, common: bool) -> Tensor:
    start = torch.randn(1 if common else MEMBERS, *shape, generator=generator) / shape[0] ** 0.5
    return start.expand(MEMBERS, *shape).clone()


def forward(model: list[Tensor], x: Tensor) -> Tensor:
    first, first_bias, second, second_bias = model
    return torch.baddbmm(second_bias, torch.baddbmm(first_bias, x, first).relu(), second)


@torch.no_grad()
def accuracy(model: list[Tensor], x: Tensor, y: Tensor) -> float:
    """The members' mean."""
    return (forward(model, x.expand(MEMBERS, *x.shape)).argmax(dim=2) == y).float().mean().item()


@torch.no_grad()
def spread_of(model: list[Tensor]) -> float:
    """As `Synchronizer.spread` has it."""
    rows = torch.cat([p.flatten(1) for p in model], dim=1).double()
    return ((rows - rows.mean(dim=0)).square().sum() / rows.square().sum()).sqrt().item()


@torch.no_grad()
def mix_all(model: list[Tensor], matrix: Tensor) -> None:
    for p in model:
        p.copy_((matrix @ p.flatten(1)).view_as(p))


def sent_models(topology: Topology, matrix: Tensor) -> float:
    """That a member sends in a round, in the mean."""
    if topology.consensus:
        return _price()
    return float((matrix - matrix.diag().diag()).count_nonzero()) / MEMBERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        f"{MEMBERS} members, {args.rounds} rounds of {args.steps} steps, {args.seeds} seeds: mean (lowest to highest). "
        f"thinwire {thinwire.__version__}, torch {torch.__version__}, Python {platform.python_version()}.",
        "",
        "| rounds | models sent a member | spread | members' own, before the last round | mean of all models | "
        "what members end with |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    chosen = [(name, plan, True) for name, plan in plans(args.rounds).items()]
    chosen += [
        (f"{name}; each from weights of its own", plan, False) for name, plan, _ in chosen if "one merge" in name
    ]
    for name, plan, common in chosen:
        results = [train(plan, seed, args.rounds, args.steps, common_start=common) for seed in range(args.seeds)]
        sent = statistics.mean(result.sent_models for result in results)
        told = [_told(getattr(result, each) for result in results) for each in ("spread", "own", "mean", "end")]
        lines.append(f"| {name} | {sent:.1f} | {' | '.join(told)} |")
        print(lines[-1], flush=True)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


def _told(values: Iterable[float]) -> str:
    found = list(values)
    return f"{statistics.mean(found):.3f} ({min(found):.3f} to {max(found):.3f})"


if __name__ == "__main__":
    main()
