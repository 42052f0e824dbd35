"""Threads that take turns under a simulated clock: the stage of every simulation.

Each actor carries a simulated time, and only one of them runs at a time; whenever it waits or ends, the runnable one
with the smallest time goes next. Events without a thread (a message lands, a fault strikes) have their turn likewise,
and a wait that reaches its time limit ends there. So the order of events is the same in every run.

Actors belong to owners: a member and the jobs beside its compute have one. An owner can be ended, which is what a crash
is to a process: its actors go no further than the wait that they are in. It can be held, which is what SIGSTOP is.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import threading
from collections.abc import Callable
from typing import Generic, TypeVar, cast

import numpy as np
import torch

T = TypeVar("T")


class Killed(BaseException):
    """The owner was ended: what its actors meet in place of whatever they wait for. Not for anyone to catch."""


class RandomState:
    """The global generators as one member sees them: members of one process must not draw from each other's."""

    def __init__(self) -> None:
        self.torch, self.python, self.numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()

    def swap_in(self) -> None:
        torch.set_rng_state(self.torch)
        random.setstate(self.python)
        np.random.set_state(self.numpy)


class Actor:
    """A thread that takes turns."""

    def __init__(self, owner: int, time_s: float, number: int, random: RandomState) -> None:
        self.owner, self.time_s, self.number = owner, time_s, number
        self.turn = threading.Semaphore(0)
        self.waits = 0  # how often it has; tells the time limit of one wait from that of another
        self.waits_for: Callable[[], float | None] = lambda: None  # when it can go on, None: not yet
        self.timed_out = False
        self.ended = False
        self.random = random


