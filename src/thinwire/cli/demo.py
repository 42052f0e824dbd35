"""`thinwire demo`: the main job on the embedded default, in a couple of minutes, offline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console

from thinwire.cli import DONE, INTERRUPTED
from thinwire.cli.compare import carry_out, conclude
from thinwire.config import MethodOptions, Run, SimulatedLink
from thinwire.options import labelled
from thinwire.train.optimizer import OptimizerOptions
from thinwire.train.text import TextOptions
from thinwire.units import Duration, Rate

#: The three methods of the demonstration, by the label they have in the table.
METHODS = {
    "every step": MethodOptions("ddp"),
    "diloco": MethodOptions("diloco", {"every": 20, "outer_lr": 0.7}),
    "streaming": MethodOptions("streaming", {"every": 20, "fragments": 2, "overlap": 4, "outer_lr": 0.7, "keep": 0.5}),
}


@click.command(short_help="Three methods on a slow link, in two minutes.")
@click.option("--workers", default=4, type=click.IntRange(1), show_default=True, help="Members of the group.")
@click.option("--steps", default=300, type=click.IntRange(1), show_default=True, help="Local steps of each member.")
@click.option("--rate", default="20mbit", show_default=True, help="Of every member's simulated line, up and down.")
@click.option("--delay", default="20ms", show_default=True, help="From one member to another, one way.")
@click.option("--out", default="runs/demo", show_default=True, help="Folder for the report and the weights.")
@click.option("--json", "as_json", is_flag=True, help="JSON lines on standard output.")
def demo(workers: int, steps: int, rate: str, delay: str, out: str, as_json: bool) -> int:
    """Train one small GPT on four members over a simulated slow link, with three methods, and compare them.

    The text is Python's own language reference, which every Python carries: nothing is downloaded. The learning is
    real; the clock and the link are simulated, so the figures do not depend on this machine's speed.
    """
    base = base_run(steps=steps, workers=workers, link=_link(rate, delay))
    if not as_json:
        Console().print(
            f"One GPT of 0.2M parameters on {workers} members, {rate} up and down, {delay} apart\n"
            "(simulated), trained with data parallelism in every step, with DiLoCo, and\n"
            "with Streaming DiLoCo in four-bit packets.",
            highlight=False,
            soft_wrap=True,
        )
    runs = [
        (label, replace(base, method=method, out=str(Path(out) / label.replace(" ", "-"))))
        for label, method in METHODS.items()
    ]
    records = carry_out(runs, as_json)
    if records is None:
        return INTERRUPTED
    conclude(records, Path(out) / "report.html", "One small GPT over a slow link", as_json)
    return DONE


def base_run(*, steps: int, workers: int = 4, link: SimulatedLink | None = None) -> Run:
    """The work of the demonstration, without a method."""
    return Run(
        steps=steps,
        eval_every=25,
        checkpoint_every=0,
        workers=workers,
        threads=1,
        device="cpu",
        task=TextOptions(size="0.2M", context=64, batch_size=8),
        optimizer=OptimizerOptions(lr=3e-3, warmup_steps=20),
        link=link or _link("20mbit", "20ms"),
    )


def _link(rate: str, delay: str) -> SimulatedLink:
    with labelled(f"--rate {rate}"):
        line = Rate.parse(rate)
    with labelled(f"--delay {delay}"):
        apart = Duration.parse(delay)
    return SimulatedLink(line, apart, Duration.parse("50ms"))
