"""What rounds beside the compute cost: step time, exposed and hidden seconds on limited links, beside no limit.

    sudo python benchmarks/overlap.py DATA.txt [--rate 20mbit] [--seconds 25] [--pairs 2] [--out FILE.md]

Four hosts in the lab train a byte-level GPT of 0.9M parameters (context 128, batch 8 a member, AdamW 2e-3, one thread
each) with and without the rate limit, in turns, so that what else the machine does hits both. Step time is that of the
slowest member, between the first and the last roll call; exposed seconds are those that a member stood still for a
round (for the link, and for its own coding), hidden ones those of rounds that ran beside the compute; bytes are read at
the hosts' interfaces. The four processes share this machine's cores: coding beside the compute takes its share of them,
on the limited link and on the other alike. What it takes is told by the ratio to a run without rounds.
"""

from __future__ import annotations

import argparse
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
from thinwire.lab import LabSpec
from thinwire.lab import run as run_in_lab
from thinwire.methods import METHODS
from thinwire.report.record import RunRecord
from thinwire.units import Rate

HOSTS = 4
WARM_UP_STEPS = 10
WORK = ["--task.size", "0.9M", "--context", "128", "--batch-size", "8", "--lr", "2e-3", "--clip-norm", "1.0"]
NEVER = ["--every", "1000000"]
#: What is run: name -> method and flags; a method that is not there is left out, and said so.
CONTENDERS = {
    "DiLoCo, every 20, blocking": ("diloco", ["--every", "20"]),
    "Streaming, 4 bits": (
        "streaming",
        ["--every", "20", "--fragments", "2", "--overlap", "4", "--outer-lr", "0.7", "--codec", "e3m0"],
    ),
    "Streaming, fp32, overlap 9": (
        "streaming",
        ["--every", "20", "--fragments", "2", "--overlap", "9", "--outer-lr", "0.7", "--codec", "fp32"],
    ),
    "Eager, every 20": ("eager", ["--every", "20"]),
    "CO2, every 20": ("co2", ["--every", "20"]),
}


@dataclass(frozen=True)
class Run:
    """One run, in means over hosts.

    exposed_share  of a member's time
    """

    step_s: float
    exposed_s: float
    hidden_s: float
    exposed_share: float
    rounds: int
    bytes_a_round: float
    steps: int


def measured(method: str, flags: Sequence[str], data: str, seconds: float, rate: float | None, seed: int) -> Run:
    """`thinwire train` on every host."""
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "run", Path(folder) / "logs"
        command = [
            "sh", "-c", 'exec "$0" "$@" > /dev/null', sys.executable, "-m", "thinwire", "train", "--data", data,
            *WORK, "--method", method, *flags,
            "--steps", "1000000", "--max-time", f"{seconds}s", "--eval-every", "0", "--checkpoint-every", "0",
            "--out", str(out), "--seed", str(seed),
        ]  # fmt: skip
        result = run_in_lab(LabSpec(hosts=HOSTS, rate_bits_per_s=rate), command, logs=log)
        if result.exit_code:
            said = "\n".join(path.read_text(errors="replace")[-800:] for path in sorted(log.glob("*.log")))
            raise SystemExit(f"{' '.join(command)} ended with {result.exit_code}\n{said}")
        record = RunRecord.from_json((out / "record.json").read_text())
    points = [point for point in record.curve[:-1] if point.step >= WARM_UP_STEPS]
    first, last = points[0], points[-1]
    whole = statistics.mean(m.compute_s + m.encode_s + m.wait_s + m.apply_s for m in record.members)
    sent = statistics.mean(host.counters.sent_bytes for host in result.hosts)
    return Run(
        (last.seconds - first.seconds) / (last.step - first.step), record.exposed_s, record.hidden_s,
        record.exposed_s / whole, record.rounds_committed, sent / max(1, record.rounds_committed), record.steps,
    )  # fmt: skip


def row(name: str, limited: Sequence[Run], free: Sequence[Run], bare_step_s: float) -> str:
    """A line of the table: the pairs' medians and the spread of their ratios."""
    ratios = [one.step_s / other.step_s for one, other in zip(limited, free, strict=True)]
    spread = f" ({min(ratios):.3f} to {max(ratios):.3f})" if len(ratios) > 1 else ""

    def median(runs: Sequence[Run], value: str) -> float:
        return statistics.median(getattr(run, value) for run in runs)

    return (
        f"| {name} | {1000 * median(limited, 'step_s'):.0f} | {1000 * median(free, 'step_s'):.0f} "
        f"| {statistics.median(ratios):.3f}{spread} | {median(free, 'step_s') / bare_step_s:.3f} "
        f"| {median(limited, 'exposed_s'):.1f} ({100 * median(limited, 'exposed_share'):.1f} %) "
        f"| {median(limited, 'hidden_s'):.1f} | {median(free, 'exposed_s'):.1f} | {median(free, 'hidden_s'):.1f} "
        f"| {limited[0].rounds} | {median(limited, 'bytes_a_round') / 1e6:.2f} |"
    )


HEAD = (
    "| method | ms a step, limited | ms a step, no limit | limited / no limit | no limit / no rounds "
    "| exposed s, limited | hidden s, limited | exposed s, no limit | hidden s, no limit | rounds "
    "| MB a round and host |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--rate", default="20mbit")
    parser.add_argument("--seconds", type=float, default=25)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--only", help="contenders whose name has this word")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rate = Rate.parse(args.rate).bits_per_s
    chosen = {name: how for name, how in CONTENDERS.items() if not args.only or args.only.lower() in name.lower()}
    missing = sorted({method for method, _ in chosen.values()} - set(METHODS))
    bare = [measured("local_sgd", NEVER, args.data, args.seconds, None, pair) for pair in range(args.pairs)]
    bare_step_s = statistics.median(run.step_s for run in bare)
    lines = [
        f"{HOSTS} hosts, {args.rate} up and down each against no limit, {args.seconds:g} s a run, medians of "
        f"{args.pairs} pairs (lowest to highest ratio).",
        f"thinwire {thinwire.__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{psutil.cpu_count()} processors for {HOSTS} members of one thread, Linux {platform.release()}.",
        f"Without rounds: {1000 * bare_step_s:.0f} ms a step "
        f"({', '.join(f'{1000 * run.step_s:.0f}' for run in bare)}).",
        *([f"Not there: {', '.join(missing)}."] if missing else []),
        "", HEAD,
    ]  # fmt: skip
    print("\n".join(lines), flush=True)
    for name, (method, flags) in chosen.items():
        if method in missing:
            continue
        limited, free = [], []
        for pair in range(args.pairs):
            limited.append(measured(method, flags, args.data, args.seconds, rate, pair))
            free.append(measured(method, flags, args.data, args.seconds, None, pair))
        lines.append(row(name, limited, free, bare_step_s))
        print(lines[-1], flush=True)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
