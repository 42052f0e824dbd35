"""The reference toy: what rounds, delay and momentum do to the loss, in some seconds a run.

    python benchmarks/toy.py [--seeds 3] [--steps 2000] [--only eager] [--out FILE.md]

A teacher (32-48-10 ReLU) labels standard normal inputs; students (32-64-10 ReLU) learn from fresh samples, 16 a step
and member, AdamW 3e-3 (0.9, 0.99) after 50 steps of warm-up, down to 0 in a cosine. Test cross-entropy on 4000 points
of the consensus model after the last round. The methods are thinwire's own, on its local link; members are threads.

The second number of each row is the mean loss of an independent implementation with other random numbers, from when the
rules were written down: the order should be the same, the values need not be.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import thinwire
from thinwire.links.base import Link
from thinwire.links.local import run
from thinwire.method import Method
from thinwire.outer import ClippedMomentum, Gap, Rebase

BATCH, TEST, INPUTS, CLASSES, STEPS = 16, 4000, 32, 10, 2000


class Task:
    """A teacher and its data, all from one seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        self.w1 = 1.5 * torch.randn(INPUTS, 48, generator=generator) / INPUTS**0.5
        self.w2 = 4 * torch.randn(48, CLASSES, generator=generator) / 48**0.5
        self.test = self.labelled(torch.randn(TEST, INPUTS, generator=generator))

    def labelled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, ((x @ self.w1).relu() @ self.w2).argmax(dim=1)

    def batches(self, rank: int, steps: int) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1000 * (self.seed + 1) + rank)
        x, y = self.labelled(torch.randn(steps * BATCH, INPUTS, generator=generator))
        return list(zip(x.split(BATCH), y.split(BATCH), strict=True))

    def student(self) -> nn.Module:
        generator = torch.Generator().manual_seed(7 + self.seed)
        model = nn.Sequential(nn.Linear(INPUTS, 64), nn.ReLU(), nn.Linear(64, CLASSES))
        with torch.no_grad():
            for layer in (model[0], model[2]):
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / layer.in_features**0.5)
                layer.bias.zero_()
        return model


def loss_of(method: Method | None, seed: int, *, members: int = 4, steps: int = STEPS) -> float:
    """Test loss of what members have in common at the end; without a method, of one that is alone."""
    task = Task(seed)

    def member(link: Link | None) -> float:
        model = task.student()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 50, 1.0, 49)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - 50)
        scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], [50])

        def train() -> None:
            for x, y in task.batches(0 if link is None else link.rank, steps):
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()

        if link is None or method is None:
            train()
        else:
            with thinwire.synchronize(model, optimizer, method, link) as sync:
                train()
                sync.finish()
                vector = torch.cat(sync.consensus())
            if method.payload.fragments == 1:
                nn.utils.vector_to_parameters(vector, model.parameters())
        with torch.no_grad():
            return float(nn.functional.cross_entropy(model(task.test[0]), task.test[1]))

    return member(None) if method is None else run(members, member)[0]


def rows(every: int = 20) -> dict[str, tuple[Method | None, int, float | None]]:
    """Name -> method, members, and the loss of the independent implementation, if it had the row."""

    def diloco(lr: float = 0.7, momentum: float = 0.9, h: int = every) -> Method:
        return thinwire.diloco(every=h, outer_lr=lr, momentum=momentum)

    def late(lr: float, momentum: float, h: int = every) -> Method:
        return thinwire.delayed(every=h, outer_lr=lr, momentum=momentum)

    def eager(lr: float, h: int = every) -> Method:
        return thinwire.eager(every=h, outer_lr=lr)

    def stream(overlap: int, keep: float) -> Method:
        return thinwire.streaming_diloco(
            every=every, fragments=2, overlap=overlap, keep=keep, outer_lr=0.7, codec=thinwire.codecs.fp32
        )

    gap = ClippedMomentum(0.7, 0.5, penalty=Gap())
    return {
        "alone": (None, 1, 0.744),
        "ddp": (thinwire.every_step(), 4, 0.600),
        "fedavg": (thinwire.local_sgd(every=every), 4, 0.726),
        "slowmo 1.0/0.5": (thinwire.slowmo(every=every), 4, None),
        "diloco 0.7/0.9": (diloco(), 4, 0.478),
        "diloco 0.4/0.9": (diloco(0.4), 4, 0.533),
        "diloco 0.7/0.9, 2 members": (diloco(), 2, 0.544),
        "diloco 0.7/0.9, H=50": (diloco(h=50), 4, 0.574),
        "streaming, F=2": (stream(0, 0.0), 4, 0.479),
        "streaming, F=2, overlap 9": (stream(9, 0.0), 4, 0.546),
        "streaming, F=2, overlap 9, keep 0.5": (stream(9, 0.5), 4, 0.674),
        "streaming, F=2, overlap 9, rebase": (stream(9, 0.0).but(outer=Rebase(diloco().outer)), 4, 0.501),
        "delayed 0.7/0": (late(0.7, 0.0), 4, 0.788),
        "delayed 0.7/0.9": (late(0.7, 0.9), 4, 0.839),
        "delayed 0.4/0.9": (late(0.4, 0.9), 4, 0.659),
        "delayed 0.4/0.9, H=50": (late(0.4, 0.9, 50), 4, 1.27),
        "eager 0.7/0.9, 2 members": (eager(0.7), 2, 0.591),
        "eager 0.7/0.9": (eager(0.7), 4, 0.693),
        "eager 0.4/0.9": (eager(0.4), 4, 0.571),
        "eager 0.4/0.9, H=50": (eager(0.4, 50), 4, 0.856),
        "co2 1.0/0": (thinwire.co2(every=every), 4, None),
        "co2 0.7/0.5": (thinwire.co2(every=every, outer_lr=0.7, momentum=0.5), 4, None),
        "co2 0.7/0.5, gap": (thinwire.co2(every=every).but(outer=gap), 4, None),
    }


def main(report: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        f"`python benchmarks/toy.py --seeds {args.seeds}`: {args.steps} steps, four members and a round every 20 steps "
        "unless noted.",
        f"thinwire {thinwire.__version__}, torch {torch.__version__}, Python {platform.python_version()}.",
        "",
        "| outer lr/momentum | test loss, mean (lowest to highest) | independently |",
        "|---|---|---|",
    ]
    for name, (method, members, other) in rows().items():
        if args.only in name:
            losses = [loss_of(method, seed, members=members, steps=args.steps) for seed in range(args.seeds)]
            told = "" if other is None else f"{other:.3f}"
            lines.append(
                f"| {name} | {statistics.mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f}) | {told} |"
            )
            report(lines[-1])
    if args.out:
        args.out.write_text("# The reference toy\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
