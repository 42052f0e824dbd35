"""What a person sees while it runs, at the widths that terminals have."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from thinwire.config import Run, SimulatedLink, TorchLink
from thinwire.report.record import Event, Point
from thinwire.train.display import JsonLines, Terminal
from thinwire.train.rollcall import Status

STATUS = Status(12000, 4000.0, 3.1472, 768000, 98304000, 40_200_000_000, 40_200_000_000, False, False)
POINT = Point(12000, 4000.0, 40_200_000_000, 3.15, 3.2)


def shown(width: int, *, label: str = "post_local_sgd", terminal: bool = True) -> str:
    text = io.StringIO()
    console = Console(file=text, width=width, force_terminal=terminal, color_system=None)
    display = Terminal(console, label)
    display.started(Run(steps=20000), 4, 1000, 11000)
    statuses = dict.fromkeys(range(4), STATUS)
    display.progress(11990, {rank: replace(STATUS, step=11990) for rank in range(4)})
    display.progress(12000, statuses)
    display.evaluated(POINT)
    display.close()
    return text.getvalue().replace("\r", "\n")


@pytest.mark.parametrize("width", [80, 100, 120, 160])
def test_what_matters_is_there_from_80_columns_on(width):
    line = next(line for line in reversed(shown(width).splitlines()) if "12000/20000" in line)
    for words in ("12000/20000", "loss 3.147", "98.3k tok/s", "↑40.2 GB ↓40.2 GB", "4/4 here"):
        assert words in line
    assert ("post_local_sgd" in line) == (width >= 100)
    assert ("valid 3.200" in line) == (width >= 120)
    assert "…" not in line


def test_a_narrow_one_still_tells_the_steps_and_the_loss():
    assert "12000/20000  loss 3.147" in shown(30)


def test_without_a_terminal_every_evaluation_is_a_line():
    assert shown(80, terminal=False) == (
        "post_local_sgd  12000/20000  loss 3.147  valid 3.200  98.3k tok/s  ↑40.2 GB ↓40.2 GB  4/4 here\n"
    )


def test_brackets_are_no_markup():
    text = io.StringIO()
    display = Terminal(Console(file=text, width=80), "a[bold]")
    display.started(Run(), 2, 1, 0)
    display.event(Event(3, 1.0, "skipped round", "member [1] said [/nothing]"))
    display.stopped(4, Path("runs/[x]"))
    assert text.getvalue() == (
        "step 3: skipped round: member [1] said [/nothing]\nStopped by agreement of all members after step 4.\n"
    )


@pytest.mark.parametrize(
    ("link", "torchrun", "command"),
    [
        (SimulatedLink(), False, "thinwire train --resume 'a run'"),
        (TorchLink(), True, "torchrun ... -m thinwire train --resume 'a run'"),
        (
            TorchLink(address="10.0.0.1:29500", rank=1, world=3),
            False,
            "thinwire train --resume 'a run' --join 10.0.0.1:29500 --rank 1 --world 3",
        ),
    ],
)
def test_how_to_go_on(monkeypatch, link, torchrun, command):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    text, lines = io.StringIO(), io.StringIO()
    for display in (Terminal(Console(file=text, width=40)), JsonLines(lines)):
        display.started(Run(link=link), 2, 1, 0)
        display.stopped(4, Path("a run"))
    assert text.getvalue() == f"Stopped by agreement of all members after step 4.\nGo on with:  {command}\n"
    assert json.loads(lines.getvalue().splitlines()[-1]) == {"event": "stopped", "step": 4, "resume": command}


def test_json_has_no_word_for_what_is_not_finite():
    lines = io.StringIO()
    JsonLines(lines).progress(1, {0: replace(STATUS, loss=float("nan"), seconds=float("inf"))})
    told = json.loads(lines.getvalue())
    assert told["members"][0]["loss"] is None
    assert told["members"][0]["seconds"] is None
