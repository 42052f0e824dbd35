"""The process that keeps snapshots, apart from the trainer's: what is in it is there after the trainer was killed.

    python -m thinwire.snapshots.keeper FOLDER LINGER_S

It serves a `Shelf` at a socket in the folder, by multiprocessing's managers; the file `address` tells the socket's name
and the key, to whoever may read it. It ends when told to, or when no trainer that came is alive any more and LINGER_S
seconds have passed; then all its memory is freed.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.managers import BaseManager
from pathlib import Path

import psutil

from thinwire.snapshots.memory import Owned
from thinwire.snapshots.shelf import Shelf

ADDRESS, LOG = "address", "keeper.log"
_LOOK_EVERY_S = 1.0


class Watch:
    """Whether anybody is left to keep snapshots for."""

    def __init__(self, linger_s: float, now: float) -> None:
        self._linger_s, self._seen = linger_s, now
        self._trainers: set[tuple[int, float]] = set()
        self._lock = threading.Lock()

    def enter(self, pid: int, created: float) -> None:
        """A trainer came: a process's number, and when it began, since numbers are used again."""
        with self._lock:
            self._trainers.add((pid, created))

    def over(self, now: float, lives: Callable[[int, float], bool]) -> bool:
        """Whether no trainer has been alive for as long as snapshots are to be kept."""
        with self._lock:
            self._trainers = {trainer for trainer in self._trainers if lives(*trainer)}
            if self._trainers:
                self._seen = now
            return now - self._seen >= self._linger_s


class Desk(Shelf):
    """A shelf that is served: it knows who came."""

    def __init__(self, watch: Watch) -> None:
        super().__init__(Owned)
        self._watch, self.told = watch, threading.Event()

    def enter(self, pid: int, created: float) -> int:
        """A trainer came. Returns the keeper's own process number."""
        self._watch.enter(pid, created)
        return os.getpid()

    def stop(self) -> None:
        """End the process soon, and free everything."""
        self.told.set()


class Manager(BaseManager):
    """How a desk is reached."""


EXPOSED = ("begin", "arrived", "promote", "held", "owners", "forget", "enter", "stop")
Manager.register("desk", exposed=EXPOSED)


def serve(folder: Path, linger_s: float) -> None:
    """Keep snapshots until it is over; writes a line when it can be reached."""
    watch = Watch(linger_s, time.monotonic())
    desk = Desk(watch)
    # A name of its own: managers keep connections by address, also those to a keeper that has died.
    socket, key = folder / f"{secrets.token_hex(4)}.socket", secrets.token_hex(16)

    class Serving(BaseManager):
        pass

    Serving.register("desk", callable=lambda: desk, exposed=EXPOSED)
    signal.signal(signal.SIGTERM, lambda *_: desk.stop())
    server = Serving(address=str(socket), authkey=key.encode()).get_server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    _write(folder / ADDRESS, f"{socket.name} {key}")
    print("ready", flush=True)
    try:
        while not desk.told.wait(_LOOK_EVERY_S) and not watch.over(time.monotonic(), is_alive):
            pass
    finally:
        desk.close()
        (folder / ADDRESS).unlink(missing_ok=True)  # the socket goes with the process: its listener sees to that


def is_alive(pid: int, created: float) -> bool:
    """Whether that very process is there."""
    try:
        process = psutil.Process(pid)
        return process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _write(path: Path, text: str) -> None:
    """Whole or not at all, for this user's eyes."""
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    partial.replace(path)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), float(sys.argv[2]))
