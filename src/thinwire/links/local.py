"""The local link: N members in one process, deterministic, with a simulated clock.

Every member is an ordinary function running in a thread of its own, but only one of them runs at a time. Each carries
a simulated time; whenever the running one makes a local step, waits or ends, the runnable one with the smallest time
goes next. So the learning is real, the order of events is the one the simulated network would give, and the same call
gives the same bits every time. Jobs beside the compute (`spawn`) are actors like the members.

What a message takes is in network.py. Encoding and decoding cost no simulated time.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from thinwire.errors import ConfigError, PeerLost
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
    return _Simulation(members, network or Network()).run(work)


def alone() -> Link:
    """A group of one: every method runs, nothing crosses a wire. For development and for the single-machine case."""
    return _Alone()


class _Actor:
    """A thread that takes turns."""

    def __init__(self, rank: int, time_s: float, number: int) -> None:
        self.rank, self.time_s, self.number = rank, time_s, number
        self.turn = threading.Semaphore(0)
        self.deadline_s = math.inf
        self.waits_for: Callable[[], float | None] = lambda: None  # when it can go on, None: not yet
        self.awaits: dict[int, Address] = {}  # sender -> message that it waits for and that has not landed
        self.timed_out = False
        self.ended = False
        self.random = _RandomState()


@dataclass
class _Message:
    """In the mail. `due` is when its last bit is there, once it has landed."""

    address: Address
    buffer: Tensor
    due: float
    first: float = 0.0  # when its first bit was there
    landed: bool = False


class _RandomState:
    """The global generators as one member sees them: members of one process must not draw from each other's."""

    def __init__(self) -> None:
        self.torch, self.python, self.numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()

    def swap_in(self) -> None:
        torch.set_rng_state(self.torch)
        random.setstate(self.python)
        np.random.set_state(self.numpy)


