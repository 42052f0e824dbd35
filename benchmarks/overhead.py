"""What the synchronizer costs one member that has nobody to talk to: step time beside the bare loop's.

    python benchmarks/overhead.py [--rounds 12] [--steps 60] [--out FILE.md]

The GPT of 0.9M parameters, context 128, batch 8, AdamW, one thread. Bare and synchronised loops take turns within one
process, so that what else the machine does hits both; the ratio of each pair is a sample, the median is quoted.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

import thinwire
from thinwire.links.local import alone
from thinwire.method import Method
from thinwire.train.text import TextOptions

METHODS = {
    "ddp": thinwire.every_step(),
    "local_sgd, every 20": thinwire.local_sgd(every=20),
    "diloco, every 20": thinwire.diloco(every=20),
    "streaming, every 20": thinwire.streaming_diloco(every=20, overlap=4),
}


def seconds_a_step(method: Method | None, steps: int) -> float:
    """Mean over `steps` of a fresh model's training, the first few steps left out."""
    task = TextOptions(size="0.9M", context=128, batch_size=8).build(seed=0)
    torch.manual_seed(0)
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    context = nullcontext() if method is None else thinwire.synchronize(model, optimizer, method, alone())
    batches = [task.batch(step, 0, 1) for step in range(steps + 3)]
    with context:
        for step, batch in enumerate(batches):
            if step == 3:
                start = time.perf_counter()
            task.loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        return (time.perf_counter() - start) / steps


def table(samples: dict[str, Sequence[float]], bare: Sequence[float]) -> str:
    """Markdown: median ratio to the bare loop, with its spread."""
    lines = ["| method | step time / bare loop, median | lowest | highest |", "|---|---|---|---|"]
    for name, ratios in samples.items():
        lines.append(f"| {name} | {statistics.median(ratios):.3f} | {min(ratios):.3f} | {max(ratios):.3f} |")
    return "\n".join([*lines, "", f"Bare loop: {1000 * statistics.median(bare):.1f} ms a step."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    samples: dict[str, list[float]] = {name: [] for name in METHODS}
    bare: list[float] = []
    for _ in range(args.rounds):
        for name, method in METHODS.items():
            before = seconds_a_step(None, args.steps)
            ours = seconds_a_step(method, args.steps)
            after = seconds_a_step(None, args.steps)
            bare += [before, after]
            samples[name].append(ours / ((before + after) / 2))
    text = "\n".join([
        f"thinwire {thinwire.__version__}, torch {torch.__version__}, Python {platform.python_version()}, one thread, "
        f"{args.rounds} pairs of {args.steps} steps.",
        "", table(samples, bare),
    ])  # fmt: skip
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
