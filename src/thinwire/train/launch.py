"""Where members run: as actors of a simulation, as this very process, or as processes of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from thinwire.config import Run, SimulatedLink, TorchLink, dump
from thinwire.errors import ConfigError, LinkError
from thinwire.lab.ledger import VARIABLE, write_ledger
from thinwire.links.base import Link
from thinwire.links.local import Network
from thinwire.links.local import run as simulate
from thinwire.links.torch import join
from thinwire.report import write_report
from thinwire.report.record import RunRecord
from thinwire.train.loop import Display, Silent, train

RECORD, REPORT, CONFIG = "record.json", "report.html", "run.toml"
_GRACE_S = 20.0  # what members have to end by themselves after another one failed


def execute(run: Run, *, display: Display, resume: bool = False, machine_readable: bool = False) -> RunRecord | None:
    """Carry a run out and leave its record, report and weights in its folder.

    display           for the member that is shown
    machine_readable  whether member processes are to write JSON lines, as this one does
    returns           the record; None if the members agreed to stop early
    """
    _claim(Path(run.out), resume)
    if isinstance(run.link, SimulatedLink):
        record = _simulated(run, run.link, display, resume)
    elif _is_member(run, run.link):
        record = _as_member(run, run.link, display, resume)
    else:
        return _spawned(run, run.link, resume, machine_readable)
    if record is not None and _writes(run):
        leave(run, record)
    return record


def leave(run: Run, record: RunRecord) -> None:
    """The files a person looks at afterwards."""
    folder = Path(run.out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).write_text(record.to_json())
    write_report(folder / REPORT, [record], title=f"{record.label} on {len(record.members)} members")


def _claim(folder: Path, resume: bool) -> None:
    """A new run does not write over an old one's checkpoints."""
    if not resume and any(folder.glob("checkpoints/*/*.safetensors")) and "RANK" not in os.environ:
        raise ConfigError(
            f"{folder} holds the checkpoints of an earlier run",
            expected="a folder of its own for a new run",
            mend=f"go on with it: thinwire train --resume {folder}; or choose another folder with --out",
        )


def _simulated(run: Run, link: SimulatedLink, display: Display, resume: bool) -> RunRecord | None:
    rate = None if link.rate == "unlimited" else link.rate.bits_per_s
    network = Network(rate, rate, link.delay.seconds, link.step_time.seconds)
    torch.set_num_threads(run.threads)
    task = run.task.build(seed=run.seed)  # one for all members: data is only read
    _write_config(run)
    with _stop_signal() as stops:

        def member(each: Link) -> RunRecord | None:
            return train(run, task, each, display=display, stops=stops, resume=resume)

        return simulate(run.workers, member, network)[0]


def _is_member(run: Run, link: TorchLink) -> bool:
    return "RANK" in os.environ or (link.address is not None and run.workers == 1) or run.workers == 1


def _as_member(run: Run, link: TorchLink, display: Display, resume: bool) -> RunRecord | None:
    torch.set_num_threads(run.threads)
    task = run.task.build(seed=run.seed)
    backend = link.backend
    if backend == "auto":
        backend = "nccl" if run.device == "cuda" else "gloo"
    timeout_s = None if link.timeout == "auto" else link.timeout.seconds
    if run.device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    with (
        _stop_signal() as stops,
        join(link.address, rank=link.rank, world=link.world, backend=backend, timeout_s=timeout_s) as member,
    ):
        if member.rank == 0:
            _write_config(run)
        shown = display if member.rank == 0 else Silent()
        try:
            return train(run, task, member, display=shown, stops=stops, resume=resume)
        finally:
            if VARIABLE in os.environ:
                write_ledger(Path(os.environ[VARIABLE]), member.meter)


def _writes(run: Run) -> bool:
    """Whether this process is the one that leaves the files: member 0."""
    if isinstance(run.link, SimulatedLink):
        return True
    return int(os.environ.get("RANK", run.link.rank or 0)) == 0


