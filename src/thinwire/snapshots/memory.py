"""Shared memory by name: made and freed by the store's process, seen by others, who leave no trace when they die."""

from __future__ import annotations

import contextlib
import os
import sys
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory

import numpy as np

from thinwire.snapshots.erasure import Bytes, digest

_FOLDER = "/dev/shm"  # where Linux shows POSIX shared memory as files


class Owned:
    """A segment of this process, which frees it; should the process be killed, Python's resource tracker does."""

    def __init__(self, size: int) -> None:
        self._memory = SharedMemory(create=True, size=max(size, 1))
        try:
            _reserve(self._memory.name, max(size, 1))
        except OSError:
            self.free()
            raise

    @property
    def name(self) -> str:
        """For others to attach by."""
        return self._memory.name

    def digest(self, size: int) -> str:
        """SHA-256 of its first bytes."""
        return digest(_array(self._memory, size))

    def free(self) -> None:
        """Give it back; others that look at it still may do so until they end."""
        self._memory.close()
        self._memory.unlink()


class Attached:
    """Another process's segment, as an array, within a `with` block."""

    def __init__(self, name: str, size: int) -> None:
        self._memory, self._size = _attach(name), size
        self._array: Bytes | None = None

    def __enter__(self) -> Bytes:
        self._array = _array(self._memory, self._size)
        return self._array

    def __exit__(self, *_: object) -> None:
        self._array = None
        with contextlib.suppress(BufferError):  # the caller keeps a view, as a traceback may: it ends with the process
            self._memory.close()


def _array(memory: SharedMemory, size: int) -> Bytes:
    assert memory.buf is not None, "open"
    return np.frombuffer(memory.buf, np.uint8, size)


def _attach(name: str) -> SharedMemory:
    if sys.version_info >= (3, 13):
        return SharedMemory(name, track=False)
    memory = SharedMemory(name)
    # Before 3.13 whoever attaches is taken for an owner, and its death would free the segment for everybody.
    resource_tracker.unregister(memory._name, "shared_memory")  # type: ignore[attr-defined]
    return memory


def _reserve(name: str, size: int) -> None:
    """Have the pages now, or OSError: without this the writer dies of SIGBUS when shared memory is full."""
    path = os.path.join(_FOLDER, name)
    if sys.platform == "linux" and os.path.exists(path):
        handle = os.open(path, os.O_RDWR)
        try:
            os.posix_fallocate(handle, 0, size)
        finally:
            os.close(handle)
