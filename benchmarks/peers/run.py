"""Peers and thinwire on the same work, hosts and links: loss against wall-clock and bytes at the interface.

    sudo python benchmarks/peers/run.py DATA.txt [--rates 20mbit ...] [--seeds 0 1 2] [--only NAME ...]
         [--families peers ours] [--seconds 60] [--again] [--list]

A finished run is a line of benchmarks/results/peers.jsonl and is not done again; so the matrix fills over time, and two
of these may run at once on different parts of it. report.py makes the table and the plots. What is run and by which
rules is in README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from contenders import CONTENDERS, Contender
from member import is_marked, text_task

from thinwire.lab import Lab, LabSpec, torchrun_environment
from thinwire.train.corpus import REFERENCE
from thinwire.units import Rate

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "peers.jsonl"
CACHE = HERE.parent / "cache"
HOSTS = 4
RATES = ("5mbit", "20mbit", "100mbit", "unlimited")
WORK: dict[str, Any] = {
    "size": "3M", "context": 32, "batch_size": 4, "lr": 1e-3, "clip_norm": 1.0, "validation_windows": 128,
    "pace_s": 0.2, "keep_every": 10,
}  # fmt: skip
#: How long a run of a slow contender lasts.
SECONDS_SLOW = {"5mbit": 600, "20mbit": 600, "100mbit": 300, "unlimited": 60}
#: Members go ahead of what else this machine has to do, so that it slows no contender more than another. Linux shares
#: processors out by session, and each member has a session of its own.
_AHEAD = ("sh", "-c", 'echo -15 >/proc/self/autogroup; exec nice -n -15 "$@"', "sh")
_SETUP_LIMIT_S = 120
_EVALUATED_AT_ONCE = 64  # windows
_LAST_S = 1.0  # for what was written when time was up to arrive

Line = dict[str, Any]


def seconds_of(contender: Contender, rate: str) -> float:
    """The length of a run."""
    return SECONDS_SLOW[rate] if contender.slow else contender.seconds


def python_of(contender: Contender) -> Path:
    """The interpreter of its virtual environment."""
    return CACHE / contender.setting / "bin" / "python" if contender.setting else Path(sys.executable)


def key(line: Line) -> str:
    """What makes two lines the same run."""
    return json.dumps([line[name] for name in ("contender", "options", "rate", "seed", "seconds", "work")])


def done(file: Path) -> set[str]:
    """Keys of the runs in a file."""
    return {key(json.loads(text)) for text in file.read_text().splitlines()} if file.exists() else set()


def run(contender: Contender, data: str, rate: str, seed: int, seconds: float) -> Line:
    """One run in a lab of its own."""
    line: Line = {
        "contender": contender.name, "options": dict(contender.options), "rate": rate, "seed": seed,
        "seconds": seconds, "work": {**WORK, "data": Path(data).name, "hosts": HOSTS}, "torch": torch.__version__,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="peers-") as place:
        folder = Path(place)
        work = {**WORK, "data": data, "seed": seed, "options": dict(contender.options)}
        (folder / "work.json").write_text(json.dumps(work))
        bits = None if rate == "unlimited" else Rate.parse(rate).bits_per_s
        ended = _members_work(contender, LabSpec(HOSTS, rate_bits_per_s=bits), folder, seconds)
        notes = [_notes(folder, rank) for rank in range(HOSTS)]
        _forget_shared_memory()
        if not all(notes):
            return line | {"failed": ended or "did not start", "said": _said(folder)}
        line |= _told(notes, seconds)
        line |= {"losses": _losses(work, folder, line["steps"])}
        if ended:
            line |= {"failed": ended, "said": _said(folder)}
        return line


def _members_work(contender: Contender, spec: LabSpec, folder: Path, seconds: float) -> str:
    """Until time is up.

    returns  why it ended before that, if it did
    """
    command = [*_AHEAD, str(python_of(contender)), str(HERE / contender.member), str(folder)]
    with ExitStack() as stack:
        logs = [stack.enter_context((folder / f"host-{rank}.log").open("wb")) for rank in range(HOSTS)]
        lab = stack.enter_context(Lab(spec))
        settings = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(HERE.parents[1] / "src")}
        processes = [
            lab.start(
                rank, command, stdout=logs[rank], stderr=logs[rank],
                environment=settings | torchrun_environment(spec, rank, lab.address(0)),
            )
            for rank in range(HOSTS)
        ]  # fmt: skip
        limit = time.monotonic() + _SETUP_LIMIT_S
        began = False
        while time.monotonic() < limit:
            if any(process.poll() is not None for process in processes):
                return f"a member ended with {[process.poll() for process in processes]}"
            if not began and all((folder / f"ready-{rank}").exists() for rank in range(HOSTS)):
                began, limit = True, time.monotonic() + seconds + _LAST_S
            time.sleep(0.1)
        return "" if began else f"members were not ready after {_SETUP_LIMIT_S} s"


def _notes(folder: Path, rank: int) -> list[list[float]]:
    """Step, time, bytes sent and received, a line a step; the last may be cut off."""
    file = folder / f"steps-{rank}.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(text) for text in lines]


def _told(notes: Sequence[Sequence[Sequence[float]]], seconds: float) -> Line:
    """When member 0 had made each step, and what a host had sent by then, in the mean over hosts."""
    start = max(member[0][1] for member in notes)
    steps = []
    for rows in zip(*notes, strict=False):
        at = rows[0][1] - start
        if at <= seconds:
            sent = [row[2] - member[0][2] for row, member in zip(rows, notes, strict=True)]
            steps.append([round(at, 3), round(statistics.mean(sent))])
    return {"steps": len(steps) - 1, "curve": steps}


def _losses(work: Line, folder: Path, steps: int) -> list[tuple[int, float]]:
    """Of the models that member 0 left."""
    torch.set_num_threads(1)
    task, found = text_task({**work, "batch_size": _EVALUATED_AT_ONCE}), []
    model = task.model()
    before, loss = b"", 0.0
    for step in range(1, steps + 1):
        file = folder / f"weights-{step}"
        if is_marked(step, work["keep_every"]) and file.exists():
            if (weights := file.read_bytes()) != before:  # between rounds the model they agree on stays the same
                flat = torch.frombuffer(bytearray(weights), dtype=torch.float32)
                torch.nn.utils.vector_to_parameters(flat, model.parameters())
                loss, before = round(task.evaluate(model)["loss"], 4), weights
            found.append((step, loss))
    return found


def _forget_shared_memory() -> None:
    """Of processes that were ended: hivemind's share tensors among themselves."""
    for file in Path("/dev/shm").glob("torch_*_*_*"):
        if not Path("/proc", file.name.split("_")[1]).exists():
            file.unlink(missing_ok=True)


