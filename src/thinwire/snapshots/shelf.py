"""What a snapshot store holds: for every owner the snapshot in force and the one that is arriving. Events in, no I/O.

    begin(version)  ──►  arriving  ── arrived(part), all of them ──►  complete  ── promote ──►  in force
                            │                                                                     │
                     another begin: forgotten                                   the older one: forgotten

A snapshot comes into force only when all its parts are there, and the older one stands until then: whoever stops in the
middle, wherever, leaves one that is whole. An owner is a member's name; a part is a shard by its index, or part 0 of a
state that is not coded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from thinwire.errors import ConfigError


class Segment(Protocol):
    """Memory that several processes see, by its name."""

    @property
    def name(self) -> str: ...

    def digest(self, size: int) -> str:
        """SHA-256 of its first bytes, in hexadecimal."""

    def free(self) -> None:
        """Give it back."""


@dataclass(frozen=True)
class Part:
    """Where the bytes of a part lie.

    digest  of the bytes as they were when they had arrived; "" until then
    """

    segment: str
    size: int
    digest: str = ""


@dataclass(frozen=True)
class Held:
    """A snapshot in a store.

    note      what its owner wrote beside it: a manifest, or nothing
    in_force  False: complete, but its owner was not heard to say that all other holders have theirs
    """

    version: int
    note: str
    parts: Mapping[int, Part]
    in_force: bool


@dataclass
class _Version:
    version: int
    note: str
    parts: dict[int, Part]
    segments: dict[int, Segment]

    @property
    def missing(self) -> list[int]:
        return [number for number, part in self.parts.items() if not part.digest]


@dataclass
class _Owner:
    in_force: _Version | None = None
    arriving: _Version | None = None
    spare: list[tuple[int, Segment]] = field(default_factory=list)


class Shelf:
    """The bookkeeping; safe to call from several threads."""

    def __init__(self, allocate: Callable[[int], Segment]) -> None:
        self._allocate = allocate
        self._owners: dict[str, _Owner] = {}
        self._lock = threading.RLock()

    def begin(self, owner: str, version: int, note: str, sizes: Mapping[int, int]) -> dict[int, str]:
        """A snapshot is to arrive; one that was arriving is forgotten, the one in force stands.

        sizes    part -> bytes
        returns  part -> name of the segment to write it into
        raises   ConfigError for a version that is not newer than the one in force, OSError if memory is short
        """
        with self._lock:
            held = self._owners.setdefault(owner, _Owner())
            if held.in_force is not None and version <= held.in_force.version:
                raise ConfigError(
                    f"snapshot {version} of {owner!r} comes after {held.in_force.version}",
                    expected="versions that ascend",
                    mend="count on from the version that the store holds: `store.latest(owner)`",
                )
            _retire(held, held.arriving)
            held.arriving = None
            segments = self._memory(held, sizes)
            parts = {number: Part(segments[number].name, size) for number, size in sizes.items()}
            held.arriving = _Version(version, note, parts, segments)
            return {number: part.segment for number, part in parts.items()}

    def arrived(self, owner: str, version: int, number: int) -> str:
        """A part was written. Returns its digest, for the sender to compare."""
        with self._lock:
            arriving = self._arriving(owner, version)
            part = arriving.parts[number]
            made = arriving.segments[number].digest(part.size)
            arriving.parts[number] = Part(part.segment, part.size, made)
            return made

    def promote(self, owner: str, version: int) -> None:
        """All holders have their parts: this snapshot replaces the older one. ConfigError unless it is complete."""
        with self._lock:
            arriving = self._arriving(owner, version)
            if arriving.missing:
                raise ConfigError(
                    f"snapshot {version} of {owner!r} lacks part {', '.join(map(str, arriving.missing))}",
                    expected="all parts, before it replaces the older one",
                    mend="write the rest, or begin another snapshot",
                )
            held = self._owners[owner]
            _retire(held, held.in_force)
            held.in_force, held.arriving = arriving, None

    def held(self, owner: str) -> list[Held]:
        """What can be read of an owner, the newest first: what is complete, whether it is in force or not yet."""
        with self._lock:
            of = self._owners.get(owner, _Owner())
            found = [(of.arriving, False), (of.in_force, True)]
            return [Held(v.version, v.note, dict(v.parts), force) for v, force in found if v and not v.missing]

    def owners(self) -> list[str]:
        """Whose snapshots there are."""
        with self._lock:
            return sorted(owner for owner in self._owners if self.held(owner))

    def forget(self, owner: str) -> None:
        """Free all that an owner has here."""
        with self._lock:
            held = self._owners.pop(owner, _Owner())
            _retire(held, held.arriving)
            _retire(held, held.in_force)
            for _, segment in held.spare:
                segment.free()

    def close(self) -> None:
        """Free everything."""
        with self._lock:
            for owner in list(self._owners):
                self.forget(owner)

    def _arriving(self, owner: str, version: int) -> _Version:
        arriving = self._owners.get(owner, _Owner()).arriving
        if arriving is None or arriving.version != version:
            now = "none is" if arriving is None else f"{arriving.version} is"
            raise ConfigError(
                f"snapshot {version} of {owner!r} is not arriving: {now}",
                expected="the snapshot that was begun last",
                mend="begin it; another writer under the same name may have begun another since",
            )
        return arriving

    def _memory(self, held: _Owner, sizes: Mapping[int, int]) -> dict[int, Segment]:
        """Segments that the owner used before, where the sizes are the same: their pages are there already."""
        segments: dict[int, Segment] = {}
        spare, held.spare = held.spare, []
        for number, size in sizes.items():
            fitting = next((pair for pair in spare if pair[0] == size), None)
            if fitting is not None:
                spare.remove(fitting)
                segments[number] = fitting[1]
        for _, segment in spare:
            segment.free()
        try:
            for number in sizes.keys() - segments.keys():
                segments[number] = self._allocate(sizes[number])
        except OSError:
            for segment in segments.values():
                segment.free()
            raise
        return segments


def _retire(held: _Owner, version: _Version | None) -> None:
    if version is not None:
        held.spare += [(version.parts[number].size, segment) for number, segment in version.segments.items()]
