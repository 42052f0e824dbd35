"""Who is asked for which pieces: bookkeeping without I/O, for several conversations at once.

Donors are asked for more as they answer, so a fast one gives more, and none waits for another. What a donor gave
damaged is asked of others first; a piece that came damaged three times is given up.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Hashable, Mapping
from typing import Generic, TypeVar

from thinwire.errors import PacketError

ATTEMPTS = 3
D = TypeVar("D", bound=Hashable)


class Deal(Generic[D]):
    """Pieces that are missing, and donors for each. For several threads."""

    def __init__(self, sizes: Mapping[str, int], donors: Mapping[str, Collection[D]]) -> None:
        """sizes: digest -> bytes of what is missing. donors: digest -> who has it."""
        self._lock = threading.Lock()
        self._sizes = dict(sizes)
        self._donors = {digest: set(donors[digest]) for digest in sizes}
        self._waiting = dict.fromkeys(sizes)  # in order; what is asked for is not here
        self._refused: dict[str, set[D]] = {digest: set() for digest in sizes}
        self._failures = dict.fromkeys(sizes, 0)
        self._stopped = False

    @property
    def missing(self) -> list[str]:
        """What did not arrive yet, in order."""
        with self._lock:
            return list(self._sizes)

    def take(self, donor: D, most_bytes: int, most_pieces: int = 1 << 30) -> list[str]:
        """Pieces to ask a donor for now, at least one if there is one for it; none if not.

        Of the rest it gets its share at most, so that all end together; what it alone has comes first.
        """
        with self._lock:
            if self._stopped:
                return []
            fitting = [digest for digest in self._waiting if self._may(donor, digest)]
            fitting.sort(key=lambda digest: len(self._donors[digest]) > 1)  # stable
            share = sum(self._sizes[digest] / len(self._donors[digest]) for digest in fitting)
            taken: list[str] = []
            room = min(float(most_bytes), share)
            for digest in fitting:
                if taken and (self._sizes[digest] > room or len(taken) >= most_pieces):
                    break
                taken.append(digest)
                room -= self._sizes[digest]
                del self._waiting[digest]
            return taken

    def arrived(self, digest: str) -> None:
        """A piece is here, and it is right."""
        with self._lock:
            del self._sizes[digest]

    def failed(self, donor: D, digest: str, error: PacketError) -> None:
        """A piece came damaged from a donor: it is asked of another, or again. The third time raises the error."""
        with self._lock:
            self._failures[digest] += 1
            if self._failures[digest] >= ATTEMPTS:
                self._stopped = True
                raise error
            self._refused[digest].add(donor)
            self._waiting[digest] = None

    def put_back(self, asked: Collection[str]) -> None:
        """A donor did not answer this time."""
        with self._lock:
            self._waiting.update(dict.fromkeys(asked))

    def lacks(self, donor: D, digest: str) -> None:
        """A donor does not have a piece, or no longer: it is asked of others."""
        with self._lock:
            self._donors[digest].discard(donor)
            self._waiting[digest] = None

    def gone(self, donor: D, asked: Collection[str]) -> None:
        """A donor does not answer: what it was asked for, and all else, is asked of others."""
        with self._lock:
            for digest in self._sizes:
                self._donors[digest].discard(donor)
            self._waiting.update(dict.fromkeys(asked))

    def stop(self) -> None:
        """Nothing is asked for any more: somebody is lost."""
        self._stopped = True

    @property
    def orphans(self) -> list[str]:
        """Missing pieces that nobody has."""
        with self._lock:
            return [digest for digest in self._sizes if not self._donors[digest]]

    def _may(self, donor: D, digest: str) -> bool:
        donors, refused = self._donors[digest], self._refused[digest]
        return donor in donors and (donor not in refused or donors <= refused)
