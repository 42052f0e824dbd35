"""A run on hosts of the lab, and faults: what each is in processes, lines and disks, and how it is undone.

Host 0 runs `thinwire up`, all others `thinwire join`. A host's processes are those in its network namespace, so that
whatever they start is found. Faults that last are on a stack: what is not undone by then is undone at the end, after an
error and on Ctrl-C; the lab removes namespaces, lines and processes, also after kill -9 of this one.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from thinwire.chaos.goodput import Happened
from thinwire.chaos.schedule import Fault
from thinwire.elastic.journal import FOLDER
from thinwire.errors import ConfigError, ThinwireError
from thinwire.lab import Lab, LabSpec
from thinwire.lab.tools import call, ip

PORT = 29400
TOKEN = "chaos"
_TRAINER = ("--as-member",)
_LIGHTHOUSE = ("thinwire.elastic.lighthouse", "thinwire.elastic.servers\0lighthouse")
_NOBODY = "02:00:00:00:00:01"  # a hardware address that no host has: frames to it are lost in silence
_RETRY_S = 2.0
_DISK_BYTES = 64 << 20
_CHUNK = bytes(1 << 20)


@dataclass
class Host:
    """A host, the command that it runs, and since when it is not running it."""

    number: int
    process: subprocess.Popen[bytes] | None = None
    down: bool = False  # by a fault: it is not started again until that is undone
    lives: int = 0
    due: float = 0.0  # monotonic seconds, when to start it
    ended: bool = False


@dataclass
class Field:
    """Hosts for as long as the block lasts.

    run_file  configuration that host 0 starts with
    out       folder; host k writes to out/hosts/k
    """

    spec: LabSpec
    run_file: Path
    out: Path
    fills: frozenset[int] = frozenset()
    at_least: int = 1
    hosts: list[Host] = field(init=False)
    happened: list[Happened] = field(default_factory=list)
    _undo: dict[int, tuple[Fault, Callable[[], None]]] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        self.hosts = [Host(number) for number in range(self.spec.hosts)]

    def __enter__(self) -> Field:
        with ExitStack() as stack:
            for number in range(self.spec.hosts):
                self.folder(number).mkdir(parents=True)
            for number in sorted(self.fills):
                self._small_disk(stack, number)
            self.lab = stack.enter_context(Lab(self.spec))
            stack.callback(self.undo_all)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def folder(self, number: int) -> Path:
        """Where a host writes."""
        return self.out / "hosts" / str(number)

    # --- the run -------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Start what is to run and does not; for whoever watches, all the time."""
        now = time.monotonic()
        for host in self.hosts:
            if host.process is not None and (code := host.process.poll()) is not None:
                host.process = None
                host.ended = code == 0
                host.due = now + _RETRY_S
            if host.process is None and not host.down and not host.ended and now >= host.due and self._may_start(host):
                self._start(host)

    def _may_start(self, host: Host) -> bool:
        return host.number == 0 or bool(self._others(host))

    def _others(self, host: Host) -> list[Host]:
        return [each for each in self.hosts if each is not host and each.process is not None]

    def _start(self, host: Host) -> None:
        out, address = self.folder(host.number), self.lab.address(host.number)
        thinwire = [sys.executable, "-m", "thinwire"]
        here = ["--bind", address, "--port", str(PORT), "--token", TOKEN, "--json"]
        if host.number == 0 and host.lives:
            words = [*thinwire, "up", "--resume", str(out), *here, "--at-least", "1"]
        elif host.number == 0:
            words = [*thinwire, "up", str(self.run_file), *here, "--at-least", str(self.at_least), "--out", str(out)]
        else:
            others = self._others(host)
            chosen = others[host.lives % len(others)].number
            words = [*thinwire, "join", f"{self.lab.address(chosen)}:{PORT}", *here, "--out", str(out)]
        environment = {name: os.environ.get(name, "1") for name in ("OMP_NUM_THREADS", "PYTHONUNBUFFERED")}
        environment |= {"GLOO_SOCKET_IFNAME": "eth0", "TP_SOCKET_IFNAME": "eth0"}
        with (self.out / f"host-{host.number}.log").open("ab") as log:
            host.process = self.lab.start(
                host.number, words, environment=environment, stdout=log, stderr=subprocess.STDOUT
            )
        host.lives += 1

    def leave(self) -> None:
        """Ask all members to leave, as Ctrl-C does."""
        for host in self.hosts:
            host.down = True
            if host.process is not None:
                with suppress(ProcessLookupError):
                    host.process.send_signal(signal.SIGINT)

    @property
    def over(self) -> bool:
        """Whether nothing runs any more and nothing is to."""
        return all(host.process is None and (host.ended or host.down) for host in self.hosts)

    # --- faults --------------------------------------------------------------------------------------------------

    def begin(self, fault: Fault) -> None:
        """Do it, and remember how it is undone.

        raises  ThinwireError if there is nothing to do it to
        """
        undo = _DOING[fault.verb](self, fault)
        place = len(self.happened)
        self.happened.append(Happened(fault, time.time()))
        if undo is not None:
            self._undo[place] = fault, undo

    def undo_due(self, elapsed_s: float) -> list[Fault]:
        """Undo what has lasted for as long as it should; returns what that was."""
        due = [
            place
            for place, (fault, _) in self._undo.items()
            if fault.for_s is not None and elapsed_s >= fault.at_s + fault.for_s
        ]
        return [self._end(place) for place in due]

    def undo_all(self) -> None:
        """Undo whatever lasts."""
        for place in list(self._undo):
            self._end(place)

    def _end(self, place: int) -> Fault:
        fault, undo = self._undo.pop(place)
        undo()
        self.happened[place] = Happened(fault, self.happened[place].at, time.time())
        return fault

    def pids(self, number: int, words: tuple[str, ...] = ("",)) -> list[int]:
        """Processes on a host whose command line has one of these in it."""
        found = [int(each) for each in call(["ip", "netns", "pids", f"{self.lab.name}-h{number}"]).split()]
        return [pid for pid in found if any(word in _command_line(pid) for word in words)]

    def _signal(self, pids: list[int], what: signal.Signals) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, what)

    def _trainers(self, fault: Fault) -> list[int]:
        pids = self.pids(fault.hosts[0], _TRAINER)
        if not pids:
            raise ThinwireError(
                f"{fault}: no trainer runs on host{fault.hosts[0]}",
                expected="a host whose member is there",
                mend="choose another time or host; the host's log says why it is not there",
            )
        return pids

    def _kill(self, fault: Fault) -> None:
        if fault.hosts:
            self._signal(self._trainers(fault), signal.SIGKILL)
            return
        found = [pid for host in self.hosts for pid in self.pids(host.number, _LIGHTHOUSE[:1])]
        if not found:
            raise ThinwireError(
                f"{fault}: no host runs a lighthouse",
                expected="the one that `thinwire up` started",
                mend="see the log of host 0",
            )
        self._signal(found, signal.SIGKILL)

    def _stop(self, fault: Fault) -> Callable[[], None]:
        pids = self._trainers(fault)
        self._signal(pids, signal.SIGSTOP)
        return lambda: self._signal(pids, signal.SIGCONT)

    def _down(self, fault: Fault) -> Callable[[], None] | None:
        host = self.hosts[fault.hosts[0]]
        host.down = True
        while pids := self.pids(host.number):  # what one of them starts meanwhile, too
            self._signal(pids, signal.SIGKILL)
        if host.process is not None:
            host.process.wait()
            host.process = None

        def back() -> None:
            host.down, host.ended, host.due = False, False, 0.0

        return back if fault.for_s is not None else None

    def _cut(self, fault: Fault) -> Callable[[], None]:
        number = fault.hosts[0]
        self.lab.cut(number)
        return lambda: self.lab.mend(number)

    def _part(self, fault: Fault) -> Callable[[], None]:
        one, two = fault.hosts

        def each(line: str) -> None:
            for here, there in ((one, two), (two, one)):
                ip(f"{self.lab.name}-h{here}", line.format(there=self.lab.address(there)))

        each(f"neigh replace {{there}} lladdr {_NOBODY} dev eth0 nud permanent")
        return lambda: each("neigh del {there} dev eth0")

    def _throttle(self, fault: Fault) -> Callable[[], None]:
        number = fault.hosts[0]
        self.lab.throttle(number, fault.rate_bits_per_s)
        return lambda: self.lab.throttle(number, None)

    def _fill(self, fault: Fault) -> Callable[[], None]:
        ballast = self.folder(fault.hosts[0]) / "ballast"
        with ballast.open("wb", buffering=0) as file, suppress(OSError):
            for _ in range(2 * _DISK_BYTES // len(_CHUNK)):
                file.write(_CHUNK)
            raise ThinwireError(
                f"{fault}: the disk of host{fault.hosts[0]} is larger than {_DISK_BYTES} bytes",
                expected="a disk of its own, made as the lab was",
                mend="this is a fault of thinwire: report it",
            )
        return lambda: ballast.unlink(missing_ok=True)

    def _small_disk(self, stack: ExitStack, number: int) -> None:
        """A file system in memory for what a host writes; at the end what is on it moves to where it was."""
        folder = self.folder(number)
        call(["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "thinwire-chaos", str(folder)])

        def keep() -> None:
            kept = folder.with_name(f"{number}.kept")
            shutil.copytree(folder, kept, ignore=shutil.ignore_patterns("ballast"))
            call(["umount", "--lazy", str(folder)])
            folder.rmdir()
            kept.rename(folder)

        stack.callback(keep)

    # --- what is left --------------------------------------------------------------------------------------------

    def logs(self) -> list[Path]:
        """The members' logs of all hosts."""
        return sorted((self.out / "hosts").glob(f"*/{FOLDER}/*.jsonl"))


_DOING: dict[str, Callable[[Field, Fault], Callable[[], None] | None]] = {
    "kill": Field._kill,
    "down": Field._down,
    "stop": Field._stop,
    "cut": Field._cut,
    "part": Field._part,
    "throttle": Field._throttle,
    "fill": Field._fill,
}


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:  # it has ended
        return ""


def check_folder(out: Path) -> None:
    """raises  ConfigError if something is there already"""
    if out.exists() and any(out.iterdir()):
        raise ConfigError(
            f"{out} is not empty", expected="a folder of its own for a run", mend="choose another one with --out"
        )
