"""From a schedule to a report: start the run, do the faults when they are due, undo them, collect the logs, measure."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from thinwire.chaos.field import Field
from thinwire.chaos.goodput import Goodput, Logs, measure, rate
from thinwire.chaos.schedule import Fault
from thinwire.elastic.journal import FOLDER, read
from thinwire.errors import ConfigError, LinkError, ThinwireError

_LOOK_S = 0.2
REPORT = "chaos.json"


def carry_out(
    field: Field, faults: Sequence[Fault], *, length_s: float, begin_limit_s: float, grace_s: float,
    tell: Callable[[str], None],
) -> float:  # fmt: skip
    """Run until the run ends by itself, or the members are asked to leave after so many seconds.

    length_s       from when all members were in the run
    begin_limit_s  how long they may take until then
    grace_s        how long they may take to leave; then they are ended
    returns        unix seconds at which the watch ended
    raises         LinkError if the run does not begin
    """
    start = time.monotonic()
    while not _all_in(field):
        field.look()
        if time.monotonic() - start > begin_limit_s:
            raise LinkError(
                f"after {begin_limit_s:.0f} s not all of {len(field.hosts)} members have been in a round",
                expected="a run that begins",
                mend=f"see what the hosts say in {field.out}/host-*.log, or give --begin more time",
            )
        time.sleep(_LOOK_S)
    start, waiting = time.monotonic(), list(faults)
    tell(f"all {len(field.hosts)} members are in the run")
    while (elapsed_s := time.monotonic() - start) < length_s and not field.over:
        for fault in field.undo_due(elapsed_s):
            tell(f"{elapsed_s:6.1f} s  undone: {fault}")
        while waiting and waiting[0].at_s <= elapsed_s:
            fault = waiting.pop(0)
            try:
                field.begin(fault)
                tell(f"{elapsed_s:6.1f} s  {fault}")
            except ThinwireError as error:
                tell(f"{elapsed_s:6.1f} s  not done: {error.wrong}")
        field.look()
        time.sleep(_LOOK_S)
    field.undo_all()
    ended = time.time()
    if not field.over:
        field.leave()
    deadline = time.monotonic() + grace_s
    while not field.over and time.monotonic() < deadline:
        field.look()
        time.sleep(_LOOK_S)
    if not field.over:
        tell(f"not all members left within {grace_s:.0f} s; they are ended")
    return ended


def _all_in(field: Field) -> bool:
    """Whether a round counted as many members as there are hosts."""
    for path in field.logs():
        for line in path.read_text(errors="replace").splitlines():
            if '"round"' in line and len(_names(line)) >= len(field.hosts):
                return True
    return False


def _names(line: str) -> list[str]:
    try:
        found: list[str] = json.loads(line).get("names", [])
        return found
    except ValueError:  # it is being written
        return []


def collect(out: Path) -> Logs:
    """All hosts' logs in out/members, as `thinwire ledger` reads them.

    raises  ConfigError if there are none
    """
    folder = out / FOLDER
    folder.mkdir(exist_ok=True)
    for path in sorted((out / "hosts").glob(f"*/{FOLDER}/*.jsonl")):
        shutil.copyfile(path, folder / path.name)
    return read(out)


def report(field: Field, until: float, beside: Path | None) -> tuple[Goodput, Goodput | None]:
    """The report on the run, and on the one beside it; the first is written to out/chaos.json."""
    logs, other, usual = collect(field.out), None, 0.0
    if beside is not None:
        theirs = read(beside)
        other, usual = measure(theirs, ()), rate(theirs)
    found = measure(logs, field.happened, until=until, usual=usual)
    told: dict[str, Any] = found.as_dict() | {"hosts": len(field.hosts)}
    (field.out / REPORT).write_text(json.dumps(told, indent=1), encoding="utf-8")
    return found, other


def refuse(found: Goodput) -> None:
    """raises  ThinwireError if members did not agree, or units were not counted as they should"""
    if not found.fine:
        first = [*found.disagreeing, *found.wrong][0]
        raise ThinwireError(
            f"{len(found.disagreeing)} rounds after which members disagree, {len(found.wrong)} faults of the ledger: "
            f"{first}",
            expected="one state on all members after every round, each unit in one round at most",
            mend="this is a fault of thinwire: report it, with the folder of the run",
        )


def check_beside(beside: Path | None) -> None:
    """Before the run, not after it: raises ConfigError if there is no such run."""
    if beside is not None and not read(beside):
        raise ConfigError(f"no run in {beside}", expected="the folder of a run", mend="leave --beside out")