class _Simulation:
    def __init__(self, members: int, network: Network) -> None:
        self.members = tuple(range(members))
        self.wires = Wires(network, members)
        self.step_s = [seconds or 0.0 for seconds in each(network.step_s, members)]
        self.patience_s = network.patience_s
        self.mail: dict[Address, _Message] = {}
        self.awaited: dict[Address, _Actor] = {}  # who waits for a message that has not landed
        self.left: dict[int, tuple[str, float]] = {}  # rank -> why it ended, and when
        self.numbers = itertools.count()
        self.events: list[tuple[float, int, _Actor | _Message]] = []  # a heap: when, order of starting, who goes on
        self.waiting: dict[int, _Actor] = {}  # by number
        self.local = threading.local()
        self.all_ended = threading.Event()
        self.errors: list[BaseException] = []
        self.threads: list[threading.Thread] = []

    # --- turns -------------------------------------------------------------------------------------------------

    def run(self, work: Callable[[Link], T]) -> list[T]:
        callers = _RandomState()
        jobs = [self.start(rank, 0.0, self._member_job(rank, work)) for rank in self.members]
        self._next()
        while not self.all_ended.wait(timeout=0.2):  # a time limit keeps the main thread open to Ctrl-C
            pass
        for thread in self.threads:  # a thread that is still ending when the process does would abort it
            thread.join()
        callers.swap_in()
        if self.errors:
            raise next((error for error in self.errors if not isinstance(error, PeerLost)), self.errors[0])
        return [cast(T, job.value) for job in jobs]

    def _member_job(self, rank: int, work: Callable[[Link], T]) -> Callable[[], T]:
        def job() -> T:
            why = "it ended"
            try:
                return work(_LocalLink(self, rank))
            except BaseException as error:
                why = f"it failed with {type(error).__name__}"
                self.errors.append(error)
                raise
            finally:
                self.left[rank] = why, self.me.time_s
                for actor in list(self.waiting.values()):
                    if rank in actor.awaits and actor.awaits[rank] not in self.mail:
                        self._ask(actor)

        return job

    def start(self, rank: int, time_s: float, job: Callable[[], T]) -> _Job[T]:
        """A new actor; it runs when its turn comes."""
        actor = _Actor(rank, time_s, next(self.numbers))
        heapq.heappush(self.events, (time_s, actor.number, actor))
        handle = _Job[T](self, actor)

        def body() -> None:
            actor.turn.acquire()
            actor.random.swap_in()
            self.local.actor = actor
            try:
                handle.value = job()
            except BaseException as error:
                handle.error = error
            actor.ended = True
            for waiter in handle.waiters:
                self._ask(waiter)
            self._next()

        thread = threading.Thread(target=body, name=f"member {rank}", daemon=True)
        if len(self.threads) > 2 * len(self.events) + 2 * len(self.waiting) + 64:
            self.threads = [each for each in self.threads if each.is_alive()]
        self.threads.append(thread)
        thread.start()
        return handle

    def _next(self) -> None:
        """Hand the turn to the runnable actor with the smallest time."""
        actor = self._choose()
        if actor is None:
            self.all_ended.set()
            return
        actor.turn.release()

    def _choose(self) -> _Actor | None:
        while self.events:
            at, _, event = heapq.heappop(self.events)
            if isinstance(event, _Actor):
                event.time_s = max(event.time_s, at)
                return event
            self._land(event, at)
        if not self.waiting:
            return None
        # Everybody waits for somebody: the first time limit to run out decides.
        actor = min(self.waiting.values(), key=lambda actor: (actor.deadline_s, actor.number))
        del self.waiting[actor.number]
        actor.timed_out, actor.time_s = True, max(actor.time_s, actor.deadline_s)
        return actor

    def _ask(self, actor: _Actor) -> None:
        """Something happened that may let a waiting actor go on."""
        if actor.number in self.waiting and (at := actor.waits_for()) is not None:
            del self.waiting[actor.number]
            heapq.heappush(self.events, (at, actor.number, actor))

    def pause(self, *, until: Callable[[], float | None], limit_s: float) -> bool:
        """Give the turn away until `until` gives a time; returns False if the time limit ran out first.

        It is asked now, when the last missing message is sent, a member ends or a job that it is a waiter of does.
        """
        actor = self.me
        actor.waits_for, actor.deadline_s, actor.timed_out = until, actor.time_s + limit_s, False
        self.waiting[actor.number] = actor
        self._ask(actor)
        chosen = self._choose()
        if chosen is not actor:
            assert chosen is not None
            actor.random = _RandomState()
            chosen.turn.release()
            actor.turn.acquire()
            actor.random.swap_in()
        return not actor.timed_out

    @property
    def me(self) -> _Actor:
        actor: _Actor = self.local.actor
        return actor

    # --- the network -------------------------------------------------------------------------------------------

    def send(self, channel: int, turn: int, to: int, buffer: Tensor) -> None:
        address = channel, turn, self.me.rank, to
        first, last = self.wires.leave(address, buffer.numel(), self.me.time_s)
        message = self.mail[address] = _Message(address, buffer, last)
        heapq.heappush(self.events, (first, next(self.numbers), message))

    def _land(self, message: _Message, first: float) -> None:
        """The first bit is at the receiver's down-link: from here on it is known when the last one will be there."""
        message.due = self.wires.arrive(message.address[3], message.buffer.numel(), first, message.due)
        message.landed, message.first = True, first
        receiver = self.awaited.pop(message.address, None)
        if receiver is not None:
            del receiver.awaits[message.address[2]]
            if not receiver.awaits:
                self._ask(receiver)

    def receive(self, channel: int, turns: Mapping[int, int], what: str, timings: Timings) -> dict[int, Tensor]:
        actor, mail = self.me, self.mail
        keys = {rank: (channel, turn, rank, actor.rank) for rank, turn in turns.items()}
        actor.awaits = {rank: key for rank, key in keys.items() if not (key in mail and mail[key].landed)}
        self.awaited.update(dict.fromkeys(actor.awaits.values(), actor))

        def unsent() -> list[int]:
            return [rank for rank, key in actor.awaits.items() if key not in mail]

        def arrived() -> float | None:
            if not actor.awaits:
                return max((mail[key].due for key in keys.values()), default=0.0)
            if not self.left:
                return None
            return min((self.left[rank][1] for rank in unsent() if rank in self.left), default=None)  # learnt at once

        in_time = self.pause(until=arrived, limit_s=self.patience_s)
        if actor.awaits:
            missing = unsent()
            for key in actor.awaits.values():
                del self.awaited[key]
            actor.awaits = {}
            gone = [rank for rank in missing if rank in self.left]
            if gone:
                raise PeerLost(gone, during=what, why=self.left[gone[0]][0])
            assert not in_time
            raise PeerLost(missing, during=what, why=f"no answer within {self.patience_s:g} simulated seconds")
        mails = {rank: mail.pop(key) for rank, key in keys.items()}
        for rank, message in mails.items():
            timings.took(rank, message.buffer.numel(), message.due - message.first)
        return {rank: message.buffer.clone() for rank, message in mails.items()}  # others may share it


