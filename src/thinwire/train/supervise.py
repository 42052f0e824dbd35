"""Who looks after members of this machine: starts them, restarts what crashes, and lets nothing outlive it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from thinwire.errors import LinkError, ThinwireError
from thinwire.train.launch import passing_on
from thinwire.train.member import ENDED, LEFT, Order

_LOOK_S = 0.1
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_MOST_RESTARTS = 10  # within
_WITHIN_S = 600.0
_CANNOT = 2  # a member's exit code for what no second try will mend
_STOPPED = (LEFT, -2, -15)


@dataclass
class Restarts:
    """When something that crashes is started again: later each time, and not for ever. `now` in seconds."""

    at: list[float] = field(default_factory=list)
    pause_s: float = _FIRST_PAUSE_S

    def next(self, now: float) -> float | None:
        """When to start it, after a crash now; None: it crashed too often."""
        self.at = [each for each in self.at if now - each < _WITHIN_S]
        if len(self.at) >= _MOST_RESTARTS:
            return None
        self.pause_s = min(_LONGEST_PAUSE_S, self.pause_s * 2) if self.at else _FIRST_PAUSE_S
        self.at.append(now)
        return now + self.pause_s


@dataclass
class _Seat:
    """A member's place: its process, and its lives so far."""

    number: int
    process: subprocess.Popen[str] | None = None
    restarts: Restarts = field(default_factory=Restarts)
    due: float | None = 0.0  # when to start it; None: it runs, or is done
    code: int | None = None
    lives: int = 0


def look_after(
    count: int, order: Callable[[int, int], Order | None], logs: Path, *, beside: Callable[[], None] = lambda: None
) -> int:
    """Run members until all have ended or left; restart those that crash.

    count   how many
    order   (place, life) -> what that member is told; None: there is no run any more
    logs    folder for what members say that have no terminal
    beside  called all the time: looks after what else there is
    returns  0 if the run has ended, 130 if the members left
    raises  ThinwireError if one cannot go on, or crashes too often
    """
    seats = [_Seat(number) for number in range(count)]
    running: list[subprocess.Popen[bytes]] = []
    with passing_on(running) as asked:
        while True:
            beside()
            for seat in seats:
                _look(seat, order, logs, running, asked())
            if all(seat.process is None and seat.due is None for seat in seats):
                break
            time.sleep(_LOOK_S)
    codes = {seat.code for seat in seats}
    return ENDED if ENDED in codes and not asked() else LEFT


def _look(
    seat: _Seat, order: Callable[[int, int], Order | None], logs: Path, running: list[subprocess.Popen[bytes]],
    asked: int,
) -> None:  # fmt: skip
    if seat.process is not None and (code := seat.process.poll()) is not None:
        running.remove(seat.process)  # type: ignore[arg-type]
        if seat.process.stdin is not None:
            seat.process.stdin.close()
        seat.process, seat.code = None, code
        _after(seat, code, asked, logs)
    if seat.due is not None and asked:
        seat.due = None
    if seat.process is None and seat.due is not None and time.monotonic() >= seat.due:
        told = order(seat.number, seat.lives)
        seat.due = None
        if told is None:
            seat.code = ENDED
            return
        seat.process = start(told, logs / f"member-{seat.number}.log")
        running.append(seat.process)  # type: ignore[arg-type]
        seat.lives += 1


def _after(seat: _Seat, code: int, asked: int, logs: Path) -> None:
    """What follows from a member's end."""
    if code in (ENDED, *_STOPPED) or asked:
        return
    if code == _CANNOT:
        raise ThinwireError(
            f"member {seat.number} of this machine cannot go on{_last_words(logs, seat.number)}",
            expected="a run that it can be in",
            mend="what it said tells what to mend",
        )
    seat.due = seat.restarts.next(time.monotonic())
    if seat.due is None:
        raise LinkError(
            f"member {seat.number} of this machine ended {_MOST_RESTARTS} times within {_WITHIN_S:.0f} s, the last "
            f"time with code {code}{_last_words(logs, seat.number)}",
            expected="a member that stays",
            mend="what it said tells why; once that is mended, start again: it is given the run's state",
        )
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    pause = seat.due - time.monotonic()
    print(f"thinwire: member {seat.number} of this machine {how}; starting it again in {pause:.0f} s", file=sys.stderr)


def start(order: Order, log: Path) -> subprocess.Popen[str]:
    """A member's process in a session of its own; it leaves when we are gone, for then its standard input ends."""
    command = [sys.executable, "-m", "thinwire", "join", "--as-member"]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    log.parent.mkdir(parents=True, exist_ok=True)
    output = None if order.shows != "nothing" else log.open("ab")
    try:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=output,
            stderr=None if output is None else subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
    finally:
        if output is not None:
            output.close()
    assert process.stdin is not None
    process.stdin.write(order.line())
    process.stdin.flush()
    return process


class Lighthouse:
    """A lighthouse's process, on one port through all its lives.

    bind  "HOST:PORT", port 0 for any
    log   where it writes
    """

    def __init__(self, bind: str, log: Path) -> None:
        self._restarts, self._log = Restarts(), log
        self._due: float | None = None
        self._process, self.address = _lighthouse(bind, log)

    def look(self) -> None:
        """Start it again if it has died; for whoever looks after things all the time."""
        now = time.monotonic()
        if self._due is None and self._process.poll() is not None:
            self._due = self._restarts.next(now)
            if self._due is None:
                return  # the members' own lighthouses serve from here on
            print(f"thinwire: the lighthouse at {self.address} has died; starting it again", file=sys.stderr)
        if self._due is not None and now >= self._due:
            self._due = None
            try:
                self._process, _ = _lighthouse(self.address, self._log)
            except LinkError as error:
                print(f"thinwire: {error}", file=sys.stderr)

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _lighthouse(bind: str, log: Path) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "thinwire.elastic.lighthouse", "--bind", bind]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=output, stdin=subprocess.DEVNULL, text=True, start_new_session=True
        )
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    if not address:
        process.wait()
        lines = log.read_text(errors="replace").strip().splitlines()
        raise LinkError(
            f"no lighthouse at {bind}: {lines[0].removeprefix('thinwire: ') if lines else 'it ended at once'}",
            expected="an address of this machine, and a port that is free",
            mend="give another --bind; pip install 'thinwire[elastic]' if torchft is missing",
        )
    return process, address


def free_port(host: str) -> int:
    """A port that was free a moment ago."""
    import socket

    with socket.create_server((host, 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


def _last_words(logs: Path, number: int) -> str:
    path = logs / f"member-{number}.log"
    if not path.exists():
        return ""
    lines: Sequence[str] = path.read_text(errors="replace").splitlines()[-8:]
    return "".join(f"\n    {line}" for line in lines)
