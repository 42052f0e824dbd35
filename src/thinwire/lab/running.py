"""The same command once on every host, as torchrun would start it, and what the links carried meanwhile."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO

from thinwire.errors import ConfigError
from thinwire.lab.ledger import VARIABLE, read_ledger
from thinwire.lab.network import Counters, Lab
from thinwire.lab.result import HostResult, LabResult
from thinwire.lab.spec import LabSpec
from thinwire.lab.sweep import leftovers, sweep
from thinwire.lab.tools import require

PORT = 29500  # every lab has its own addresses, so that one port serves all
_END_LIMIT_S = 5.0


def run(
    spec: LabSpec,
    command: Sequence[str],
    *,
    grace_s: float = 30.0,
    logs: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> LabResult:
    """Build the lab, run the command once on each host, take everything down again.

    command      `{rank}` in a word becomes the host's rank
    grace_s      after a host fails, how long the others may take to end by themselves
    logs         folder for the output of hosts 1, 2, ... and the ledgers; None: their lines go to standard error,
                 with the host's number before them. Host 0 writes to standard output and error as they are.
    environment  set on every host, beside what torchrun sets
    returns      exit codes, interface counters, ledgers
    raises       ConfigError if the machine cannot run a lab, or there is no such command
    """
    _check_command(command, grace_s)
    with ExitStack() as stack:
        folder = logs or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="thinwire-lab-")))
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("host-*.ledger.json"):
            stale.unlink()
        stack.enter_context(_ends_cleanly_on_sigterm())
        with Lab(spec) as lab:
            before, started_s = lab.counters(), time.monotonic()
            processes = [_start(lab, rank, command, environment or {}, folder, logs is None) for rank in lab.ranks]
            readers = [_passing_on(process.stdout, rank) for rank, process in enumerate(processes) if process.stdout]
            exit_code = _wait(processes, grace_s)
            elapsed_s, after = time.monotonic() - started_s, lab.counters()
            hosts = [
                _host(lab, rank, process.returncode, after[rank] - before[rank], folder)
                for rank, process in enumerate(processes)
            ]
        for reader in readers:
            reader.join()  # all that wrote into the pipes has ended with the lab
        return LabResult(spec, tuple(command), exit_code, elapsed_s, tuple(hosts))


def clean() -> list[str]:
    """Remove what is left of labs whose process is gone (after SIGKILL of lab and watchdog both).

    returns  their names; living labs are not touched
    raises   ConfigError if this machine cannot run a lab, or not as this user
    """
    require()
    dead = leftovers()
    for lab in dead:
        sweep(lab)
    return dead


def torchrun_environment(spec: LabSpec, rank: int, master: str) -> dict[str, str]:
    """What torchrun would set on one machine of a group, and the interface for torch.distributed's engines."""
    return {
        "MASTER_ADDR": master,
        "MASTER_PORT": str(PORT),
        "RANK": str(rank),
        "WORLD_SIZE": str(spec.hosts),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "GLOO_SOCKET_IFNAME": "eth0",
        "TP_SOCKET_IFNAME": "eth0",
    }


def _check_command(command: Sequence[str], grace_s: float) -> None:
    if not command or shutil.which(command[0]) is None:
        raise ConfigError(
            f"lab: command not found: {command[0]}" if command else "lab: no command given",
            expected="a program on PATH, or the path of an executable file",
            mend="write the command after --, for example: thinwire lab run --hosts 2 -- python train.py",
        )
    if grace_s < 0:
        raise ConfigError(f"lab: grace_s={grace_s}", expected="0 or more seconds", mend="write 30 for half a minute")


def _start(
    lab: Lab, rank: int, command: Sequence[str], environment: Mapping[str, str], folder: Path, prefixed: bool
) -> subprocess.Popen[bytes]:
    words = [word.replace("{rank}", str(rank)) for word in command]
    settings = {
        **_defaults(),
        **torchrun_environment(lab.spec, rank, lab.address(0)),
        VARIABLE: str(_ledger(folder, rank)),
        **environment,
    }
    if rank == 0:
        return lab.start(rank, words, environment=settings)
    if prefixed:
        return lab.start(rank, words, environment=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with (folder / f"host-{rank}.log").open("wb") as log:
        return lab.start(rank, words, environment=settings, stdout=log, stderr=subprocess.STDOUT)


def _defaults() -> dict[str, str]:
    """One thread a host, as many hosts share the processor; lines as they are written, not when a buffer is full."""
    return {name: os.environ.get(name, "1") for name in ("OMP_NUM_THREADS", "PYTHONUNBUFFERED")}


def _passing_on(stream: IO[bytes], rank: int) -> threading.Thread:
    def pass_on() -> None:
        with stream:
            for line in stream:
                sys.stderr.write(f"[host {rank}] {line.decode(errors='replace').rstrip()}\n")

    reader = threading.Thread(target=pass_on, daemon=True)
    reader.start()
    return reader


def _wait(processes: Sequence[subprocess.Popen[bytes]], grace_s: float) -> int:
    """Until all ended, by themselves or after the grace time that follows the first failure.

    returns  the first exit code in time that is not 0; 128 + n for an end by signal n
    """
    ended: queue.Queue[int] = queue.Queue()
    for process in processes:
        threading.Thread(target=lambda process=process: ended.put(process.wait()), daemon=True).start()
    first, deadline_s = 0, None
    for _ in processes:
        try:
            code = ended.get(timeout=None if deadline_s is None else max(0.0, deadline_s - time.monotonic()))
        except queue.Empty:
            _end(processes)
            break
        if code and not first:
            first, deadline_s = _shell_code(code), time.monotonic() + grace_s
    return first


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask, wait, then force."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
        limit_s = time.monotonic() + _END_LIMIT_S
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, limit_s - time.monotonic()))


def _shell_code(code: int) -> int:
    return 128 - code if code < 0 else code


def _host(lab: Lab, rank: int, code: int, counters: Counters, folder: Path) -> HostResult:
    try:
        ledger, complaint = read_ledger(_ledger(folder, rank)), ""
    except ConfigError as error:
        ledger, complaint = None, error.wrong
    return HostResult(rank, lab.address(rank), _shell_code(code), counters, ledger, complaint)


def _ledger(folder: Path, rank: int) -> Path:
    return folder.resolve() / f"host-{rank}.ledger.json"


@contextmanager
def _ends_cleanly_on_sigterm() -> Iterator[None]:
    """SIGTERM takes the lab down before the process ends; outside the main thread the watchdog does it afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
