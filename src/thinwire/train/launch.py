"""Where members run: as actors of a simulation, as this very process, or as processes of this machine."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from thinwire.config import Run, SimulatedLink, TorchLink, dump
from thinwire.errors import ConfigError, LinkError, ThinwireError
from thinwire.lab.ledger import VARIABLE, write_ledger
from thinwire.links.base import Link
from thinwire.links.joining import join
from thinwire.links.local import run as simulate
from thinwire.links.network import Network
from thinwire.report import write_report
from thinwire.report.record import RunRecord
from thinwire.train.display import Display, Silent
from thinwire.train.loop import train
from thinwire.train.steps import device_of, not_written

RECORD, REPORT, CONFIG = "record.json", "report.html", "run.toml"
_GRACE_S = 20.0  # what members have to end by themselves after another one failed
_STOPS = (signal.SIGINT, signal.SIGTERM)
_STOPPED = (130, -signal.SIGINT)  # a member's exit code after an agreed stop, or a stop before its first step


def execute(
    run: Run, *, display: Display, resume: bool = False, start: Path | None = None, machine_readable: bool = False
) -> RunRecord | None:
    """Carry a run out and leave its record, report and weights in its folder.

    display           for the member of this process, or for member 0 of several
    start             a universal checkpoint to go on from, in a folder of its own
    machine_readable  whether member processes are to write JSON lines, as this one does
    returns           the record; None if the members agreed to stop early
    """
    _claim(Path(run.out), resume)
    device_of(run)  # refuses a GPU that is not there, and answers that do not fit, before anybody waits for anybody
    run.method.build()
    if isinstance(run.link, SimulatedLink):
        record = _simulated(run, run.link, display, resume, start)
    elif _is_member(run):
        record = _as_member(run, run.link, display, resume, start)
    else:
        return _spawned(run, run.link, resume, start, machine_readable)
    if record is not None and _writes(run):
        leave(run, record)
    return record


def leave(run: Run, record: RunRecord) -> None:
    """The files a person looks at afterwards."""
    folder = Path(run.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).write_text(record.to_json(), encoding="utf-8")
        write_report(folder / REPORT, [record], title=f"{record.label} on {len(record.members)} members")
    except OSError as error:
        raise not_written(folder / RECORD, error) from error


def _claim(folder: Path, resume: bool) -> None:
    """A new run does not write over an old one's checkpoints."""
    if not resume and any(folder.glob("checkpoints/*/*.safetensors")) and "RANK" not in os.environ:
        raise ConfigError(
            f"{folder} holds the checkpoints of an earlier run",
            expected="a folder of its own for a new run",
            mend=f"go on with it: thinwire train --resume {folder}; or choose another folder with --out",
        )


def _simulated(run: Run, link: SimulatedLink, display: Display, resume: bool, start: Path | None) -> RunRecord | None:
    rate = None if link.rate == "unlimited" else link.rate.bits_per_s
    network = Network(rate, rate, latency_s=link.delay.seconds, step_s=link.step_time.seconds)
    torch.set_num_threads(run.threads)
    task = run.task.build(seed=run.seed)  # one for all members: data is only read
    write_config(run)
    with stop_signal() as stops:

        def member(each: Link) -> RunRecord | None:
            shown = display if each.rank == 0 else Silent()
            return train(run, task, each, display=shown, stops=stops, resume=resume, start=start)

        return simulate(run.workers, member, network)[0]


def _is_member(run: Run) -> bool:
    return "RANK" in os.environ or run.workers == 1


def _as_member(run: Run, link: TorchLink, display: Display, resume: bool, start: Path | None) -> RunRecord | None:
    torch.set_num_threads(run.threads)
    task = run.task.build(seed=run.seed)
    backend = link.backend
    if backend == "auto":
        backend = "nccl" if run.device == "cuda" else "gloo"
    timeout_s = None if link.timeout == "auto" else link.timeout.seconds
    if run.device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    with ExitStack() as stack:
        with _plain_ctrl_c():
            joining = join(link.address, rank=link.rank, world=link.world, backend=backend, timeout_s=timeout_s)
            member = stack.enter_context(joining)
        stops = stack.enter_context(stop_signal())
        # Members of several machines have a person and a folder each; those of one machine share member 0's.
        apart = member.rank == 0 or link.address is not None
        if apart:
            write_config(run)
        shown = display if apart else Silent()
        try:
            return train(run, task, member, display=shown, stops=stops, resume=resume, start=start)
        finally:
            if VARIABLE in os.environ:
                write_ledger(Path(os.environ[VARIABLE]), member.meter)


def _writes(run: Run) -> bool:
    """Whether this process is the one that leaves the files: member 0."""
    if isinstance(run.link, SimulatedLink):
        return True
    return int(os.environ.get("RANK", run.link.rank or 0)) == 0


