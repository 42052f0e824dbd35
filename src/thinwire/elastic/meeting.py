"""Who is there: the contract of a place where members meet, and meet again whenever somebody came, went or crashed.

A *gathering* is a fixed group: ranks, names and a link among exactly these. As long as nobody comes or goes it holds,
and everything above works as on any link. What changes the group is a new gathering; what members then make of it
(who holds the truth, who must be brought up to date) is settled over its link, in settle.py, and not decided here.

Two places implement it: torchft's lighthouse and Manager (lighthouse.py), and a lighthouse in simulated time
(simulated.py), which follows the same rules so that schedules of faults can be played through by the thousand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from thinwire.links.base import Link


@dataclass(frozen=True)
class Gathering:
    """A group as it is until the next gathering.

    number  grows with every new gathering that this member is in; two members may count differently
    names   who is there, in order of rank. A name is one life of one process: one that comes back has another
    link    among exactly these, over a group of its own: nothing said in an earlier gathering can reach it, and what
            is still under way there ends in PeerLost. Its rank is this member's place in `names`
    """

    number: int
    names: tuple[str, ...]
    link: Link


class Meeting(Protocol):
    """One member's way to the others."""

    @property
    def name(self) -> str:
        """This member's, unlike any other's, ever."""

    def meet(self, *, broken: bool = False) -> Gathering:
        """Wait until all who are there have come to this point, and say who they are.

        All members call it at the same points of a run (after a round), or when their gathering broke. A member that
        computes longer than the others is waited for while its heart beats, up to a time limit.

        broken   something failed in the gathering that holds: it ends, and a new one is formed even of the same
                 members. One's word is enough: others learn of it here, or from PeerLost in what they have under way
        returns  the same object as last time if nobody came or went and nothing was broken
        raises   MeetingLost (an error of the link) if no gathering forms in time: too few members are left, or they
                 cannot be reached from here. It may be called again. ConfigError for what no waiting will mend
        """

    def now(self) -> float:
        """Seconds on the clock of its links; it can be asked before the first gathering."""

    def close(self) -> None:
        """Leave: the others are told, as far as that is possible, and do not wait. May be called twice."""
