"""The table and the plots of benchmarks/results/peers.jsonl: peers.md and peers.png beside it.

python benchmarks/peers/report.py [--results FILE.jsonl]
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from contenders import CONTENDERS, Contender
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from run import HOSTS, RATES, RESULTS, WORK, key

import thinwire

BASE, JUDGED = "torch DDP", "20mbit"
COLOURS = {"torch": "#bf616a", "peers": "#d08700", "ours": "#0b7285"}
SHORT_S = 45.0
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")

Line = dict[str, Any]
#: Contender -> seed -> its run.
Runs = dict[str, dict[int, Line]]


def load(file: Path) -> dict[str, Runs]:
    """Rate -> runs of the present contenders with the present work; the latest of each."""
    found: dict[str, Runs] = {rate: {} for rate in RATES}
    lines = {key(line): line for line in map(json.loads, file.read_text().splitlines())}
    present = {contender.name: dict(contender.options) for contender in CONTENDERS}
    for line in lines.values():
        works = {name: line["work"].get(name) for name in WORK} == WORK
        if works and present.get(line["contender"]) == line["options"]:
            found[line["rate"]].setdefault(line["contender"], {})[line["seed"]] = line
    return found


def loss_at_time(run: Line, seconds: float) -> float | None:
    """Of the last model kept by then."""
    losses = [loss for step, loss in run.get("losses", []) if run["curve"][step][0] <= seconds]
    return losses[-1] if losses else None


def loss_at_step(run: Line, step: int) -> float | None:
    """Of the model kept at that step."""
    return dict(map(tuple, run.get("losses", []))).get(step)


def reached(run: Line, target: float) -> tuple[float, float] | None:
    """Seconds, and bytes sent by a host, until a kept model was as good as the target."""
    for step, loss in run.get("losses", []):
        if loss <= target:
            return run["curve"][step][0], run["curve"][step][1]
    return None


def lower_quartile(run: Line) -> float:
    """Of the times of a step: what it takes on this machine where no round is waited for."""
    times = [at for at, _ in run["curve"]]
    lengths = sorted(after - before for before, after in itertools.pairwise(times))
    return lengths[len(lengths) // 4]


def targets(runs: dict[str, Runs]) -> dict[int, float]:
    """Seed -> the loss that DDP reaches in ten minutes at the judged rate."""
    return {seed: run["losses"][-1][1] for seed, run in runs[JUDGED].get(BASE, {}).items() if run.get("losses")}


def spread(values: Sequence[float], show: Callable[[float], str]) -> str:
    """Median, and lowest to highest where there are several."""
    if not values:
        return ""
    middle = show(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({show(min(values))} to {show(max(values))})"


def to_target(runs: Runs, name: str, goal: dict[int, float]) -> tuple[list[float], list[float], int]:
    """Seconds and bytes of the seeds that reached it, and how many did not."""
    found = [reached(run, goal[seed]) for seed, run in runs.get(name, {}).items() if seed in goal and "curve" in run]
    hits = [each for each in found if each is not None]
    return [hit[0] for hit in hits], [hit[1] for hit in hits], len(found) - len(hits)


def judged_table(runs: Runs, goal: dict[int, float]) -> list[str]:
    """Time and bytes to DDP's loss, and loss at equal time and at equal tokens."""
    tokens_step = 90
    base_s, base_bytes, _ = to_target(runs, BASE, goal)
    lines = [
        f"| contender | seconds to DDP's loss | faster | MB a host | fewer | loss at {SHORT_S:.0f} s "
        f"| loss at step {tokens_step} (equal tokens) | s/step | lower quartile | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for contender in CONTENDERS:
        own = runs.get(contender.name, {})
        if not own:
            continue
        seconds, sent, missed = to_target(runs, contender.name, goal)
        late = f"; {missed} of {missed + len(seconds)} not in {max(run['seconds'] for run in own.values()):.0f} s"
        ran = [run for run in own.values() if "curve" in run and run["steps"]]
        lines.append(
            f"| {_cell(contender)} | {spread(seconds, '{:.1f}'.format)}{late if missed else ''} "
            f"| {_ratio(base_s, seconds)} | {spread([b / 1e6 for b in sent], '{:.2f}'.format)} "
            f"| {_ratio(base_bytes, sent)} | {_losses(own.values(), lambda run: loss_at_time(run, SHORT_S))} "
            f"| {_losses(own.values(), lambda run: loss_at_step(run, tokens_step))} "
            f"| {spread([run['curve'][-1][0] / run['steps'] for run in ran], '{:.2f}'.format)} "
            f"| {spread([lower_quartile(run) for run in ran], '{:.2f}'.format)} | {len(own)} |"
        )
    return lines


def rates_table(runs: dict[str, Runs], goal: dict[int, float]) -> list[str]:
    """At every rate: seconds to the loss that DDP reached at the judged rate, and the loss after a minute."""
    lines = ["| contender | " + " | ".join(RATES) + " |", "|---|" + "---|" * len(RATES)]
    for contender in CONTENDERS:
        cells = []
        for rate in RATES:
            own = runs[rate].get(contender.name, {})
            seconds, _, missed = to_target(runs[rate], contender.name, goal)
            told = spread(seconds, "{:.0f} s".format) or ("not reached" if missed else "")
            at = _losses(own.values(), lambda run: loss_at_time(run, SHORT_S))
            cells.append(f"{told}; {at}; n={len(own)}" if own else "not run")
        if any(cell != "not run" for cell in cells):
            lines.append(f"| {_cell(contender)} | " + " | ".join(cells) + " |")
    return lines


def verdict(runs: Runs, goal: dict[int, float]) -> list[str]:
    """The judged numbers, from medians."""
    base_s, base_bytes, _ = to_target(runs, BASE, goal)
    found = {}
    for contender in CONTENDERS:
        seconds, sent, missed = to_target(runs, contender.name, goal)
        if seconds:
            found[contender.name] = statistics.median(seconds), statistics.median(sent), contender.family, missed
    ours = {name: each for name, each in found.items() if each[2] == "ours" and not each[3]}
    rivals = {name: each for name, each in found.items() if each[2] != "ours"}  # also if not with every seed
    if not (ours and rivals and base_s):
        return ["Not enough runs for a verdict yet."]
    best, rival = min(ours, key=lambda name: ours[name][0]), min(rivals, key=lambda name: rivals[name][0])
    s, sent, *_ = ours[best]
    return [
        f"* Quickest of ours: {best}, {s:.1f} s; DDP {statistics.median(base_s):.0f} s: "
        f"{statistics.median(base_s) / s:.1f} times shorter (asked: 15).",
        f"* Quickest peer: {rival}, {rivals[rival][0]:.1f} s: {rivals[rival][0] / s:.2f} times longer than ours "
        "(asked: 1.5)" + (", and not with every seed." if rivals[rival][3] else "."),
        f"* Bytes until then: {sent / 1e6:.2f} MB a host against DDP's {statistics.median(base_bytes) / 1e6:.0f} MB: "
        f"{statistics.median(base_bytes) / sent:.0f} times fewer (asked: 100).",
    ]


def failures(runs: dict[str, Runs]) -> list[str]:
    """What did not run to its end, and what it said last."""
    lines = []
    for rate, table in runs.items():
        for name, own in table.items():
            for seed, run in own.items():
                if "failed" in run:
                    last = run.get("said", "").strip().splitlines()[-1:] or [""]
                    lines.append(f"* {name}, {rate}, seed {seed}: {run['failed']}: `{last[0][:200]}`")
    return lines


def tuning_table(file: Path) -> list[str]:
    """What tune.py wrote."""
    if not file.exists():
        return []
    trials = [json.loads(text) for text in file.read_text().splitlines()]
    steps = sorted({int(step) for trial in trials for step in trial["losses"]})
    lines = [
        "| inner lr | method | " + " | ".join(f"step {step}" for step in steps) + " | MB sent |",
        "|---|---|" + "---|" * (len(steps) + 1),
    ]
    for trial in trials:
        options = ", ".join(f"{name}={value}" for name, value in trial["options"].items()).replace("|", "\\|")
        losses = " | ".join(f"{trial['losses'].get(str(step), '')}" for step in steps)
        lines.append(f"| {trial['lr']:g} | {trial['method']}({options}) | {losses} | {trial['sent_bytes'] / 1e6:.1f} |")
    return lines


def picture(runs: dict[str, Runs], goal: dict[int, float], file: Path) -> None:
    """Loss against seconds at every rate, and against bytes at the judged one; a line a run."""
    figure = Figure(figsize=(15, 9), dpi=110, layout="constrained")
    grid = figure.subplots(2, 3)
    for axes, rate in zip([grid[0][0], grid[0][1], grid[0][2], grid[1][0]], RATES, strict=True):
        _draw(axes, runs[rate], lambda run, step: run["curve"][step][0], goal)
        axes.set(title=f"{rate}, {HOSTS} hosts", xlabel="seconds", xscale="log", xlim=(2, 700))
    _draw(grid[1][1], runs[JUDGED], lambda run, step: run["curve"][step][1] / 1e6, goal)
    grid[1][1].set(title=f"{JUDGED}", xlabel="MB sent by a host (interface)", xscale="log", xlim=(0.05, None))
    handles, labels = max((axes.get_legend_handles_labels() for axes in grid.flat), key=lambda each: len(each[1]))
    grid[1][2].axis("off")
    grid[1][2].legend(handles, labels, loc="center", frameon=False, fontsize=9)
    figure.savefig(file)


def _draw(axes: Axes, runs: Runs, x: Callable[[Line, int], float], goal: dict[int, float]) -> None:
    for number, contender in enumerate(CONTENDERS):
        for seed, run in sorted(runs.get(contender.name, {}).items()):
            points = [(x(run, step), loss) for step, loss in run.get("losses", []) if x(run, step) > 0]
            if points:
                axes.plot(
                    *zip(*points, strict=True), color=COLOURS[contender.family], linewidth=1, alpha=0.75,
                    marker=MARKS[number % len(MARKS)], markersize=3.5, markevery=max(1, len(points) // 6),
                    label=contender.name if seed == min(runs[contender.name]) else None,
                )  # fmt: skip
    if goal:
        axes.axhline(statistics.mean(goal.values()), color="#4c566a", linewidth=0.8, linestyle=":")
    axes.set(ylabel="held-out loss (nats/byte)", ylim=(None, 3.6))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _losses(runs: Iterable[Line], of: Callable[[Line], float | None]) -> str:
    return spread([loss for run in runs if (loss := of(run)) is not None], "{:.3f}".format)


def _ratio(base: Sequence[float], own: Sequence[float]) -> str:
    return f"{statistics.median(base) / statistics.median(own):.1f}" if base and own else ""


def _cell(contender: Contender) -> str:
    return contender.name.replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    runs = load(args.results)
    goal = targets(runs)
    notes = args.results.with_name("peers_notes.md")
    told = ", ".join(f"seed {seed}: {loss:.3f}" for seed, loss in sorted(goal.items()))
    parts = [
        "# Peers and thinwire on the same work and links\n",
        "Written by `python benchmarks/peers/report.py` from peers.jsonl; the rules are in benchmarks/peers/README.md.",
        f"thinwire {thinwire.__version__}, torch {torch.__version__}, Python {platform.python_version()}. "
        f"Loss that {BASE} reaches in ten minutes at {JUDGED}: {told}. Median over seeds (lowest to highest).\n",
        "![loss against time and bytes](peers.png)\n",
        f"## At {JUDGED}\n", *judged_table(runs[JUDGED], goal), "", *verdict(runs[JUDGED], goal),
        *(["", notes.read_text().strip()] if notes.exists() else []),
        "\n## At every rate\n",
        f"Seconds to that same loss; loss after {SHORT_S:.0f} s; number of seeds.\n", *rates_table(runs, goal),
    ]  # fmt: skip
    if failed := failures(runs):
        parts += ["\n## What failed\n", *failed]
    if tuned := tuning_table(args.results.with_name("peers_tuning.jsonl")):
        parts += [
            "\n## Tuning\n",
            "On seed 100, without links (tune.py); loss of the mean of members' models.\n",
            *tuned,
        ]
    args.results.with_suffix(".md").write_text("\n".join(parts) + "\n")
    picture(runs, goal, args.results.with_suffix(".png"))


if __name__ == "__main__":
    main()
