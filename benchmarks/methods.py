"""Every named method on the same work at equal tokens: loss, bytes and simulated time, over several seeds.

    python benchmarks/methods.py [--steps 300] [--seeds 3] [--every 30] [--only NAME ...] [--data FILE] [--out FILE.md]
    python benchmarks/methods.py --tune                         (the outer step of some methods, on a seed of its own)

Four members on a simulated 20 Mbit/s line, 20 ms apart, 50 ms a local step; a byte-level GPT of 0.2M parameters,
context 64, batch 8 a member, AdamW 3e-3, on Python's language reference or the file given. Nothing depends on this
machine's speed. Methods whose step is a sign, or that hold an optimizer's moments themselves, have SGD behind them, at
a learning rate of their own (below). Loss is of the model that all would ship: the common one, or the mean of all.

A run that is done is a line of results/methods.jsonl and is not done again.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import thinwire
from thinwire.cli.demo import base_run
from thinwire.config import MethodOptions
from thinwire.report.record import RunRecord
from thinwire.train.display import Silent
from thinwire.train.launch import execute

RESULTS = Path(__file__).with_name("results")
TUNED = 100  # the seed of --tune, which no table has


@dataclass(frozen=True)
class Row:
    """A method, and what differs in its inner optimizer."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)


def rows(every: int, steps: int) -> dict[str, Row]:
    """What is compared. "tuned" is an outer step of 0.9 and 0.5, which suits few rounds; --tune tries others."""
    sign = {"name": "SGD", "lr": 1e-3, "clip_norm": 0.0}
    return {
        "ddp": Row("ddp"),
        "ddp, Muon": Row("ddp", {}, {"name": "Muon", "lr": 0.02}),
        "ddp, int8": Row("ddp", {"codec": "int8"}),
        "ddp, topk(1/64)": Row("ddp", {"codec": "topk(1/64)"}),
        "dgc": Row("dgc", {"codec": "topk(1/64)", "warmup": 20}, {"name": "SGD", "lr": 0.3}),
        "one_bit_adam": Row("one_bit_adam", {"freeze": steps // 5}, {"name": "SGD", "clip_norm": 0.0}),
        "sign_sgd": Row("sign_sgd", {}, sign),
        "demo": Row("demo", {}, sign),
        "local_sgd": Row("local_sgd", {"every": every}),
        "post_local_sgd": Row("post_local_sgd", {"switch": steps // 3, "every": every}),
        "slowmo": Row("slowmo", {"every": every}),
        "diloco": Row("diloco", {"every": every}),
        "diloco, tuned": Row("diloco", {"every": every, "outer_lr": 0.9, "momentum": 0.5}),
        "diloco, int4": Row("diloco", {"every": every, "outer_lr": 0.9, "momentum": 0.5, "codec": "int4"}),
        "diloco, topk(1/64) | int4": Row(
            "diloco", {"every": every, "outer_lr": 0.9, "momentum": 0.5, "codec": "topk(1/64) | int4"}
        ),
        "diloco, powersgd(4)": Row(
            "diloco", {"every": every, "outer_lr": 0.9, "momentum": 0.5, "codec": "feedback(powersgd(4))"}
        ),
        "diloco, islands of 2": Row(
            "diloco", {"every": every, "outer_lr": 0.9, "momentum": 0.5, "topology": "islands(2)"}
        ),
        "muloco": Row("muloco", {"every": every}, {"name": "Muon", "lr": 0.02}),
        "sparse_loco": Row("sparse_loco", {"every": every}),
        "ferret": Row("ferret", {"every": every}),
        "flasc": Row("flasc", {"every": every}),
        "streaming": Row(
            "streaming",
            {"every": every, "fragments": 2, "overlap": 4, "keep": 0.0, "outer_lr": 0.9, "momentum": 0.5},
        ),
        "eager": Row("eager", {"every": every}),
        "delayed": Row("delayed", {"every": every}),
        "co2": Row("co2", {"every": every}),
        "noloco": Row("noloco", {"every": every}),
        "gossip, ring": Row("gossip", {"every": every}),
        "gossip, exponential": Row("gossip", {"every": every, "topology": "exponential"}),
        "late_merge": Row("late_merge", {"every": every, "merge": steps, "topology": "pairs(0.2)"}),
        "sparta": Row("sparta", {"share": 0.005}),
    }  # fmt: skip


#: Outer steps to choose from, for methods whose answer is theirs.
TRIED = [{"outer_lr": lr, "momentum": m} for lr, m in ((0.7, 0.9), (0.7, 0.5), (0.9, 0.5), (1.0, 0.0), (1.0, 0.3))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--every", type=int, default=30)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--data")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.tune:
        for options in TRIED:
            row = Row("diloco", {"every": args.every, **options})
            print(options, f"{_line(args, f'diloco {options}', row, TUNED)['loss']:.3f}", flush=True)
        return
    table = rows(args.every, args.steps)
    for seed in range(args.seeds):  # seed by seed: a table that is stopped is of equal seeds
        for name, row in table.items():
            if not args.only or name in args.only:
                found = _line(args, name, row, seed)
                print(seed, name, f"{found['loss']:.3f}", flush=True)
    if args.out:
        args.out.write_text(_markdown(args, list(table)))


def _settings(args: argparse.Namespace) -> str:
    data = Path(args.data).name if args.data else "language reference"
    return f"{args.steps} steps, a round every {args.every} where the method has one, {data}"


def _file() -> Path:
    return RESULTS / "methods.jsonl"


def _done(args: argparse.Namespace) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in _file().read_text().splitlines()] if _file().exists() else []
    return [line for line in lines if line["settings"] == _settings(args)]


def _line(args: argparse.Namespace, name: str, row: Row, seed: int) -> dict[str, Any]:
    wanted = {"settings": _settings(args), "name": name, "row": asdict(row), "seed": seed}
    for line in _done(args):
        if {key: line[key] for key in wanted} == json.loads(json.dumps(wanted)):
            return line
    record = _record(args, row, seed)
    found = {
        **wanted, "loss": record.curve[-1].valid_loss, "sent_bytes": record.sent_bytes, "seconds": record.seconds,
    }  # fmt: skip
    with _file().open("a") as file:
        file.write(json.dumps(found) + "\n")
    return found


def _record(args: argparse.Namespace, row: Row, seed: int) -> RunRecord:
    with tempfile.TemporaryDirectory() as folder:
        base = base_run(steps=args.steps)
        task = replace(base.task, data=args.data) if args.data else base.task
        optimizer = replace(base.optimizer, **row.optimizer)
        method = MethodOptions(row.method, row.options)
        run = replace(base, seed=seed, method=method, optimizer=optimizer, task=task, out=folder, eval_every=0)
        record = execute(run, display=Silent())
    assert record is not None
    return record


def _markdown(args: argparse.Namespace, names: list[str]) -> str:
    lines = _done(args)
    first = statistics.mean(line["loss"] for line in lines if line["name"] == "ddp")
    told = [
        "Written by `python benchmarks/methods.py`, which says what is trained.",
        f"{_settings(args)}. thinwire {thinwire.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}.",
        "",
        "| method | validation loss, mean (lowest to highest) | against ddp | MB sent a member | fewer "
        "| simulated time | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    whole = statistics.mean(line["sent_bytes"] for line in lines if line["name"] == "ddp")
    for name in names:
        found = [line for line in lines if line["name"] == name and line["seed"] != TUNED]
        if found:
            losses = [line["loss"] for line in found]
            mean, sent = statistics.mean(losses), statistics.mean(line["sent_bytes"] for line in found)
            seconds, cell = statistics.mean(line["seconds"] for line in found), name.replace("|", "\\|")
            told.append(
                f"| {cell} | {mean:.3f} ({min(losses):.3f} to {max(losses):.3f}) | {100 * (mean / first - 1):+.1f} % "
                f"| {sent / 1e6:.2f} | {whole / sent:.0f} | {seconds:.0f} s | {len(found)} |"
            )
    tried = [line for line in lines if line["seed"] == TUNED]
    if tried:
        told += ["", "The outer step was chosen on another seed:", ""]
        told += [f"* {line['name']}: {line['loss']:.3f}" for line in tried]
    return "\n".join(told) + "\n"


if __name__ == "__main__":
    main()
