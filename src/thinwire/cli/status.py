"""`thinwire status`: how a run stands, asked of any of its members."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from thinwire.elastic.registry import get
from thinwire.report.words import bytes_text

_EVERY_S = 2.0


@click.command()
@click.argument("address", metavar="HOST:PORT")
@click.option("--token", required=True, metavar="T", help="As `thinwire up` printed it.")
@click.option("--json", "as_json", is_flag=True, help="All that is known, as JSON.")
@click.option("--watch", is_flag=True, help="Again every two seconds, until Ctrl-C or the run's end.")
def status(address: str, token: str, as_json: bool, watch: bool) -> None:
    """How a run that others join stands.

    Any member's address will do. A page that shows the same is at
    http://HOST:PORT/#TOKEN.

    \b
    thinwire status 203.0.113.7:29400 --token T --watch
    """
    console = Console(soft_wrap=True, highlight=False)
    while True:
        view = get(address, "/status", token)
        if as_json:
            print(json.dumps(view), flush=True)
        else:
            if watch and console.is_terminal:
                console.clear()
            show(view, console)
        if not watch or view["run"]["ended"]:
            return
        time.sleep(_EVERY_S)


def show(view: Mapping[str, Any], console: Console) -> None:
    """A status for a person."""
    run, now = view["run"], view["now"]
    console.print(
        Text(f"{run['method']} on {run['task']}, run {run['id']}: step {run['step']} of {run['steps']}", "bold")
    )
    if run["ended"]:
        console.print(f"It has ended: {run['ended']}.")
    facts = [f"round {run['round']}"]
    if run.get("units_per_epoch"):
        inside = run["units_done"] - run["epochs_done"] * run["units_per_epoch"]
        facts.append(f"epoch {run['epochs_done'] + 1}: {inside} of {run['units_per_epoch']} units")
    if run.get("valid_loss") is not None:
        facts.append(f"held-out loss {run['valid_loss']:.3f} at step {run['evaluated_at']}")
    console.print(", ".join(facts))
    for row in view["members"]:
        for line in lines(row, now):
            console.print(line, highlight=False)
    if view["waiting"] and not run["ended"]:
        who = ", ".join(view["waiting"]["for"])
        console.print(Text(f"Waiting for {who} for {_ago(now - view['waiting']['since'])}.", "yellow"))
    for found in view["findings"][-5:]:
        console.print(Text(f"{found['kind']}: {found['who']}: {found['evidence']}", "yellow"))


def lines(row: Mapping[str, Any], now: float) -> list[str]:
    """What is told of a member: who it is and what it does now, and below it the numbers of the last round."""
    state = f"{row['phase']} for {_ago(now - row['since'])}" if row["answers"] else "does not answer"
    told = [
        f"step {_or(row['step'], str)}", f"loss {_or(row['loss'], lambda loss: f'{loss:.3f}')}",
        f"{_or(row['share'], lambda share: f'{share:.0%}')} of the work", f"↑{_or(row['sent_bytes'], bytes_text)}",
        f"↓{_or(row['received_bytes'], bytes_text)}", f"seen {_or(row['last_seen'], lambda at: _ago(now - at))} ago",
    ]  # fmt: skip
    return [f"{row['name']}: {state}", "    " + ", ".join(told)]


def _or(value: Any, words: Any) -> str:
    return "–" if value is None else str(words(value))


def _ago(seconds: float) -> str:
    seconds = max(0.0, seconds)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
