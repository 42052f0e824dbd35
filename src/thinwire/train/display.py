"""What a run shows while it runs: a progress line for a person, or JSON lines for a program."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from thinwire.config import Run
from thinwire.report.record import Event, Point
from thinwire.report.words import bytes_text
from thinwire.train.rollcall import Status


class Terminal:
    """A progress line: steps, loss, tokens a second, bytes up and down, who is present, time left."""

    def __init__(self, console: Console, label: str = "") -> None:
        self._console, self._label = console, label
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._members = 0
        self._valid = ""

    def started(self, run: Run, members: int, parameters: int, step: int) -> None:
        self._members = members
        label = self._label or run.method.name
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=18),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            transient=False,
        )
        self._progress.start()
        self._task = self._progress.add_task(
            escape(label), total=run.steps, completed=step, told="waiting for all members"
        )

    def progress(self, step: int, statuses: Mapping[int, Status]) -> None:
        if self._progress is None:
            return
        lead = statuses[0]
        seconds = max(status.seconds for status in statuses.values())
        samples = sum(status.tokens or status.samples for status in statuses.values())
        unit = "tok/s" if lead.tokens else "samples/s"
        losses = [status.loss for status in statuses.values() if math.isfinite(status.loss)]
        told = [f"loss {sum(losses) / len(losses):.3f}"] if losses else []
        told += [self._valid] if self._valid else []
        told += [f"{samples / seconds:,.0f} {unit}"] if seconds else []
        told += [f"↑{bytes_text(lead.sent_bytes)} ↓{bytes_text(lead.received_bytes)}"]
        told += [f"{len(statuses)}/{self._members} here"]
        self._progress.update(self._task, completed=step, told="  ".join(told))

    def evaluated(self, point: Point) -> None:
        self._valid = "" if point.valid_loss is None else f"valid {point.valid_loss:.3f}"

    def event(self, event: Event) -> None:
        self._console.print(f"[yellow]step {event.step}: {escape(event.kind)}:[/] {escape(event.text)}")

    def stopped(self, step: int, folder: Path) -> None:
        self.close()
        self._console.print(
            f"Stopped by agreement of all members after step {step}; the checkpoint is in {escape(str(folder))}.\n"
            f"Go on with:  [bold]thinwire train --resume {escape(str(folder))}[/]"
        )

    def close(self) -> None:
        """End the progress line."""
        if self._progress is not None:
            if self._progress.tasks and self._progress.finished is False:
                self._progress.refresh()
            self._progress.stop()
            self._progress = None


class JsonLines:
    """One JSON object a line on `stream`: {"event": "progress", "step": 20, ...}."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def started(self, run: Run, members: int, parameters: int, step: int) -> None:
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
        self.write("stopped", step=step, resume=f"thinwire train --resume {folder}")

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
