"""A member's log: one JSON object a line, {"event": "round", "at": 1790000000.0, ...}, appended and flushed at once.

    OUT/members/NAME.jsonl

A line that a crash cut off is the last one of its life; whoever reads passes over it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from thinwire.errors import ConfigError, ThinwireError

FOLDER = "members"


class Journal:
    """Where a member writes what happened.

    path   of the file; its folder is made
    clock  unix seconds
    raises  ThinwireError if the file cannot be opened
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.path, self._clock = path, clock
        self._file: IO[str] | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise _unwritable(path, error) from error

    def write(self, event: str, **facts: Any) -> None:
        """One line; numbers that are not finite become null.

        raises  ThinwireError if the disk is full: a log with a hole proves nothing
        """
        assert self._file is not None
        line = json.dumps({"event": event, "at": self._clock(), **strict(facts)})
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def close(self) -> None:
        """May be called twice."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """All members' lines in the folder of a run, by name.

    raises  ConfigError if there are none
    """
    found = {path.stem: list(_lines(path)) for path in sorted((folder / FOLDER).glob("*.jsonl"))}
    if not found:
        raise ConfigError(
            f"there is no log in {folder / FOLDER}",
            expected="the folder of a run of `thinwire up`, or of `thinwire join`",
            mend="name the folder that the run wrote into (its `out`); copy other machines' logs beside these",
        )
    return found


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            if number + 1 < len(lines):
                raise ConfigError(
                    f"{path}, line {number + 1}: {error.msg}",
                    expected="one JSON object a line",
                    mend="take the file as the member wrote it",
                ) from error


def strict(value: Any) -> Any:
    """The same without numbers that JSON has no word for."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: strict(item) for name, item in value.items()}
    return [strict(item) for item in value] if isinstance(value, list | tuple) else value


def _unwritable(path: Path, error: OSError) -> ThinwireError:
    return ThinwireError(
        f"the log {path} cannot be written: {error.strerror or error}",
        expected="room on the disk, and permission to write there",
        mend="make room; the member is given the run's state again when it comes back",
    )