def _said(folder: Path) -> str:
    """The end of what the members wrote."""
    texts = [(folder / f"host-{rank}.log").read_text(errors="replace").strip()[-600:] for rank in range(HOSTS)]
    return "\n---\n".join(dict.fromkeys(texts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default=REFERENCE)
    parser.add_argument("--rates", nargs="+", default=RATES, choices=RATES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contenders whose names contain one of these")
    parser.add_argument("--exact", action="store_true", help="--only gives whole names")
    parser.add_argument("--families", nargs="+", default=["torch", "peers", "ours"])
    parser.add_argument("--seconds", type=float, help="instead of each contender's own")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--list", action="store_true", help="say what would be run, and how long it takes")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    total = 0.0
    for seed in args.seeds:
        for rate in args.rates:
            for contender in CONTENDERS:
                named = not args.only or any(_names(word, contender, args.exact) for word in args.only)
                if not named or contender.family not in args.families:
                    continue
                seconds = args.seconds or seconds_of(contender, rate)
                wanted = {
                    "contender": contender.name, "options": dict(contender.options), "rate": rate, "seed": seed,
                    "seconds": seconds, "work": {**WORK, "data": Path(args.data).name, "hosts": HOSTS},
                }  # fmt: skip
                if key(wanted) in done(args.results) and not args.again:
                    continue
                total += seconds
                if args.list:
                    print(f"{contender.name}, {rate}, seed {seed}: {seconds:g} s")
                    continue
                if contender.setting and not python_of(contender).exists():
                    print(f"{contender.name}: no {python_of(contender)}; run setup.py first", flush=True)
                    continue
                line = run(contender, args.data, rate, seed, seconds)
                with args.results.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(_short(line), flush=True)
    if args.list:
        print(f"{total / 60:.0f} minutes, and 10 s a run to start and evaluate")


def _names(word: str, contender: Contender, exact: bool) -> bool:
    return word == contender.name if exact else word in contender.name


def _short(line: Line) -> str:
    what = f"{line['contender']}, {line['rate']}, seed {line['seed']}: "
    if line.get("losses"):
        at, sent = line["curve"][-1]
        what += f"{line['steps']} steps in {at:.0f} s, {sent / 1e6:.1f} MB, loss {line['losses'][-1][1]:.3f}"
    return what + (f"; FAILED: {line['failed']}\n{line['said']}" if "failed" in line else "")


if __name__ == "__main__":
    assert shutil.which("ip"), "the lab needs iproute2"
    main()
