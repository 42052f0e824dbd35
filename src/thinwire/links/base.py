"""The link contract: a rank among members that carries packets, and knows nothing of learning.

A link has one operation, the exchange: send some members a buffer each and receive one from some members. All-gather,
broadcast, barrier, reduce-scatter, pairs and hierarchies are written on top of it once (collectives.py), so every link
carries them alike and gives the same bits.

Exchanges happen in channels. A channel is one conversation among members, numbered in the order of opening; members
open channels in the same order, so the number pairs up their messages without being negotiated. Several channels may
be under way at once: that is how communication runs beside the compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

from torch import Tensor

from thinwire.links.meter import Meter

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Handle(Protocol[T_co]):
    """Something under way beside the caller."""

    def done(self) -> bool:
        """Whether `wait` would return (or raise) at once."""

    def wait(self) -> T_co:
        """Its result, or the error it ended with; may be called again. Bounded by the job's own time limits."""


class Channel(Protocol):
    """One conversation among members."""

    def exchange(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, int], what: str) -> dict[int, Tensor]:
        """Send and receive, and wait for both.

        outgoing  rank -> uint8 [any], on the CPU; not changed, and not to be changed until the call returns
        incoming  rank -> the most bytes its message may have
        what      words for the message shown while waiting: "round 7, fragment 2"
        returns   rank -> uint8 [that many], whose beginning is the message
        raises    PeerLost naming who left or did not answer in time; nothing waits for ever
        """


class Link(Protocol):
    """A member's view of the group."""

    @property
    def rank(self) -> int:
        """This member."""

    @property
    def members(self) -> tuple[int, ...]:
        """Everybody's ranks, ascending."""

    @property
    def meter(self) -> Meter:
        """Every byte, by purpose."""

    def open(self, purpose: str) -> Channel:
        """The next channel; its bytes are counted under `purpose`. All members open in the same order."""

    def spawn(self, job: Callable[[], T], name: str) -> Handle[T]:
        """Run a job beside the caller: a thread, or an actor of the simulation. Jobs may exchange, not open."""

    def now(self) -> float:
        """Seconds on this link's clock: the wall's, or the simulation's."""

    def local_step(self) -> None:
        """The member made a local step: a simulated clock moves by its cost, a real one has moved already."""

    def close(self) -> None:
        """Leave in peace; may be called twice."""
