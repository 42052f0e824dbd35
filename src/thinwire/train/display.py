"""What a run shows while it runs: a progress line for a person, or JSON lines for a program."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task, TaskID
from rich.text import Text

from thinwire.config import Run, TorchLink
from thinwire.report.record import Event, Point
from thinwire.report.words import bytes_text
from thinwire.train.rollcall import Status


class Display(Protocol):
    """Who shows a run to a person or a program; only member 0 has one that says anything."""

    def started(self, run: Run, members: int, parameters: int, step: int) -> None:
        """Before the first step; 0 members: they come and go."""

    def progress(self, step: int, statuses: Mapping[int, Status]) -> None:
        """After a roll call."""

    def evaluated(self, point: Point) -> None:
        """After an evaluation."""

    def event(self, event: Event) -> None:
        """Something out of the ordinary."""

    def stopped(self, step: int, folder: Path) -> None:
        """The members agreed to stop before the end; a checkpoint is in `folder`."""


class Silent:
    """Shows nothing."""

    def started(self, run: Run, members: int, parameters: int, step: int) -> None: ...
    def progress(self, step: int, statuses: Mapping[int, Status]) -> None: ...
    def evaluated(self, point: Point) -> None: ...
    def event(self, event: Event) -> None: ...
    def stopped(self, step: int, folder: Path) -> None: ...


class Terminal:
    """A progress line: steps, loss, bytes up and down, who is present, tokens a second, time left.

    What does not fit is left out whole, from the least needed on. Where no terminal is, every evaluation is a line.
    """

    def __init__(self, console: Console, label: str = "") -> None:
        self._console, self._label = console, label
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._line = _Line("")
        self._resume: Callable[[Path], str] = str

    def started(self, run: Run, members: int, parameters: int, step: int) -> None:
        self._line = _Line(self._label or run.method.name, steps=run.steps, step=step, members=members)
        self._resume = partial(resume_command, run)
        if not self._console.is_terminal:
            return
        self._progress = Progress(_LineColumn(self._console), console=self._console)
        self._progress.start()
        self._task = self._progress.add_task("", total=run.steps, completed=step, line=self._line)

    def progress(self, step: int, statuses: Mapping[int, Status]) -> None:
        self._line = self._line.after(step, statuses)
        if self._progress is not None:
            self._progress.update(self._task, completed=step, line=self._line)

    def evaluated(self, point: Point) -> None:
        if point.valid_loss is None:
            return
        self._line = replace(self._line, valid=f"valid {point.valid_loss:.3f}")
        if self._progress is not None:
            self._progress.update(self._task, line=self._line)
        else:
            self._console.print(self._line.text(_UNLIMITED), soft_wrap=True, highlight=False)

    def event(self, event: Event) -> None:
        words = Text.assemble((f"step {event.step}: {event.kind}: ", "yellow"), event.text)
        self._console.print(words, soft_wrap=True)

    def stopped(self, step: int, folder: Path) -> None:
        self.close()
        told = Text(f"Stopped by agreement of all members after step {step}.")
        if not self._label:  # one of several runs is not gone on with by itself
            told.append(f"\nGo on with:  {self._resume(folder)}")
        self._console.print(told, soft_wrap=True)

    def close(self) -> None:
        """End the progress line."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


_UNLIMITED = 1000
_BAR = 20


@dataclass(frozen=True)
class _Line:
    """What a progress line tells."""

    label: str
    steps: int = 0
    members: int = 0
    step: int = 0
    told: str = "waiting for all members"
    valid: str = ""
    rate: str = ""
    moved: str = ""
    here: str = ""

    def after(self, step: int, statuses: Mapping[int, Status]) -> _Line:
        """The line after a roll call."""
        seconds = max(status.seconds for status in statuses.values())
        tokens = sum(status.tokens for status in statuses.values())
        count = tokens or sum(status.samples for status in statuses.values())
        losses = [status.loss for status in statuses.values() if math.isfinite(status.loss)]
        lead = next(iter(statuses.values()))
        return replace(
            self,
            step=step,
            told=f"loss {sum(losses) / len(losses):.3f}" if losses else "loss not finite" if step else "",
            rate=f"{_thousands(count / seconds)} {'tok' if tokens else 'samples'}/s" if seconds and count else "",
            moved=f"↑{bytes_text(lead.sent_bytes)} ↓{bytes_text(lead.received_bytes)}",
            here=f"{len(statuses)}/{self.members} here" if self.members else f"{len(statuses)} here",
        )

    def text(self, width: int, left: str = "") -> str:
        """As much as fits into `width` columns; the steps and what is told first always do."""
        bar = _BAR * self.step // self.steps if self.steps else 0
        parts = {
            "label": self.label,
            "bar": "━" * bar + "╌" * (_BAR - bar) if width < _UNLIMITED else "",
            "steps": f"{self.step}/{self.steps}",
            "told": self.told,
            "valid": self.valid,
            "rate": self.rate,
            "moved": self.moved,
            "here": self.here,
            "left": left,
        }
        for least in ("", "bar", "valid", "label", "rate", "here", "moved", "left"):
            parts.pop(least, None)
            text = "  ".join(part for part in parts.values() if part)
            if len(text) <= width:
                break
        return text


class _LineColumn(ProgressColumn):
    """The line at the width that the terminal has now."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def render(self, task: Task) -> Text:
        remaining = task.time_remaining
        left = "" if remaining is None or not task.completed else f"{_clock(remaining)} left"
        line: _Line = task.fields["line"]
        return Text(line.text(self._console.width - 1, left), no_wrap=True)


def resume_command(run: Run, folder: Path) -> str:
    """What this member's person types to go on, as all members must."""
    command = f"thinwire train --resume {shlex.quote(str(folder))}"
    if isinstance(run.link, TorchLink) and run.link.address is not None:
        return f"{command} --join {run.link.address} --rank {run.link.rank} --world {run.link.world}"
    return f"torchrun ... -m {command}" if "TORCHELASTIC_RUN_ID" in os.environ else command


def _thousands(value: float) -> str:
    """Three digits: 950, 12.3k, 1.20M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            short = value / size
            return f"{short:.{2 if short < 10 else 1 if short < 100 else 0}f}{unit}"
    return f"{value:.0f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class JsonLines:
    """One JSON object a line on `stream`: {"event": "progress", "step": 20, ...}."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._resume: Callable[[Path], str] = str

    def started(self, run: Run, members: int, parameters: int, step: int) -> None:
        self._resume = partial(resume_command, run)
        self.write(
            "started", method=run.method.name, members=members, parameters=parameters, step=step, steps=run.steps
        )

    def progress(self, step: int, statuses: Mapping[int, Status]) -> None:
        self.write(
            "progress", step=step, members=[asdict(status) | {"rank": rank} for rank, status in statuses.items()]
        )

    def evaluated(self, point: Point) -> None:
        self.write("evaluated", **asdict(point))

    def event(self, event: Event) -> None:
        self.write("event", step=event.step, seconds=event.seconds, kind=event.kind, text=event.text)

    def stopped(self, step: int, folder: Path) -> None:
        self.write("stopped", step=step, resume=self._resume(folder))

    def write(self, event: str, **facts: Any) -> None:
        """One line; numbers that are not finite become null, as JSON has no word for them."""
        self._stream.write(json.dumps({"event": event, **_strict(facts)}) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Nothing is open."""


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: _strict(item) for name, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, list) else value
