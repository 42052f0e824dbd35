"""The local link: N members in one process, deterministic, with a simulated clock.

Every member is an ordinary function running in a thread of its own, but only one of them runs at a time (actors.py):
whenever it makes a local step, waits or ends, the one with the smallest simulated time goes next. So the learning is
real, the order of events is the one the simulated network would give, and the same call gives the same bits every time.
Jobs beside the compute (`spawn`) are actors like the members.

What a message takes is in network.py. Encoding and decoding cost no simulated time.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar, cast

from torch import Tensor

from thinwire.errors import ConfigError, PeerLost
from thinwire.links.actors import Actor, Actors, Job
from thinwire.links.base import Link
from thinwire.links.meter import Meter
from thinwire.links.network import SMALL_BYTES, Address, Network, Wires, each
from thinwire.links.timings import Timings

T = TypeVar("T")


def run(members: int, work: Callable[[Link], T], network: Network | None = None) -> list[T]:
    """Call `work(link)` for every member and return the results in rank order.

    raises  the error of the member that failed first; the others see PeerLost, as they would on a real link
    """
    if members < 1:
        raise ConfigError(f"{members} members", expected="at least one member", mend="ask for one worker or more")
    actors = Actors()
    mail = Mail(actors, network or Network(), members)
    group = Group(0, tuple(range(members)))
    errors: list[BaseException] = []

    def member(rank: int) -> T:
        why = "it ended"
        try:
            return work(LocalLink(mail, group, rank))
        except BaseException as error:
            why = f"it failed with {type(error).__name__}"
            errors.append(error)
            raise
        finally:
            mail.leave(group, rank, why, actors.me.time_s)

    jobs = [actors.start(rank, 0.0, partial(member, rank)) for rank in group.owners]
    actors.run()
    if errors:
        raise next((error for error in errors if not isinstance(error, PeerLost)), errors[0])
    return [cast(T, job.value) for job in jobs]


def alone() -> Link:
    """A group of one: every method runs, nothing crosses a wire. For development and for the single-machine case."""
    return _Alone()


@dataclass
class Message:
    """In the mail. `due` is when its last bit is there, once it has landed."""

    address: Address
    buffer: Tensor
    due: float
    first: float = 0.0  # when its first bit was there
    landed: bool = False


@dataclass
class Group:
    """Who carries packets among themselves: owners of actors by rank, and what each knows of the others' leaving.

    left  (who knows, rank that left) -> why, and when that was learnt
    """

    number: int
    owners: tuple[int, ...]
    left: dict[tuple[int, int], tuple[str, float]] = field(default_factory=dict)


def _in_time(sender: int, receiver: int, now: float) -> float:
    return 0.0


class Mail:
    """What is under way between actors.

    delay_s  (sender, receiver, now) -> seconds that a message sent now takes longer than the network has it;
             infinity: it is lost
    """

    def __init__(self, actors: Actors, network: Network, owners: int,
                 delay_s: Callable[[int, int, float], float] = _in_time) -> None:  # fmt: skip
        self.actors = actors
        self.wires = Wires(network, owners)
        self.step_s = [seconds or 0.0 for seconds in each(network.step_s, owners)]
        self.patience_s = network.patience_s
        self.delay_s = delay_s
        self.messages: dict[Address, Message] = {}
        self.awaited: dict[Address, Actor] = {}  # who waits for a message that has not landed
        self.awaits: dict[Actor, tuple[Group, dict[int, Address]]] = {}  # who waits, for which messages, by rank

    def send(self, group: Group, channel: int, turn: int, to: int, buffer: Tensor) -> None:
        self.actors.go_on()
        me = self.actors.me
        address = channel, turn, me.owner, group.owners[to]
        late_s = self.delay_s(me.owner, group.owners[to], me.time_s)
        if late_s == math.inf:
            return
        first, last = self.wires.leave(address, buffer.numel(), me.time_s)
        message = self.messages[address] = Message(address, buffer, last + late_s)
        self.actors.at(first + late_s, lambda at: self._land(message, at))

    def _land(self, message: Message, first: float) -> None:
        """The first bit is at the receiver's down-link: from here on it is known when the last one will be there."""
        message.due = self.wires.arrive(message.address[3], message.buffer.numel(), first, message.due)
        message.landed, message.first = True, first
        receiver = self.awaited.pop(message.address, None)
        if receiver is not None:
            group, awaits = self.awaits[receiver]
            del awaits[group.owners.index(message.address[2])]
            if not awaits:
                self.actors.ask(receiver)

    def leave(self, group: Group, rank: int, why: str, now: float) -> None:
        """A member is gone from a group: the others learn it at once, unless nothing of it reaches them."""
        owner = group.owners[rank]
        for observer, other in enumerate(group.owners):
            if other == owner or self.delay_s(owner, other, now) != math.inf:
                group.left.setdefault((observer, rank), (why, now))
        for actor, (place, awaits) in list(self.awaits.items()):
            if place is group and (actor.owner == owner or (rank in awaits and awaits[rank] not in self.messages)):
                self.actors.ask(actor)

    def receive(
        self, group: Group, rank: int, channel: int, turns: Mapping[int, int], what: str, timings: Timings
    ) -> dict[int, Tensor]:
        actor, mail = self.actors.me, self.messages
        keys = {sender: (channel, turn, group.owners[sender], actor.owner) for sender, turn in turns.items()}
        awaits = {sender: key for sender, key in keys.items() if not (key in mail and mail[key].landed)}
        self.awaits[actor] = group, awaits
        self.awaited.update(dict.fromkeys(awaits.values(), actor))

        def unsent() -> list[int]:
            return [sender for sender, key in awaits.items() if key not in mail]

        def arrived() -> float | None:
            if not awaits:
                return max((mail[key].due for key in keys.values()), default=0.0)
            if not group.left:
                return None
            if (rank, rank) in group.left:
                return group.left[rank, rank][1]
            return min((group.left[rank, gone][1] for gone in unsent() if (rank, gone) in group.left), default=None)

        try:
            in_time = self.actors.pause(until=arrived, limit_s=self.patience_s)
        finally:
            del self.awaits[actor]
            for key in awaits.values():
                del self.awaited[key]
        if awaits:
            missing = unsent()
            if (rank, rank) in group.left:
                raise PeerLost(awaits, during=what, why=group.left[rank, rank][0])
            gone = [sender for sender in missing if (rank, sender) in group.left]
            if gone:
                raise PeerLost(gone, during=what, why=group.left[rank, gone[0]][0])
            assert not in_time
            raise PeerLost(missing or awaits, during=what,
                           why=f"no answer within {self.patience_s:g} simulated seconds")  # fmt: skip
        found = {sender: mail.pop(key) for sender, key in keys.items()}
        for sender, message in found.items():
            timings.took(sender, message.buffer.numel(), message.due - message.first)
        return {sender: message.buffer.clone() for sender, message in found.items()}  # others may share it