class Actors:
    """Everybody's turns."""

    def __init__(self) -> None:
        self.numbers = itertools.count()
        self.waiting: dict[int, Actor] = {}  # by number
        self._events: list[tuple[float, int, Actor | Callable[[float], None]]] = []  # a heap: when, order, what
        self._limits: list[tuple[float, int, int]] = []  # a heap: when a wait ends, whose, which of its waits
        self._dead: set[int] = set()
        self._held: dict[int, float] = {}  # owner -> until when
        self._local = threading.local()
        self._all_ended = threading.Event()
        self._threads: list[threading.Thread] = []

    def run(self) -> None:
        """Give turns until every actor has ended."""
        callers = RandomState()
        self._next()
        while not self._all_ended.wait(timeout=0.2):  # a time limit keeps the main thread open to Ctrl-C
            pass
        for thread in self._threads:  # a thread that is still ending when the process does would abort it
            thread.join()
        callers.swap_in()

    @property
    def me(self) -> Actor:
        """Whose turn it is."""
        actor: Actor = self._local.actor
        return actor

    def start(self, owner: int, time_s: float, job: Callable[[], T], random: RandomState | None = None) -> Job[T]:
        """A new actor; it runs when its turn comes, and draws as from `random` on, or from where its starter is."""
        actor = Actor(owner, time_s, next(self.numbers), random or RandomState())
        heapq.heappush(self._events, (time_s, actor.number, actor))
        handle = Job[T](self, actor)

        def body() -> None:
            actor.turn.acquire()
            actor.random.swap_in()
            self._local.actor = actor
            try:
                self.go_on()
                handle.value = job()
            except BaseException as error:
                handle.error = error
            actor.ended = True
            for waiter in handle.waiters:
                self.ask(waiter)
            self._next()

        thread = threading.Thread(target=body, name=f"member {owner}", daemon=True)
        if len(self._threads) > 2 * len(self._events) + 2 * len(self.waiting) + 64:
            self._threads = [each for each in self._threads if each.is_alive()]
        self._threads.append(thread)
        thread.start()
        return handle

    def at(self, time_s: float, event: Callable[[float], None]) -> None:
        """Call `event(time)` when its turn comes. It runs in whatever thread has just given its turn away."""
        heapq.heappush(self._events, (time_s, next(self.numbers), event))

    def pause(self, *, until: Callable[[], float | None], limit_s: float) -> bool:
        """Give the turn away until `until` gives a time; returns False if the time limit ran out first.

        It is asked now, whenever somebody calls `ask` for this actor, and when a job that it is a waiter of ends.
        """
        self.go_on()
        actor = self.me
        actor.waits_for, actor.timed_out, actor.waits = until, False, actor.waits + 1
        self.waiting[actor.number] = actor
        self.ask(actor)
        if actor.number in self.waiting:
            heapq.heappush(self._limits, (actor.time_s + limit_s, actor.number, actor.waits))
        chosen = self._choose()
        if chosen is not actor:
            assert chosen is not None
            actor.random = RandomState()
            chosen.turn.release()
            actor.turn.acquire()
            actor.random.swap_in()
        self.go_on()
        return not actor.timed_out

    def ask(self, actor: Actor) -> None:
        """Something happened that may let a waiting actor go on."""
        if actor.number in self.waiting and (at := actor.waits_for()) is not None:
            del self.waiting[actor.number]
            heapq.heappush(self._events, (at, actor.number, actor))

    def go_on(self) -> None:
        """raises  Killed if the owner of the actor whose turn it is was ended"""
        if self.me.owner in self._dead:
            raise Killed

    def end(self, owner: int, time_s: float) -> None:
        """The owner's actors go no further."""
        self._dead.add(owner)
        for actor in [actor for actor in self.waiting.values() if actor.owner == owner]:
            del self.waiting[actor.number]
            heapq.heappush(self._events, (time_s, actor.number, actor))

    def hold(self, owner: int, until_s: float) -> None:
        """The owner's actors do nothing until then; what they wait for happens all the same."""
        self._held[owner] = until_s

    def _next(self) -> None:
        """Hand the turn to the runnable actor with the smallest time."""
        actor = self._choose()
        if actor is None:
            self._all_ended.set()
            return
        actor.turn.release()

    def _choose(self) -> Actor | None:
        while True:
            limit = self._first_limit()
            if limit is not None and (not self._events or limit[0] < self._events[0][0]):
                at, number, _ = heapq.heappop(self._limits)
                actor = self.waiting[number]
                if (until := self._held_until(actor, at)) is not None:
                    heapq.heappush(self._limits, (until, number, actor.waits))
                    continue
                del self.waiting[number]
                actor.timed_out, actor.time_s = True, max(actor.time_s, at)
                return actor
            if not self._events:
                return None
            at, number, event = heapq.heappop(self._events)
            if not isinstance(event, Actor):
                event(at)
            elif (until := self._held_until(event, at)) is not None:
                heapq.heappush(self._events, (until, number, event))
            else:
                event.time_s = max(event.time_s, at)
                return event

    def _first_limit(self) -> tuple[float, int, int] | None:
        while self._limits:
            at, number, waits = self._limits[0]
            actor = self.waiting.get(number)
            if actor is not None and actor.waits == waits:
                return at, number, waits
            heapq.heappop(self._limits)
        return None

    def _held_until(self, actor: Actor, at: float) -> float | None:
        until = self._held.get(actor.owner, at)
        return until if until > at and actor.owner not in self._dead else None


class Job(Generic[T]):
    """A handle on an actor."""

    def __init__(self, actors: Actors, actor: Actor) -> None:
        self._actors, self._actor = actors, actor
        self.value: T | None = None
        self.error: BaseException | None = None
        self.waiters: list[Actor] = []

    def done(self) -> bool:
        return self._actor.ended and self._actor.time_s <= self._actors.me.time_s

    def wait(self) -> T:
        def ended() -> float | None:
            return self._actor.time_s if self._actor.ended else None

        self.waiters.append(self._actors.me)
        self._actors.pause(until=ended, limit_s=math.inf)
        if self.error is not None:
            raise self.error
        return cast(T, self.value)
