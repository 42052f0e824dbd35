"""A link across islands, for members that hold the other shards of one model, or share it, with others of their island.

island 0    0 ── 1      `within`: fast, its ranks are the shards
            │    │
island 1    0 ── 1      `across`: slow, its ranks are the islands; members of equal rank within meet here
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from thinwire.links.base import Channel, Handle, Link
from thinwire.links.meter import Meter

T = TypeVar("T")


@dataclass(frozen=True)
class IslandLink:
    """`across` as a link, with `within` at hand. Its ranks, bytes and clock are those of `across`."""

    across: Link
    within: Link

    @property
    def rank(self) -> int:
        return self.across.rank

    @property
    def members(self) -> tuple[int, ...]:
        return self.across.members

    @property
    def meter(self) -> Meter:
        return self.across.meter

    def open(self, purpose: str) -> Channel:
        return self.across.open(purpose)

    def spawn(self, job: Callable[[], T], name: str) -> Handle[T]:
        return self.across.spawn(job, name)

    def now(self) -> float:
        return self.across.now()

    def local_step(self) -> None:
        self.across.local_step()

    def close(self) -> None:
        self.across.close()
        self.within.close()


def within(link: Link) -> Link | None:
    """A member's link within its island; None if it is its island, alone."""
    return link.within if isinstance(link, IslandLink) else None
