"""One member of a run that others join, as a process: it is told what it is on standard input, and ends with that.

Exit codes, for whoever started it: 0 the run has ended, 130 it was asked to leave and has left, 2 it cannot go on as it
was asked to, 75 it lost the others: start it again.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from rich.console import Console

from thinwire.config import Run, loads
from thinwire.elastic.beside import Beside, fetch_beside
from thinwire.elastic.board import Board
from thinwire.elastic.exhibit import Exhibit, routes
from thinwire.elastic.journal import FOLDER, Journal
from thinwire.elastic.link import Change, ElasticLink
from thinwire.elastic.meeting import Gathering, Meeting
from thinwire.elastic.registry import Registry
from thinwire.elastic.shelf import Shelf
from thinwire.errors import ConfigError, LinkError, StateMismatch
from thinwire.report.record import RunRecord
from thinwire.train.display import Display, JsonLines, Silent, Terminal
from thinwire.train.elastic import Stay, train_among
from thinwire.train.launch import leave, stop_signal
from thinwire.units import Rate
from thinwire.version import __version__

ENDED, LEFT, TRY_AGAIN = 0, 130, 75
PEERS = "peers.json"
SHELF = "shelf"
_PAUSE_S = 0.2


@dataclass(frozen=True)
class Order:
    """What a member is told.

    toml         the run
    run_id       of it, in hexadecimal
    name         begins the member's name
    bind, port   of its registry; 0: any port
    lighthouses  where members meet
    begun        the run has taken steps: this member waits for it, and begins none
    resume       folder with checkpoints; empty: none
    shows        "terminal", "json" or "nothing"
    registries   of members whose state this one is to fetch before it meets them
    uplink       of this machine: newcomers are given a share of it
    isolate      members that are found at fault again and again leave
    """

    toml: str
    run_id: str
    token: str
    name: str
    bind: str
    port: int
    lighthouses: list[str]
    at_least: int = 1
    epochs: int = 0
    begun: bool = False
    resume: str = ""
    shows: str = "nothing"
    registries: list[str] = field(default_factory=list)
    uplink: str = "100mbit"
    isolate: bool = False

    def line(self) -> str:
        """As a line of standard input."""
        return json.dumps(asdict(self)) + "\n"

    @staticmethod
    def of(line: str) -> Order:
        """The inverse of `line`; raises ConfigError for anything else."""
        try:
            return Order(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"no order for a member on standard input: {error}",
                expected="what `thinwire up` and `thinwire join` write there",
                mend="call thinwire join HOST:PORT --token T",
            ) from error


class AtLeast:
    """A meeting whose first gathering waits until enough members are there: a run does not begin with fewer."""

    def __init__(self, inner: Any, members: int, pause: Callable[[float], None] = time.sleep) -> None:
        self._inner, self._members, self._pause = inner, members, pause

    @property
    def name(self) -> str:
        """See Meeting."""
        name: str = self._inner.name
        return name

    def meet(self, *, broken: bool = False) -> Gathering:
        """See Meeting."""
        gathering: Gathering = self._inner.meet(broken=broken)
        while len(gathering.names) < self._members:
            self._pause(_PAUSE_S)
            gathering = self._inner.meet()
        self._members = 1
        return gathering

    def now(self) -> float:
        """See Meeting."""
        now: float = self._inner.now()
        return now

    def close(self) -> None:
        """See Meeting."""
        self._inner.close()


def be_member(lines: IO[str]) -> int:
    """Be the member that the first of the lines describes; when they end, leave as if asked to.

    returns  the exit code
    raises   ThinwireError for what no second try will mend
    """
    order = Order.of(lines.readline())
    run = loads(order.toml)
    with stop_signal("Leaving as soon as this round is done") as asked:
        alone = _ends_with(lines)
        try:
            record = _stay(order, run, lambda: asked() or alone())
        except (LinkError, StateMismatch) as error:
            print(f"thinwire: {error}", file=sys.stderr)
            return TRY_AGAIN
    return LEFT if record is None else ENDED


def _ends_with(lines: IO[str]) -> Callable[[], bool]:
    """Whether whoever started us is gone: a member that nobody looks after leaves."""
    gone = threading.Event()

    def wait() -> None:
        while lines.readline():
            pass
        gone.set()

    threading.Thread(target=wait, name="parent", daemon=True).start()
    return gone.is_set


def _stay(order: Order, run: Run, stops: Callable[[], bool]) -> RunRecord | None:
    from thinwire.elastic.torchft_meeting import TorchftMeeting  # here: torchft is an extra

    torch.set_num_threads(run.threads)
    out = Path(run.out)
    founds = not order.begun or bool(order.resume)
    meeting = TorchftMeeting(order.lighthouses, name=order.name, host=order.bind, founds=founds)
    shown: dict[str, Display] = {"terminal": Terminal(Console()), "json": JsonLines(sys.stdout)}
    display = shown.get(order.shows) or Silent()
    try:
        board = Board(meeting.name, facts(order, run))
        exhibit = Exhibit(Rate.parse(order.uplink))
        registry = Registry(order.bind, order.port, board, order.token, routes=routes(exhibit, order.token))
        board.address = registry.address
        journal = Journal(out / FOLDER / f"{meeting.name}.jsonl")
        group: Meeting = meeting if order.begun else AtLeast(meeting, order.at_least)
        shelf = Shelf(folder=out / SHELF)
        link = ElasticLink(group, shelf=shelf, founds=founds)
        link.on_change(lambda change: _remember(out, board, meeting, change))
        try:
            task = run.task.build(seed=run.seed)
            fetched = _fetched(order, shelf, stops)
            if stops():
                return None
            stay = Stay(out, order.epochs, order.at_least, order.begun and not order.resume,
                        Path(order.resume) if order.resume else None, fetched, order.isolate)  # fmt: skip
            record = train_among(
                run, task, link, stay, board=board, journal=journal, display=display, stops=stops, exhibit=exhibit
            )
            if record is not None and link.rank == link.members[0]:
                leave(run, record)
            return record
        finally:
            link.close()
            journal.close()
            registry.close()
    finally:
        if isinstance(display, Terminal):
            display.close()
        meeting.close()


def _fetched(order: Order, shelf: Shelf, stops: Callable[[], bool]) -> Beside:
    """The state, beside the run; that it did not come is told."""
    found = fetch_beside(order.registries, order.token, shelf, stops)
    if found.why:
        told = "this member is given it when it meets the others, who wait for that long"
        print(f"thinwire: the state was not fetched beside the run ({found.why}); {told}", file=sys.stderr)
    return found


def facts(order: Order, run: Run) -> dict[str, Any]:
    """What `GET /run` tells of the run."""
    task = getattr(run.task, "function", type(run.task).__name__.removesuffix("Options").lower())
    return {
        "id": order.run_id, "version": __version__, "toml": order.toml, "lighthouses": order.lighthouses,
        "at_least": order.at_least, "epochs": order.epochs, "steps": run.steps, "method": run.method.name, "task": task,
        "begun": order.begun, "isolate": order.isolate,
    }  # fmt: skip


def _remember(out: Path, board: Board, meeting: Any, change: Change) -> None:
    """Where the others are, for newcomers and for the next life of this one."""
    lighthouses = list(getattr(meeting, "candidates", board.facts["lighthouses"]))
    board.facts["lighthouses"] = lighthouses
    known = {"lighthouses": lighthouses, "registries": list(board.others().values())}
    partial = out / FOLDER / f"{PEERS}.{board.name}"
    try:
        partial.write_text(json.dumps(known), encoding="utf-8")
        partial.replace(out / FOLDER / PEERS)
    except OSError:  # of use for a restart alone; checkpoints tell of a full disk
        partial.unlink(missing_ok=True)


def peers(out: Path) -> list[str]:
    """Registries of others that an earlier life on this machine knew."""
    try:
        found: list[str] = json.loads((out / FOLDER / PEERS).read_text(encoding="utf-8"))["registries"]
        return found
    except (OSError, ValueError, KeyError):
        return []
