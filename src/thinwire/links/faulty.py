"""Faults as scripts: a link that changes what arrives, around any other.

    >>> from thinwire.links.faulty import Tampered, flip
    >>> damaged = lambda purpose, sender, count, buffer: flip(buffer) if (sender, count) == (1, 0) else buffer
    >>> link = Tampered(link, damaged)  # doctest: +SKIP

What a script gets to see is the message, by whom it was sent, for what and as which one; so the same script on the
same run does the same damage, on every link.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from thinwire.links.base import Channel, Handle, Link
from thinwire.links.meter import Meter

T = TypeVar("T")

#: (purpose, sender, count, buffer) -> what arrives instead; `count` numbers the sender's messages of that purpose from
#: 0, `buffer` is uint8 [the most bytes that were due, or fewer] and is the script's own to change.
Change = Callable[[str, int, int, Tensor], Tensor]


@dataclass(frozen=True)
class Tampered:
    """`link`, with `change` between the wire and the member."""

    link: Link
    change: Change
    _counts: Counter[tuple[str, int]] = field(default_factory=Counter, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    @property
    def rank(self) -> int:
        return self.link.rank

    @property
    def members(self) -> tuple[int, ...]:
        return self.link.members

    @property
    def meter(self) -> Meter:
        return self.link.meter

    def open(self, purpose: str) -> Channel:
        return _TamperedChannel(self, self.link.open(purpose), purpose)

    def spawn(self, job: Callable[[], T], name: str) -> Handle[T]:
        return self.link.spawn(job, name)

    def now(self) -> float:
        return self.link.now()

    def local_step(self) -> None:
        self.link.local_step()

    def close(self) -> None:
        self.link.close()

    def changed(self, purpose: str, sender: int, buffer: Tensor) -> Tensor:
        """What the script makes of a message."""
        with self._lock:
            count = self._counts[purpose, sender]
            self._counts[purpose, sender] += 1
        return self.change(purpose, sender, count, buffer.clone())


@dataclass(frozen=True)
class _TamperedChannel:
    link: Tampered
    channel: Channel
    purpose: str

    def exchange(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, int], what: str) -> dict[int, Tensor]:
        arrived = self.channel.exchange(outgoing, incoming, what)
        return {rank: self.link.changed(self.purpose, rank, buffer) for rank, buffer in sorted(arrived.items())}


def flip(buffer: Tensor, at: int = -1, bits: int = 0x10) -> Tensor:
    """The buffer with some bits of one byte turned over."""
    damaged = buffer.clone()
    damaged[at] ^= bits
    return damaged
