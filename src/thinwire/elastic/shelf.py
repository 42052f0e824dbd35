"""Pieces of states that a member holds: what was fetched stays when a transfer is cut, and is not asked for again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections import OrderedDict
from pathlib import Path

from thinwire.errors import ConfigError

_BYTES = 2 << 30


class Shelf:
    """Pieces by their digest, with a bound on their bytes: the ones not used for longest go. For several threads.

    In memory; or in a folder, a file a piece, so that a process that starts again goes on where the last one was cut.
    What lies in a folder is checked when it is read: a damaged file counts as none.
    """

    def __init__(self, most_bytes: int = _BYTES, folder: Path | str | None = None) -> None:
        """most_bytes: of all pieces; less than a state has makes a cut transfer begin anew in part. folder: is made."""
        if most_bytes < 0:
            raise ConfigError(
                f"a shelf for {most_bytes} bytes", expected="at least 0", mend="give it room for a state, or 0 for none"
            )
        self._most_bytes, self._folder = most_bytes, None if folder is None else Path(folder)
        self._lock = threading.Lock()
        self._held: OrderedDict[str, bytes | None] = OrderedDict()  # None: in its file
        self._sizes: dict[str, int] = {}
        self._bytes = 0
        if self._folder is not None:
            self._read_folder(self._folder)

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces here."""
        return self._bytes

    def __contains__(self, digest: str) -> bool:
        return digest in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def get(self, digest: str) -> bytes | None:
        """The piece of this digest, or None."""
        with self._lock:
            if digest not in self._held:
                return None
            self._held.move_to_end(digest)
            piece = self._held[digest]
            if piece is None:
                piece = self._read(digest)
            return piece

    def put(self, digest: str, piece: bytes | memoryview) -> None:
        """Keep a copy of a piece whose digest was checked. A folder that cannot be written to keeps nothing."""
        with self._lock:
            if digest in self._held or len(piece) > self._most_bytes:
                return
            if self._folder is None:
                self._held[digest] = bytes(piece)
            else:
                try:
                    self._write(self._folder / digest, piece)
                except OSError:  # a full disk: a shelf saves time, and nothing depends on it
                    return
                self._held[digest] = None
            self._sizes[digest] = len(piece)
            self._bytes += len(piece)
            self._make_room()

    def _make_room(self) -> None:
        while self._bytes > self._most_bytes:
            self._drop(next(iter(self._held)))

    def _drop(self, digest: str) -> None:
        del self._held[digest]
        self._bytes -= self._sizes.pop(digest)
        if self._folder is not None:
            (self._folder / digest).unlink(missing_ok=True)

    def _read_folder(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            found = sorted((path.stat().st_mtime, path.name, path.stat().st_size) for path in folder.iterdir())
        except OSError as error:
            raise ConfigError(
                f"shelf {folder}: {error}", expected="a folder of this member's own, or a place for one",
                mend="name another one, or let this process write to it",
            ) from error  # fmt: skip
        for _, name, size in found:
            if len(name) == 64:
                self._held[name], self._sizes[name] = None, size
                self._bytes += size
            elif name.endswith(".partial"):  # of a process that was killed as it wrote
                (folder / name).unlink(missing_ok=True)
        self._make_room()

    def _read(self, digest: str) -> bytes | None:
        assert self._folder is not None
        with contextlib.suppress(OSError):
            piece = (self._folder / digest).read_bytes()
            if hashlib.sha256(piece).hexdigest() == digest:
                os.utime(self._folder / digest)  # used just now: for the order in which the next process drops them
                return piece
        self._drop(digest)
        return None

    @staticmethod
    def _write(path: Path, piece: bytes | memoryview) -> None:
        partial = path.with_name(path.name + ".partial")
        try:
            partial.write_bytes(piece)
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
