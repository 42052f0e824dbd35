"""Every named method on the same work at equal tokens: loss, bytes and simulated time, over several seeds.

    python benchmarks/methods.py [--steps 300] [--seeds 3] [--every 20] [--out FILE.md]

Four members on a simulated 20 Mbit/s line, 20 ms apart, 50 ms a local step; a byte-level GPT of 0.2M parameters,
context 64, batch 8 a member, AdamW 3e-3, on Python's language reference. Nothing depends on this machine's speed.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

import thinwire
from thinwire.cli.demo import base_run
from thinwire.config import MethodOptions
from thinwire.report.record import RunRecord
from thinwire.train.display import Silent
from thinwire.train.launch import execute


def runs(every: int) -> dict[str, MethodOptions]:
    """What is compared."""
    stream = {"every": every, "fragments": 2, "overlap": 4, "outer_lr": 0.7}
    return {
        "ddp": MethodOptions("ddp"),
        "ddp, int8": MethodOptions("ddp", {"codec": "int8"}),
        "ddp, topk(1/64) with feedback": MethodOptions("ddp", {"codec": "topk(1/64)"}),
        "local_sgd": MethodOptions("local_sgd", {"every": every}),
        "local_sgd over random pairs": MethodOptions("local_sgd", {"every": every, "topology": "pairs"}),
        "fedavg": MethodOptions("fedavg", {"every": every}),
        "post_local_sgd": MethodOptions("post_local_sgd", {"switch": 100, "every": every}),
        "diloco": MethodOptions("diloco", {"every": every}),
        "diloco, int4": MethodOptions("diloco", {"every": every, "codec": "int4"}),
        "diloco, median": MethodOptions("diloco", {"every": every, "aggregator": "median"}),
        "streaming, e3m0": MethodOptions("streaming", stream),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lines = [
        f"{args.steps} steps, a round every {args.every} where the method has one, {args.seeds} seeds. "
        f"thinwire {thinwire.__version__}, torch {torch.__version__}, Python {platform.python_version()}.",
        "",
        "| method | validation loss, mean (lowest to highest) | MB sent a member | simulated time |",
        "|---|---|---|---|",
    ]
    for name, method in runs(args.every).items():
        records = [_record(args.steps, seed, method) for seed in range(args.seeds)]
        losses = [record.curve[-1].valid_loss or float("nan") for record in records]
        lines.append(
            f"| {name} | {statistics.mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f}) "
            f"| {records[0].sent_bytes / 1e6:.2f} | {records[0].seconds:.0f} s |"
        )
        print(lines[-1], flush=True)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


def _record(steps: int, seed: int, method: MethodOptions) -> RunRecord:
    with tempfile.TemporaryDirectory() as folder:
        run = replace(base_run(steps=steps), seed=seed, method=method, out=folder, eval_every=0)
        record = execute(run, display=Silent())
    assert record is not None
    return record


if __name__ == "__main__":
    main()