class LocalChannel:
    def __init__(self, link: LocalLink, number: int, purpose: str) -> None:
        self._mail, self._group, self._rank = link.mail, link.group, link.rank
        self._meter, self._timings = link.meter, link.timings
        self._number, self._purpose = link.group.number << 32 | number, purpose
        self._sent: Counter[int] = Counter()
        self._received: Counter[int] = Counter()

    def exchange(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, int], what: str) -> dict[int, Tensor]:
        self.send(outgoing)
        turns = {rank: self._received[rank] for rank in incoming}
        arrived = self._mail.receive(self._group, self._rank, self._number, turns, what, self._timings)
        self._sent.update(outgoing.keys())
        self._received.update(incoming.keys())
        self._meter.count(
            self._purpose,
            sent_bytes=sum(buffer.numel() for buffer in outgoing.values()),
            received_bytes=sum(buffer.numel() for buffer in arrived.values()),
            messages_sent=len(outgoing),
        )
        return arrived

    def send(self, outgoing: Mapping[int, Tensor]) -> None:
        """Hand the messages of an exchange to the wire."""
        copies = {id(buffer): buffer.clone() for buffer in outgoing.values()}  # one that goes to all is copied once
        for rank, buffer in outgoing.items():
            self._mail.send(self._group, self._number, self._sent[rank], rank, copies[id(buffer)])


@dataclass
class LocalLink:
    mail: Mail
    group: Group
    rank: int
    meter: Meter = field(default_factory=Meter)
    timings: Timings = field(default_factory=lambda: Timings(least_bytes=SMALL_BYTES + 1))
    opened: int = 0

    @property
    def members(self) -> tuple[int, ...]:
        return tuple(range(len(self.group.owners)))

    def open(self, purpose: str) -> LocalChannel:
        number, self.opened = self.opened, self.opened + 1
        return LocalChannel(self, number, purpose)

    def spawn(self, job: Callable[[], T], name: str) -> Job[T]:
        return self.mail.actors.start(self.group.owners[self.rank], self.now(), job)

    def now(self) -> float:
        return self.mail.actors.me.time_s

    def local_step(self) -> None:
        due = self.now() + self.mail.step_s[self.group.owners[self.rank]]
        self.mail.actors.pause(until=lambda: due, limit_s=math.inf)

    def close(self) -> None:
        """Nothing to give back: the simulation ends when every member has."""


class _AloneChannel:
    def exchange(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, int], what: str) -> dict[int, Tensor]:
        assert not outgoing, "a group of one has nobody to talk to"
        assert not incoming, "a group of one has nobody to talk to"
        return {}


class _AloneJob(Generic[T]):
    """Runs when it is waited for: nobody else needs it sooner."""

    def __init__(self, job: Callable[[], T]) -> None:
        self._job = job
        self._results: list[T] = []

    def done(self) -> bool:
        return True

    def wait(self) -> T:
        if not self._results:
            self._results.append(self._job())
        return self._results[0]


class _Alone:
    """The link of a group of one, on the wall's clock."""

    rank = 0
    members = (0,)

    def __init__(self) -> None:
        self.meter = Meter()

    def open(self, purpose: str) -> _AloneChannel:
        return _AloneChannel()

    def spawn(self, job: Callable[[], T], name: str) -> _AloneJob[T]:
        return _AloneJob(job)

    def now(self) -> float:
        return time.perf_counter()

    def local_step(self) -> None:
        """Time passes by itself."""

    def close(self) -> None:
        """Nothing to give back."""
