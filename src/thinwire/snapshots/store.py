"""A trainer's side of a snapshot store: snapshots in the memory of a process that outlives the trainer.

    store = open_store("/run/user/1000/snapshots")       # the keeper of an earlier trainer, or a new one
    for snapshot in store.read("member 0"):              # the newest first; none at the very beginning
        ...
    store.write("member 0", version, {0: state})         # into memory of its own; the older one stands meanwhile
    store.promote("member 0", version)                   # now it replaces the older one

Trust  whoever can read the folder's key is believed, and can run code as the keeper: it is for one user's processes on
       one machine. Bytes from other machines come as shards, and are never unpickled.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from thinwire.errors import ConfigError, LinkError
from thinwire.snapshots.erasure import Bytes, digest
from thinwire.snapshots.keeper import ADDRESS, LOG, Manager
from thinwire.snapshots.memory import Attached
from thinwire.snapshots.shelf import Held

LINGER_S = 3600.0
_MOST_PATH = 86  # bytes of a folder's name: with the socket's it stays under the systems' limits, 104 and 108


@dataclass(frozen=True)
class Snapshot:
    """A snapshot as it was read: memory of the reader's own.

    note   what its owner wrote beside it
    parts  part -> uint8; those that are damaged are left out
    """

    version: int
    note: str
    parts: Mapping[int, Bytes]
    in_force: bool


class Store:
    """A connection to a keeper. Raises LinkError when that has ended; training can go on without."""

    def __init__(self, desk: Any) -> None:
        self._desk = desk
        own = psutil.Process()
        self.keeper: int = self._ask("enter", own.pid, own.create_time())

    def write(self, owner: str, version: int, parts: Mapping[int, Bytes], note: str = "") -> dict[int, str]:
        """Copy a snapshot's parts into the keeper's memory; it does not replace the older one yet.

        parts    part -> uint8
        returns  part -> digest of what arrived
        """
        names = self.begin(owner, version, {number: len(part) for number, part in parts.items()}, note)
        digests = {}
        for number, part in parts.items():
            with Attached(names[number], len(part)) as memory:
                memory[:] = part
                del memory
            digests[number] = self.arrived(owner, version, number)
        return digests

    def begin(self, owner: str, version: int, sizes: Mapping[int, int], note: str = "") -> dict[int, str]:
        """For those who write in pieces: part -> the name of the memory to write into, for `Attached`."""
        try:
            names: dict[int, str] = self._ask("begin", owner, version, note, dict(sizes))
        except OSError as error:
            raise ConfigError(
                f"no room in shared memory for {sum(sizes.values())} bytes: {error.strerror}",
                expected="room for two snapshots at a time, /dev/shm on Linux",
                mend="enlarge it (docker: --shm-size), or hold snapshots of a smaller state",
            ) from error
        return names

    def arrived(self, owner: str, version: int, part: int) -> str:
        """A part is written. Returns its digest."""
        made: str = self._ask("arrived", owner, version, part)
        return made

    def promote(self, owner: str, version: int) -> None:
        """Let a snapshot replace the older one; refused unless all its parts are there."""
        self._ask("promote", owner, version)

    def read(self, owner: str) -> list[Snapshot]:
        """All that is complete, the newest first."""
        return [self._copy(held) for held in self._held(owner)]

    def latest(self, owner: str) -> int | None:
        """The newest version that is complete."""
        return next((held.version for held in self._held(owner)), None)

    def owners(self) -> list[str]:
        """Whose snapshots there are."""
        found: list[str] = self._ask("owners")
        return found

    def forget(self, owner: str) -> None:
        """Free what an owner has here."""
        self._ask("forget", owner)

    def stop(self) -> None:
        """End the keeper: all snapshots in it are gone."""
        self._ask("stop")

    def _held(self, owner: str) -> list[Held]:
        found: list[Held] = self._ask("held", owner)
        return found

    def _copy(self, held: Held) -> Snapshot:
        parts = {}
        for number, part in held.parts.items():
            with Attached(part.segment, part.size) as memory:
                copy = np.array(memory)
                del memory
            if digest(copy) == part.digest:
                parts[number] = copy
        return Snapshot(held.version, held.note, parts, held.in_force)

    def _ask(self, what: str, *arguments: Any) -> Any:
        try:
            return getattr(self._desk, what)(*arguments)
        except (EOFError, ConnectionError) as error:
            raise LinkError(
                f"the snapshot store ended ({type(error).__name__})",
                expected="its process to outlive the trainer",
                mend="see keeper.log in its folder; open_store starts another, which is empty",
            ) from error


def open_store(folder: str | Path, *, linger_s: float = LINGER_S) -> Store:
    """The store whose keeper lives in a folder; a keeper is started if there is none.

    linger_s  how long a new keeper goes on without a live trainer before it frees everything and ends
    raises    ConfigError for a folder that cannot hold one, LinkError for a keeper that does not start
    """
    folder = Path(folder).absolute()
    if len(os.fsencode(folder)) > _MOST_PATH:
        raise ConfigError(
            f"the folder {folder} has too long a name for a socket",
            expected=f"at most {_MOST_PATH} bytes",
            mend="take one nearer to the root: /run/user/UID/NAME, or /tmp/NAME",
        )
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two trainers that begin at once, one starts a keeper
        store = _connect(folder)
        if store is None:
            _start(folder, linger_s)
            store = _connect(folder)
    if store is None:
        raise _no_keeper(folder)
    return store


def _connect(folder: Path) -> Store | None:
    """The keeper of this folder; None if there is none, or it has died."""
    try:
        socket, key = (folder / ADDRESS).read_text().split()
        manager = Manager(address=str(folder / socket), authkey=key.encode())
        manager.connect()
        return Store(manager.desk())  # type: ignore[attr-defined]
    except (FileNotFoundError, ConnectionError, EOFError, LinkError):
        return None


def _start(folder: Path, linger_s: float) -> None:
    for left in folder.glob("*.socket"):  # by a keeper that was killed
        left.unlink()
    command = [sys.executable, "-m", "thinwire.snapshots.keeper", str(folder), str(linger_s)]
    with (folder / LOG).open("w") as log:
        # A session of its own: what is sent to the trainer's group, Ctrl-C included, does not reach it.
        keeper = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
    assert keeper.stdout is not None
    with keeper.stdout as out:
        if out.readline().strip() != "ready":
            raise _no_keeper(folder)
    keeper.returncode = 0  # it outlives us on purpose: nobody here waits for it


def _no_keeper(folder: Path) -> LinkError:
    tail = (folder / LOG).read_text().strip().splitlines()[-1:] if (folder / LOG).exists() else []
    return LinkError(
        f"no snapshot store could be started in {folder}: {tail[0] if tail else 'it said nothing'}",
        expected="a process that listens at a socket there",
        mend=f"see {folder / LOG}",
    )