def _write_config(run: Run) -> None:
    folder = Path(run.out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(dump(run))


@contextmanager
def _stop_signal() -> Iterator[Callable[[], bool]]:
    """Ctrl-C asks for an orderly end; a second one ends at once. Only the main thread may listen."""
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        print("\nStopping at the next roll call; press Ctrl-C again to stop at once.", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)


# ---- processes of this machine


def _spawned(run: Run, link: TorchLink, resume: bool, machine_readable: bool) -> RunRecord | None:
    """One process a member; member 0 has the terminal, the others write logs into the run's folder."""
    folder = Path(run.out)
    _write_config(run)
    record = folder / RECORD
    record.unlink(missing_ok=True)
    logs = [folder / "logs" / f"member-{index}.log" for index in range(run.workers)]
    logs[0].parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "thinwire", "train", str(folder / CONFIG)]
    command += ["--json"] if machine_readable else []
    command += ["--resume", str(folder)] if resume else []
    # The parent keeps the meeting point, so that no port is chosen twice and no member has to come first.
    store = TCPStore("127.0.0.1", 0, None, is_master=True, timeout=timedelta(seconds=300), wait_for_workers=False)
    members = []
    for index in range(run.workers):
        environment = {**os.environ, **_member_environment(run, link, index, store.port)}
        words = (
            command
            if link.address is None
            else [*command, "--link.rank", str((link.rank or 0) + index), "--workers", "1"]
        )
        output = None if index == 0 else logs[index].open("wb")
        # A session of its own: Ctrl-C in the terminal reaches us alone, and we pass it on.
        members.append(
            subprocess.Popen(
                words, env=environment, stdout=output, stderr=output and subprocess.STDOUT, start_new_session=True
            )
        )
    code = _wait(members)
    if code == 130:
        return None
    if code:
        raise _failure(members, logs)
    return RunRecord.from_json(record.read_text()) if record.exists() else None


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


def _wait(members: list[subprocess.Popen[bytes]]) -> int:
    """Until all have ended; passes Ctrl-C on. Returns 0, 130 after an agreed stop, or a failure's code."""
    asked = 0

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked += 1
        for member in members:
            if member.poll() is None:
                os.killpg(member.pid, signal.SIGINT if asked == 1 else signal.SIGKILL)

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, pass_on) if main else None
    try:
        failed_at: float | None = None
        while any(member.poll() is None for member in members):
            codes = {member.returncode for member in members} - {None, 0, 130}
            if codes and failed_at is None:
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > _GRACE_S:
                _kill(members)
            time.sleep(0.05)
    finally:
        _kill(members)
        if main:
            signal.signal(signal.SIGINT, before)
    codes = {member.returncode for member in members}
    if codes == {0}:
        return 0
    return 130 if asked or codes <= {0, 130} else next(code for code in sorted(codes) if code)


def _kill(members: list[subprocess.Popen[bytes]]) -> None:
    for member in members:
        if member.poll() is None:
            os.killpg(member.pid, signal.SIGKILL)


def _failure(members: list[subprocess.Popen[bytes]], logs: list[Path]) -> LinkError:
    """The members that failed, with the last words of one whose output was not shown."""
    failed = [index for index, member in enumerate(members) if member.returncode not in (0, 130)]
    who = ", ".join(f"{index} (exit code {members[index].returncode})" for index in failed)
    first = next((index for index in failed if members[index].returncode < 0), failed[0])
    last = logs[first].read_text(errors="replace").splitlines()[-12:] if first else []
    words = "".join(f"\n    {line}" for line in last)
    return LinkError(
        f"the run ended early: member {who} failed{words}",
        expected="all members to reach the last step",
        mend=f"logs are in {logs[0].parent}; go on from the last checkpoint: thinwire train --resume {logs[0].parent.parent}",
    )
