"""Processes under faults in simulated time, and the ways between them: who runs, who reaches whom, who connects."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from typing import Any, Generic, Literal, TypeVar

from torch import Tensor

from thinwire.elastic.beacon import Beacon
from thinwire.elastic.quorum import Quorum
from thinwire.elastic.schedules import Crash, CrashSaying, Cut, Down, Life, Plan, Slow, Stop, host_of
from thinwire.errors import PacketError
from thinwire.links.actors import Actor, Actors, RandomState
from thinwire.links.local import Group, LocalLink, Mail
from thinwire.links.network import Network, each
from thinwire.packet import read

T = TypeVar("T")


@dataclass(frozen=True)
class Ended(Generic[T]):
    """How a life ended.

    doing  what it was at: labels of exchanges under way (see CrashSaying), "meeting", "connecting"; "": its own work
    """

    how: Literal["returned", "failed", "crashed", "cut short"]
    at_s: float
    doing: str = ""
    value: T | None = None
    error: BaseException | None = None


@dataclass(frozen=True, eq=False)
class Doing:
    """What a process is at: in an exchange, its purpose and what it sends."""

    purpose: str
    outgoing: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def label(self) -> str:
        for buffer in self.outgoing.values():
            try:
                return f"{self.purpose} {read(buffer).codec}"
            except PacketError:
                return self.purpose
        return self.purpose


@dataclass
class Process:
    """A life as the world sees it. `owner` is its number: of its actors, and in addresses."""

    life: Life
    owner: int
    began_s: float = math.inf
    ended_s: float = math.inf
    doing: list[Doing] = field(default_factory=list)
    groups: dict[int, tuple[Group, int]] = field(default_factory=dict)  # its number -> where it is, as which rank
    said: Counter[CrashSaying] = field(default_factory=Counter)

    @property
    def name(self) -> str:
        return self.life.name

    @contextmanager
    def at(self, purpose: str, outgoing: Mapping[int, Tensor] | None = None) -> Iterator[Doing]:
        """Meanwhile it does this."""
        doing = Doing(purpose, outgoing or {})
        self.doing.append(doing)
        try:
            yield doing
        finally:
            self.doing.remove(doing)


class World(Generic[T]):
    def __init__(self, plan: Plan, member: Callable[[World[T], Process], T], network: Network) -> None:
        self.plan, self.member = plan, member
        self.processes = [Process(life, owner) for owner, life in enumerate(plan.lives)]
        self.named = {process.name: process for process in self.processes}
        self.outcomes: dict[str, Ended[T]] = {}
        self.actors = Actors()
        self.mail = Mail(self.actors, _by_life(network, plan.lives), len(plan.lives), self.delay_s)
        self.cuts = [fault for fault in plan.faults if isinstance(fault, Cut)]
        self.slow = [fault for fault in plan.faults if isinstance(fault, Slow)]
        self.scripts = [fault for fault in plan.faults if isinstance(fault, CrashSaying)]
        self.lighthouse = Beacon(plan, self.actors, self.is_cut, lambda: self.processes)
        self.doors: dict[tuple[int, tuple[str, ...]], dict[str, Actor]] = {}  # quorum -> who has come to connect
        self.opened: dict[str, tuple[Group, int, float]] = {}  # who may go in: where, as which rank, since when
        self.gatherings = 0
        self.fresh = RandomState()

    def run(self) -> dict[str, Ended[T]]:
        for process in self.processes:
            if process.life.after is None:
                self.actors.at(process.life.at_s, partial(self.start, process))
        for fault in self.plan.faults:
            if isinstance(fault, Crash):
                self.actors.at(fault.at_s, partial(self.crash, self.named[fault.who]))
            elif isinstance(fault, Stop):
                self.actors.at(fault.from_s, partial(self.hold, self.named[fault.who], fault.until_s))
            elif isinstance(fault, Down):
                self.actors.at(fault.from_s, self.lighthouse.go_down)
                self.actors.at(fault.until_s, self.lighthouse.come_up)
        self.actors.at(self.plan.end_s, self.cut_short)
        self.actors.run()
        return dict(sorted(self.outcomes.items()))

    # --- lives ---------------------------------------------------------------------------------------------------

    def start(self, process: Process, now: float) -> None:
        if now >= self.plan.end_s:
            return
        process.began_s = now
        self.actors.start(process.owner, now, partial(self._life, process), self.fresh)

    def _life(self, process: Process) -> None:
        try:
            outcome = Ended("returned", 0.0, value=self.member(self, process))
        except Exception as error:
            outcome = Ended("failed", 0.0, error=error)
        self.end(process, outcome, self.actors.me.time_s)

    def end(self, process: Process, outcome: Ended[T], now: float) -> None:
        """A process is no more, and all that is of it."""
        if process.ended_s < math.inf:
            return
        process.ended_s = now
        self.outcomes[process.name] = replace(
            outcome, at_s=now, doing=" + ".join(sorted(doing.label for doing in process.doing))
        )
        why = {"returned": "it ended", "failed": f"it failed with {type(outcome.error).__name__}"}
        for group, rank in process.groups.values():
            self.mail.leave(group, rank, why.get(outcome.how, "connection reset"), now)
        process.groups = {}
        self.actors.end(process.owner, now)
        self.lighthouse.hang_up(process.name)
        for door in self.doors.values():
            door.pop(process.name, None)
        for other in self.processes:
            if other.life.after == process.name:
                self.actors.at(now + other.life.at_s, partial(self.start, other))

    def crash(self, process: Process, now: float) -> None:
        if process.began_s <= now:
            self.end(process, Ended("crashed", now), now)

    def cut_short(self, now: float) -> None:
        for process in self.processes:
            if process.began_s <= now:
                self.end(process, Ended("cut short", now), now)

    def hold(self, process: Process, until_s: float, now: float) -> None:
        self.actors.hold(process.owner, until_s)

    def crash_saying(self, process: Process, doing: Doing) -> int | None:
        """How many messages of the exchange that begins are sent before this process is no more; None: it goes on."""
        for script in self.scripts:
            if script.who == process.name and script.of in doing.label:
                process.said[script] += 1
                if process.said[script] == script.exchange + 1:
                    return script.sent
        return None

    # --- ways ----------------------------------------------------------------------------------------------------

    def delay_s(self, sender: int, receiver: int, now: float) -> float:
        here, there = (host_of(self.processes[owner].name) for owner in (sender, receiver))
        if self.is_cut(here, there, now):
            return math.inf
        return sum(slow.late_s for slow in self.slow if slow.host == here and slow.from_s <= now < slow.until_s)

    def is_cut(self, here: str, there: str, now: float) -> bool:
        return any(cut.from_s <= now < cut.until_s and cut.is_between(here, there) for cut in self.cuts)

    def connect(self, quorum: Quorum, process: Process, limit_s: float) -> LocalLink | None:
        """Wait at a quorum's door until all of it have come and nothing is between them; None: not in time."""
        name, now = process.name, self.actors.me.time_s
        door = self.doors.setdefault((quorum.id, quorum.names), {})
        door[name] = self.actors.me
        if len(door) == len(quorum.names) and self._reach_each_other(quorum.names, now):
            group = Group(self.gatherings, tuple(self.named[each].owner for each in quorum.names))
            self.gatherings += 1
            for rank, each in enumerate(quorum.names):
                self.named[each].groups[group.number] = group, rank
                self.opened[each] = group, rank, now
            for actor in self.doors.pop((quorum.id, quorum.names)).values():
                self.actors.ask(actor)
        self.actors.pause(until=lambda: self.opened[name][2] if name in self.opened else None, limit_s=limit_s)
        if name not in self.opened:
            door.pop(name, None)
            return None
        group, rank, _ = self.opened.pop(name)
        return LocalLink(self.mail, group, rank)

    def _reach_each_other(self, names: Sequence[str], now: float) -> bool:
        return not any(self.is_cut(host_of(here), host_of(there), now) for here, there in combinations(names, 2))


def _by_life(network: Network, lives: Sequence[Life]) -> Network:
    """The network of hosts as one of lives: each has its host's numbers."""
    hosts = sorted({host_of(life.name) for life in lives})
    spread: dict[str, Any] = {}
    for name in ("up_bits_per_s", "down_bits_per_s", "latency_s", "step_s"):
        of_host = dict(zip(hosts, each(getattr(network, name), len(hosts)), strict=True))
        spread[name] = [of_host[host_of(life.name)] for life in lives]
    return replace(network, **spread)
