"""DDP's communication hooks, torch's and ours, on a byte-level GPT of 0.9M parameters: bytes at the interface and loss.

    sudo python benchmarks/ddp_hook.py DATA.txt [--steps 30] [--hosts 3] [--rate 50mbit] [--seeds 2] [--out FILE.md]

Context 128, batch 8 a member, AdamW 2e-3, clipping at 1, one thread a process, buckets of 1 MB where nothing else is
said. All processes share this machine's processors, so steps are slower than on as many machines.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

import thinwire
from thinwire.lab import LabSpec, run
from thinwire.units import Rate

LIMIT_S = 120  # a hook that has not trained by then stands still
RUNS = {
    "no hook": ("none", 1),
    "torch fp16_compress_hook": ("fp16", 1),
    "torch powerSGD_hook, rank 4, one bucket": ("powersgd", 25),
    "torch powerSGD_hook, rank 4": ("powersgd", 1),
    "hooks.ddp int8": ("int8", 1),
    "hooks.ddp feedback(int4)": ("feedback(int4)", 1),
    "hooks.ddp feedback(topk(1/16) | int4)": ("feedback(topk(1/16) | int4)", 1),
    "hooks.ddp feedback(topk(1/64) | int4)": ("feedback(topk(1/64) | int4)", 1),
}


@dataclass(frozen=True)
class Row:
    """A hook's runs, one a seed, by step; none if it stood still."""

    name: str
    sent_bytes: list[float]
    seconds: list[float]
    losses: list[float]


def measured(name: str, args: argparse.Namespace, rate: float) -> Row:
    """All seeds of one hook, until one of them stands still."""
    hook, bucket_mb = RUNS[name]
    row = Row(name, [], [], [])
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "told.json"
            member = str(Path(__file__).with_name("ddp_hook_member.py"))
            words = [args.data, hook, str(bucket_mb), str(args.steps), str(seed), str(out)]
            result = run(
                LabSpec(hosts=args.hosts, rate_bits_per_s=rate),
                ["timeout", str(LIMIT_S), sys.executable, member, *words],
                logs=Path(folder) / "logs",
            )
            if result.exit_code:
                said = [path.read_text(errors="replace")[-300:] for path in Path(folder).glob("logs/*")]
                print(f"{name}: ended with {result.exit_code}", *said, sep="\n", flush=True)
                return Row(name, [], [], [])
            told = json.loads(out.read_text())
        row.sent_bytes.append(told["sent_bytes"])
        row.seconds.append(told["seconds"])
        row.losses.append(told["loss"])
    return row


def _cell(name: str) -> str:
    return name.replace("|", "\\|")


def line(row: Row) -> str:
    if not row.losses:
        return f"| {_cell(row.name)} | stands still | | |"
    return (
        f"| {_cell(row.name)} | {sum(row.sent_bytes) / len(row.sent_bytes) / 1e6:.3f} "
        f"| {min(row.losses):.3f} to {max(row.losses):.3f} | {min(row.seconds):.2f} to {max(row.seconds):.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("--rate", default="50mbit")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rate = Rate.parse(args.rate).bits_per_s
    lines = ["| hook | MB sent a host and step | valid loss | s/step |", "|---|---|---|---|"]
    for name in RUNS:
        lines.append(line(measured(name, args, rate)))
        print(lines[-1], flush=True)
    memory = psutil.virtual_memory().total / 2**30
    text = "\n".join([
        f"{args.steps} steps, {args.hosts} hosts, {args.rate} up and down each, {args.seeds} seeds (least to most).",
        f"thinwire {thinwire.__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{psutil.cpu_count()} processors, {memory:.0f} GiB, Linux {platform.release()}.",
        "", *lines,
    ])  # fmt: skip
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
