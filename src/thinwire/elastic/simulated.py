"""Members that come, go and crash in simulated time: the meeting place, and schedules of faults played through.

    lives = Life("a.1"), Life("b.1"), Life("b.2", 3.0, after="b.1")
    ends = simulate(Plan(lives, (CrashSaying("b.1", 4, of="verdict"),)), member)

Everything is as in links/local.py: one actor at a time, simulated clocks, the same call gives the same bits. Beside it
there is a lighthouse by torchft's rules (quorum.py), and a group for every gathering. What a member says there goes
over the simulated network; what it says to the lighthouse costs no time, but is lost where there is no way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from thinwire.elastic.meeting import Gathering
from thinwire.elastic.quorum import Quorum
from thinwire.elastic.schedules import Plan
from thinwire.elastic.world import Ended, Process, World
from thinwire.errors import MeetingLost, PeerLost
from thinwire.links.actors import Job
from thinwire.links.base import Channel
from thinwire.links.local import LocalChannel, LocalLink
from thinwire.links.meter import Meter
from thinwire.links.network import Network
from thinwire.links.timings import Timings

T = TypeVar("T")


def simulate(
    plan: Plan, member: Callable[[SimulatedMeeting], T], network: Network | None = None
) -> dict[str, Ended[T]]:
    """Call `member(meeting)` for every life of the plan, and say how each ended; those that never began are left out.

    network  sequences in it give one number for each host, in the order of their names
    """
    return World(plan, lambda world, process: member(SimulatedMeeting(world, process)), network or Network()).run()


class SimulatedMeeting:
    """A member's way to the others: what torchft's Manager does, and a connection to each of the quorum."""

    def __init__(self, world: World[Any], process: Process) -> None:
        self._world, self._process = world, process
        self._now: tuple[Quorum, _Link, Gathering] | None = None
        self._failed = False
        self._number = 0

    @property
    def name(self) -> str:
        return self._process.name

    def meet(self, *, broken: bool = False) -> Gathering:
        world = self._world
        give_up_s = self.now() + world.plan.meeting_limit_s
        if broken:
            self._failed = True
            self._leave("it gave up this gathering")
        while (left_s := give_up_s - self.now()) > 0:
            with self._process.at("meeting"):
                quorum = world.lighthouse.ask(self.name, failed=self._failed, limit_s=left_s)
            if quorum is None:
                break
            if self._now is not None and not self._failed and quorum == self._now[0]:
                return self._now[2]
            self._leave("it went on to another gathering")
            with self._process.at("connecting"):
                link = world.connect(quorum, self._process, min(world.plan.connect_s, left_s))
            if link is None:
                self._failed = True
                continue
            self._failed = False
            self._number += 1
            joined = _Link(world, self._process, link)
            self._now = quorum, joined, Gathering(self._number, quorum.names, joined)
            return self._now[2]
        within = f"within {world.plan.meeting_limit_s:g} simulated seconds"
        raise MeetingLost(
            f"{self.name}: no gathering {within}: {world.lighthouse.reason[self.name]}",
            expected="enough members, and a lighthouse that can be reached",
            mend="ask again, or start more members",
        )

    def now(self) -> float:
        return self._world.actors.me.time_s

    def close(self) -> None:
        self._leave("it left")

    def _leave(self, why: str) -> None:
        if self._now is not None:
            self._now[1].leave(why)
            self._now = None


@dataclass
class _Link:
    """A gathering's link. A script may end its member in the midst of an exchange."""

    world: World[Any]
    process: Process
    link: LocalLink

    @property
    def rank(self) -> int:
        return self.link.rank

    @property
    def members(self) -> tuple[int, ...]:
        return self.link.members

    @property
    def meter(self) -> Meter:
        return self.link.meter

    @property
    def timings(self) -> Timings:
        return self.link.timings

    def open(self, purpose: str) -> Channel:
        return _Channel(self, self.link.open(purpose), purpose)

    def spawn(self, job: Callable[[], T], name: str) -> Job[T]:
        return self.link.spawn(job, name)

    def now(self) -> float:
        return self.link.now()

    def local_step(self) -> None:
        self.link.local_step()

    def close(self) -> None:
        self.leave("it left")

    def leave(self, why: str) -> None:
        if self.process.groups.pop(self.link.group.number, None) is not None:
            self.world.mail.leave(self.link.group, self.rank, why, self.now())


@dataclass(frozen=True)
class _Channel:
    link: _Link
    channel: LocalChannel
    purpose: str

    def exchange(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, int], what: str) -> dict[int, Tensor]:
        world, process, group = self.link.world, self.link.process, self.link.link.group
        world.actors.go_on()
        if group.number not in process.groups:
            raise PeerLost(incoming or outgoing, during=what, why=group.left[self.link.rank, self.link.rank][0])
        with process.at(self.purpose, outgoing) as doing:
            sent = world.crash_saying(process, doing)
            if sent is not None:
                self.channel.send(dict(sorted(outgoing.items())[:sent]))
                world.crash(process, self.link.now())
            return self.channel.exchange(outgoing, incoming, what)