def write_config(run: Run) -> None:
    """The run as TOML in its folder; raises ConfigError if that cannot be written into."""
    folder = Path(run.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{CONFIG}.{os.getpid()}"
        partial.write_text(dump(run), encoding="utf-8")
        partial.replace(folder / CONFIG)
    except OSError as error:
        raise ConfigError(
            f"--out {folder}: {error.strerror or error}",
            expected="a folder that can be written into",
            mend="name another one with --out, or make room",
        ) from error


@contextmanager
def _plain_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C end the process as it would end any other: nothing is lost before the first step.

    A group forms inside the engine, where Python's own handler would have to wait for it, minutes perhaps.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def stop_signal(words: str = "Stopping as soon as all members know") -> Iterator[Callable[[], bool]]:
    """Ctrl-C, or the SIGTERM of a scheduler, asks for an orderly end; a second one ends at once.

    Only the main thread may listen.
    """
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        print(f"{words}; press Ctrl-C again to stop at once.", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.signal(number, ask) for number in _STOPS}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- processes of this machine


def _spawned(run: Run, link: TorchLink, resume: bool, start: Path | None, machine_readable: bool) -> RunRecord | None:
    """One process a member; member 0 has the terminal, the others write logs into the run's folder."""
    folder = Path(run.out)
    write_config(run)
    record = folder / RECORD
    record.unlink(missing_ok=True)
    logs = [folder / "logs" / f"member-{index}.log" for index in range(run.workers)]
    logs[0].parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "thinwire", "train", str(folder / CONFIG)]
    command += ["--json"] if machine_readable else []
    command += ["--resume", str(folder)] if resume else []
    command += ["--from", str(start)] if start is not None else []
    # The parent keeps the meeting point, so that no port is chosen twice and no member has to come first.
    store = TCPStore("127.0.0.1", 0, None, is_master=True, timeout=timedelta(seconds=300), wait_for_workers=False)
    members: list[subprocess.Popen[bytes]] = []
    with passing_on(members) as asked:
        for index in range(run.workers):
            if asked():
                break
            environment = {**os.environ, **_member_environment(run, link, index, store.port)}
            own = [] if link.address is None else ["--link.rank", str((link.rank or 0) + index), "--workers", "1"]
            members.append(_start([*command, *own], environment, None if index == 0 else logs[index]))
        _wait(members)
    write_config(run)  # members of several machines wrote their own part of it
    codes = {member.returncode for member in members}
    if asked() > 1 or (codes != {0} and codes <= {0, *_STOPPED}):
        return None
    if codes != {0}:
        raise _failure(members, logs)
    return RunRecord.from_json(record.read_text(encoding="utf-8")) if record.exists() else None


def _start(command: list[str], environment: dict[str, str], log: Path | None) -> subprocess.Popen[bytes]:
    """A member, in a session of its own: Ctrl-C in the terminal reaches us alone, and we pass it on."""
    if log is None:
        return subprocess.Popen(command, env=environment, start_new_session=True)
    with log.open("wb") as output:
        return subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )


def _member_environment(run: Run, link: TorchLink, index: int, port: int) -> dict[str, str]:
    threads = {"OMP_NUM_THREADS": str(run.threads)}
    if link.address is not None:
        return threads
    return threads | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "RANK": str(index),
        "LOCAL_RANK": str(index),
        "WORLD_SIZE": str(run.workers),
    }


@contextmanager
def passing_on(members: list[subprocess.Popen[bytes]]) -> Iterator[Callable[[], int]]:
    """Pass Ctrl-C on to the members, a second one as an order to end at once; none of them outlives the block.

    yields  how often there was one
    """
    asked = 0

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked += 1
        for member in members:
            if member.poll() is None:
                os.killpg(member.pid, signal.SIGINT if asked == 1 else signal.SIGKILL)

    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, pass_on) for number in _STOPS} if main else {}
    try:
        yield lambda: asked
    finally:
        _kill(members)
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(members: list[subprocess.Popen[bytes]]) -> None:
    """Until all have ended; after a failure the others have a while to end by themselves."""
    failed_at: float | None = None
    while any(member.poll() is None for member in members):
        codes = {member.returncode for member in members} - {None, 0, *_STOPPED}
        if codes and failed_at is None:
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > _GRACE_S:
            _kill(members)
        time.sleep(0.05)


def _kill(members: list[subprocess.Popen[bytes]]) -> None:
    for member in members:
        if member.poll() is None:
            os.killpg(member.pid, signal.SIGKILL)
            member.wait()


def _failure(members: list[subprocess.Popen[bytes]], logs: list[Path]) -> ThinwireError:
    """Who failed first of all, with its last words unless it is member 0, whose words were shown."""
    folder = logs[0].parent.parent
    codes = {index: member.returncode for index, member in enumerate(members)}
    last = {index: logs[index].read_text(errors="replace").splitlines()[-12:] if index else [] for index in codes}
    failed = [index for index, code in codes.items() if code not in (0, *_STOPPED)]

    lost = {index for index in failed if any("thinwire: lost member" in line for line in last[index])}
    if lost and set(failed) - lost - {
        0
    }:  # what member 0 said went to the terminal; it was not the only one to lose another
        lost.add(0)

    def blame(index: int) -> tuple[bool, bool, bool]:
        """Killed or crashed comes before an error told, and this before the news that another member was lost."""
        return codes[index] >= 0, codes[index] == 2, index in lost

    first = min(failed, key=blame)
    how = (
        f"was killed by {signal.Signals(-codes[first]).name}"
        if codes[first] < 0
        else f"failed, exit code {codes[first]}"
    )
    words = "".join(f"\n    {line}" for line in last[first])
    resume = f"go on with: thinwire train --resume {shlex.quote(str(folder))}"
    kept = any(folder.glob("checkpoints/*/*.safetensors"))
    return LinkError(
        f"the run ended early: member {first} {how}{words}",
        expected="all members to reach the last step",
        mend=f"the other members' output is in {logs[0].parent}; {resume if kept else 'there is no checkpoint yet'}",
    )
