"""Nothing of a lab stays behind: who owns which namespaces, and how they are removed when the owner is gone.

A living lab holds a lock on its file in /run/thinwire-lab; the kernel drops the lock when the process ends, however it
ends. Run as a script this file is the watchdog: it reads a pipe until the lab's end closes, then removes the lab. It
is a process of its own session, needs the standard library only (it is started with `python -I -S`), and does the
cleaning after an orderly end as well as after SIGKILL, so that one path does both and every run tests it.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

REGISTRY = Path("/run/thinwire-lab")
NAMESPACES = Path("/var/run/netns")  # where `ip netns` keeps them
MARK = "THINWIRE_LAB"  # set in the environment of all that runs in a lab
_NAME = re.compile(r"(tw[0-9a-f]{6})-(?:h[0-9]+|sw)")
_KILL_LIMIT_S = 10.0


@contextmanager
def claim(subnet: int | None) -> Iterator[tuple[str, int]]:
    """A lab's name, and the third byte of its addresses, owned until the block ends.

    raises  LookupError with the owner's name where the subnet is taken, or all are
    """
    REGISTRY.mkdir(mode=0o755, parents=True, exist_ok=True)
    with _registry_locked():
        taken = {_subnet(lab): lab for lab in _recorded() if is_living(lab)}
        if subnet is not None and subnet in taken:
            raise LookupError(taken[subnet])
        free = [number for number in range(256) if number not in taken] if subnet is None else [subnet]
        if not free:
            raise LookupError("256 labs at once")
        name, number = f"tw{secrets.token_hex(3)}", secrets.choice(free)
        file = _file(name).open("w")
        _lock(file)
        json.dump({"pid": os.getpid(), "subnet": number}, file)
        file.flush()
    with file:
        yield name, number


def is_living(lab: str) -> bool:
    """Whether the process that made the lab still runs."""
    try:
        with _file(lab).open() as file:
            _lock(file, wait=False)
            return False
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False


def leftovers() -> list[str]:
    """Labs whose process is gone and whose namespaces, processes or file are not."""
    with _registry_locked():
        found = {match[1] for name in _listing(NAMESPACES) if (match := _NAME.fullmatch(name))}
        return sorted(lab for lab in found | set(_recorded()) | set(_marks().values()) if not is_living(lab))


def sweep(lab: str) -> None:
    """Delete the lab's namespaces, end what runs in them, forget the lab. May be called twice, and at once by two.

    The names go first: nothing can enter a namespace then, and what is in it is known by its inode.
    """
    names = [name for name in _listing(NAMESPACES) if (match := _NAME.fullmatch(name)) and match[1] == lab]
    inodes = {inode for name in names if (inode := _inode(NAMESPACES / name))}
    for name in names:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
    limit = time.monotonic() + _KILL_LIMIT_S
    while (running := _inhabitants(lab, inodes)) and time.monotonic() < limit:
        for pid in running:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)  # a killed process needs a moment to go
    _file(lab).unlink(missing_ok=True)


def watch(lab: str) -> None:
    """Wait for the lab to end, then sweep."""
    sys.stdin.buffer.read()
    sweep(lab)


def _inhabitants(lab: str, inodes: set[int]) -> list[int]:
    """Processes in the namespaces, and those the lab started that moved elsewhere or have not arrived yet."""
    inside = {pid for pid in _pids() if _inode(Path(f"/proc/{pid}/ns/net")) in inodes}
    return sorted(inside | {pid for pid, mark in _marks().items() if mark == lab})


def _marks() -> dict[int, str]:
    """Process -> the lab it was started in."""
    marks = {}
    for pid in _pids():
        with suppress(OSError):
            if found := re.search(rb"(?:^|\0)" + MARK.encode() + rb"=(tw[0-9a-f]{6})\0", _environment(pid)):
                marks[pid] = found[1].decode()
    return marks


def _environment(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes() + b"\0"


def _pids() -> list[int]:
    return [int(name) for name in _listing(Path("/proc")) if name.isdigit() and int(name) != os.getpid()]


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None


def _listing(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _recorded() -> list[str]:
    return [path.stem for path in REGISTRY.glob("tw*.json")]


def _file(lab: str) -> Path:
    return REGISTRY / f"{lab}.json"


def _subnet(lab: str) -> int:
    try:
        return int(json.loads(_file(lab).read_text())["subnet"])
    except (OSError, ValueError):
        return -1  # its owner was ended between the lock and the first byte


@contextmanager
def _registry_locked() -> Iterator[None]:
    REGISTRY.mkdir(mode=0o755, parents=True, exist_ok=True)
    with (REGISTRY / ".lock").open("w") as file:
        _lock(file)
        yield


def _lock(file: IO[str], *, wait: bool = True) -> None:
    """raises  BlockingIOError if somebody else holds it and we are not to wait"""
    import fcntl  # not on every system, and this file is imported on all

    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


if __name__ == "__main__":
    watch(sys.argv[1])