class _Job(Generic[T]):
    """A handle on an actor."""

    def __init__(self, simulation: _Simulation, actor: _Actor) -> None:
        self._simulation, self._actor = simulation, actor
        self.value: T | None = None
        self.error: BaseException | None = None
        self.waiters: list[_Actor] = []

    def done(self) -> bool:
        return self._actor.ended and self._actor.time_s <= self._simulation.me.time_s

    def wait(self) -> T:
        def ended() -> float | None:
            return self._actor.time_s if self._actor.ended else None

        self.waiters.append(self._simulation.me)
        self._simulation.pause(until=ended, limit_s=math.inf)
        if self.error is not None:
            raise self.error
        return cast(T, self.value)


class _LocalChannel:
    def __init__(self, link: _LocalLink, number: int, purpose: str) -> None:
        self._simulation, self._meter, self._timings = link.simulation, link.meter, link.timings
        self._number, self._purpose = number, purpose
        self._sent: Counter[int] = Counter()
        self._received: Counter[int] = Counter()

    def exchange(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, int], what: str) -> dict[int, Tensor]:
        copies = {id(buffer): buffer.clone() for buffer in outgoing.values()}  # one that goes to all is copied once
        for rank, buffer in outgoing.items():
            self._simulation.send(self._number, self._sent[rank], rank, copies[id(buffer)])
        turns = {rank: self._received[rank] for rank in incoming}
        arrived = self._simulation.receive(self._number, turns, what, self._timings)
        self._sent.update(outgoing.keys())
        self._received.update(incoming.keys())
        self._meter.count(
            self._purpose,
            sent_bytes=sum(buffer.numel() for buffer in outgoing.values()),
            received_bytes=sum(buffer.numel() for buffer in arrived.values()),
            messages_sent=len(outgoing),
        )
        return arrived


@dataclass
class _LocalLink:
    simulation: _Simulation
    rank: int
    meter: Meter = field(default_factory=Meter)
    timings: Timings = field(default_factory=lambda: Timings(least_bytes=SMALL_BYTES + 1))
    opened: int = 0

    @property
    def members(self) -> tuple[int, ...]:
        return self.simulation.members

    def open(self, purpose: str) -> _LocalChannel:
        number, self.opened = self.opened, self.opened + 1
        return _LocalChannel(self, number, purpose)

    def spawn(self, job: Callable[[], T], name: str) -> _Job[T]:
        return self.simulation.start(self.rank, self.now(), job)

    def now(self) -> float:
        return self.simulation.me.time_s

    def local_step(self) -> None:
        due = self.now() + self.simulation.step_s[self.rank]
        self.simulation.pause(until=lambda: due, limit_s=math.inf)

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
