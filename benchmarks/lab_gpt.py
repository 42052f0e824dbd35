"""A byte-level GPT of 0.9M parameters on four hosts in the lab: what each method reaches in 90 seconds of wall time.

    sudo python benchmarks/lab_gpt.py DATA.txt [--seconds 90] [--rate 20mbit] [--seeds 1] [--pairs 3] [--out FILE.md]

Context 128, batch 8 a member, AdamW 2e-3, clipping at 1. Four processes of one thread share this machine's cores, so
steps are slower than on four machines; all methods share that. Bytes are read at every host's network interface.
Streaming DiLoCo then runs in pairs, with and without the rate limit, half as long each: the ratio of the two step
times is what the link costs it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

import thinwire
from thinwire.lab import LabResult, LabSpec
from thinwire.lab import run as run_in_lab
from thinwire.units import Rate

HOSTS = 4
WORK = ["--task.size", "0.9M", "--context", "128", "--batch-size", "8", "--lr", "2e-3", "--clip-norm", "1.0"]
METHODS = {
    "every step": ["--method", "ddp"],
    "DiLoCo, every 20": ["--method", "diloco", "--every", "20"],
    "Streaming DiLoCo, every 20, 4 bits": [
        "--method", "streaming", "--every", "20", "--fragments", "2", "--overlap", "4", "--keep", "0.5",
        "--outer-lr", "0.7", "--codec", "e3m0",
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One run: what it reached and what crossed the interfaces, as the mean over hosts."""

    name: str
    seed: int
    steps: int
    seconds: float
    loss: float
    interface_bytes: float
    ledger_bytes: float | None
    wait_s: float | None


def thinwire_run(name: str, flags: Sequence[str], data: str, seconds: float, rate: float | None, seed: int) -> Row:
    """`thinwire train` on every host."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [
            sys.executable, "-m", "thinwire", "train", "--data", data, *WORK, *flags, "--steps", "1000000",
            "--max-time", f"{seconds}s", "--eval-every", "0", "--checkpoint-every", "0", "--out", str(out),
            "--seed", str(seed), "--json",
        ]  # fmt: skip
        log = Path(folder) / "logs"
        result = run_in_lab(LabSpec(hosts=HOSTS, rate_bits_per_s=rate), command, logs=log)
        _must_have_worked(result, log)
        record = json.loads((out / "record.json").read_text())
        sent = [host.ledger.sent_bytes for host in result.hosts if host.ledger]
        return Row(
            name, seed, record["curve"][-1]["step"], record["curve"][-1]["seconds"], record["final"]["loss"],
            _interface(result), statistics.mean(sent),
            statistics.mean(member["wait_s"] for member in record["members"]),
        )  # fmt: skip


def ddp_run(data: str, seconds: float, rate: float | None, seed: int) -> Row:
    """torch's DistributedDataParallel on every host."""
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "ddp.json", Path(folder) / "logs"
        member = str(Path(__file__).with_name("ddp_member.py"))
        command = [sys.executable, member, data, str(seconds), str(out)]
        result = run_in_lab(LabSpec(hosts=HOSTS, rate_bits_per_s=rate), command, logs=log)
        _must_have_worked(result, log)
        told = json.loads(out.read_text())
        return Row("torch DDP", seed, told["steps"], told["seconds"], told["loss"], _interface(result), None, None)


def _interface(result: LabResult) -> float:
    return statistics.mean(host.counters.sent_bytes for host in result.hosts)


def _must_have_worked(result: LabResult, log: Path) -> None:
    if result.exit_code:
        said = "\n".join(path.read_text(errors="replace")[-800:] for path in sorted(log.glob("*.log")))
        raise SystemExit(f"{' '.join(result.command)} ended with {result.exit_code}\n{said}")


def table(rows: Sequence[Row]) -> str:
    """Markdown, one line a run."""
    lines = [
        "| method | seed | steps | s/step | valid loss | MB sent per host (interface) | ledger MB | interface/ledger "
        "| waited for the link |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ledger = "" if row.ledger_bytes is None else f"{row.ledger_bytes / 1e6:.2f}"
        ratio = "" if row.ledger_bytes is None else f"{row.interface_bytes / row.ledger_bytes:.4f}"
        waited = "" if row.wait_s is None else f"{row.wait_s:.1f} s"
        lines.append(
            f"| {row.name} | {row.seed} | {row.steps} | {row.seconds / row.steps:.3f} | {row.loss:.3f} "
            f"| {row.interface_bytes / 1e6:.2f} | {ledger} | {ratio} | {waited} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--rate", default="20mbit")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rate = Rate.parse(args.rate).bits_per_s
    rows = []
    for seed in range(args.seeds):
        rows.append(ddp_run(args.data, args.seconds, rate, seed))
        print(table(rows[-1:]), flush=True)
        for name, flags in METHODS.items():
            rows.append(thinwire_run(name, flags, args.data, args.seconds, rate, seed))
            print(table(rows[-1:]), flush=True)
    last, flags = list(METHODS.items())[-1]
    pairs, ratios = [], []
    for pair in range(args.pairs):
        limited = thinwire_run(last, flags, args.data, args.seconds / 2, rate, pair)
        free = thinwire_run(f"{last}, no rate limit", flags, args.data, args.seconds / 2, None, pair)
        pairs += [limited, free]
        ratios.append(limited.seconds / limited.steps / (free.seconds / free.steps))
        print(table(pairs[-2:]), flush=True)
    memory = psutil.virtual_memory().total / 2**30
    text = "\n".join([
        f"{args.seconds:g} s of wall time, {HOSTS} hosts, {args.rate} up and down each.",
        f"thinwire {thinwire.__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{psutil.cpu_count()} processors, {memory:.0f} GiB, Linux {platform.release()}.",
        "", table(rows), "",
        f"Pairs of {args.seconds / 2:g} s:", "", table(pairs), "",
        "Step time of Streaming DiLoCo on the limited link over that without a limit, in each pair: "
        + ", ".join(f"{ratio:.3f}" for ratio in ratios),
    ])  # fmt: skip
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
