"""A key-value store in virtual time: members are generators, messages take random times, anybody may die anywhere."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from thinwire.seeds.closed import Closed
from thinwire.seeds.elastic import Member
from thinwire.seeds.programs import Add, Clock, Delete, Gather, Put, Swap
from thinwire.seeds.standing import Pace

QUICK = Pace(factor=4.0, least_s=1.0, most_s=20.0)
FACTS = {"recipe": "r", "base": "b", "version": "v"}


@dataclass(frozen=True)
class Think:
    """Seconds of a member's own work; it does not live to see the end of infinitely many."""

    seconds: float


@dataclass
class Actor:
    life: Generator[Any, Any, Any]
    dies_after: float = float("inf")  # operations; the last one is on its way when it dies
    operations: int = 0
    last_arrival: float = 0.0
    dead: bool = False
    ended: bool = False
    missing: set[str] = field(default_factory=set)
    waits: int = 0  # number of the Gather that it waits for


class World:
    """Seconds pass from event to event. Messages of one member arrive in order, as they do on one connection."""

    def __init__(self, seed: int, latency_s: float = 0.05, copies: float = 0.0) -> None:
        self.random = random.Random(seed)
        self.latency_s, self.copies = latency_s, copies
        self.now = 0.0
        self.values: dict[str, bytes] = {}
        self.actors: list[Actor] = []
        self._events: list[tuple[float, int, Callable[[], None], Callable[[], bool]]] = []
        self._number = itertools.count()
        self._waiting: defaultdict[str, list[tuple[Actor, int]]] = defaultdict(list)
        self._asked: dict[int, Gather] = {}

    def start(self, life: Generator[Any, Any, Any], at: float = 0.0, dies_after: float = float("inf")) -> Actor:
        actor = Actor(life, dies_after)
        self.actors.append(actor)
        self._at(at, lambda: self._resume(actor, None))
        return actor

    def run(self, most_s: float) -> None:
        """Until nothing is left to happen; time that grows without bound is an error."""
        while self._events:
            at, _, event, counts = heapq.heappop(self._events)
            if counts():  # time limits of what came in time do not
                self.now = at
                assert at <= most_s, "somebody is still waiting"
                event()
        assert all(actor.ended or actor.dead for actor in self.actors), "somebody waits for ever"

    def _at(self, at: float, event: Callable[[], None], counts: Callable[[], bool] = lambda: True) -> None:
        heapq.heappush(self._events, (at, next(self._number), event, counts))

    def _delay(self) -> float:
        return self.latency_s * self.random.uniform(0.2, 1.8)

    def _resume(self, actor: Actor, answer: Any) -> None:
        while not actor.dead:
            try:
                op = actor.life.send(answer)
            except StopIteration:
                actor.ended = True
                return
            answer = None
            if isinstance(op, Clock):
                answer = self.now
                continue
            if isinstance(op, Think):
                actor.dead = op.seconds == float("inf")
                self._at(self.now + min(op.seconds, 1e3), lambda: self._resume(actor, None))
                return
            actor.operations += 1
            actor.dead = actor.operations >= actor.dies_after
            actor.last_arrival = max(actor.last_arrival, self.now + self._delay())
            self._at(actor.last_arrival, lambda op=op: self._arrive(actor, op))  # type: ignore[misc]
            if not isinstance(op, Put):
                return
            if self.random.random() < self.copies:  # an old message that comes once more, much later
                self._at(self.now + 100 * self._delay(), lambda op=op: self._late(op))  # type: ignore[misc]

    def _late(self, op: Put) -> None:
        if op.key.startswith("s/"):
            self._set(op.key, op.value)

    def _arrive(self, actor: Actor, op: Any) -> None:
        match op:
            case Put():
                self._set(op.key, op.value)
            case Delete():
                self.values.pop(op.key, None)
                self._answer(actor, None)
            case Add():
                total = int(self.values.get(op.key, b"0")) + op.amount
                self.values[op.key] = b"%d" % total
                self._answer(actor, total)
            case Swap():
                now = self.values.get(op.key)
                if now == op.expected or (now is None and not op.expected):
                    self._set(op.key, op.desired)
                self._answer(actor, self.values.get(op.key, op.expected))
            case Gather():
                actor.waits = next(self._number)
                self._asked[id(actor)] = op
                actor.missing = {key for key in op.keys if key not in self.values}
                if not actor.missing or op.limit_s == 0:
                    self._gathered(actor, actor.waits)
                    return
                for key in actor.missing:
                    self._waiting[key].append((actor, actor.waits))
                number = actor.waits
                due = self.now + op.limit_s
                self._at(due, lambda: self._gathered(actor, number), lambda: actor.waits == number and not actor.dead)

    def _set(self, key: str, value: bytes) -> None:
        self.values[key] = value
        for actor, number in self._waiting.pop(key, []):
            actor.missing.discard(key)
            if not actor.missing:
                self._gathered(actor, number)

    def _gathered(self, actor: Actor, number: int) -> None:
        if actor.waits == number and not actor.dead:
            actor.waits = -1
            asked = self._asked[id(actor)]
            self._answer(actor, {key: self.values[key] for key in asked.keys if key in self.values})

    def _answer(self, actor: Actor, answer: Any) -> None:
        self._at(self.now + self._delay(), lambda: self._resume(actor, answer))


def codes_of(number: int, member: int) -> bytes:
    """What a member says in a round, told from its id and the round alone."""
    return bytes([number % 251, member % 251, 7])


@dataclass
class Person:
    """Somebody who trains: what it is, and what it holds in the end."""

    world: World
    until: int
    step_s: Callable[[int], float]
    leaves_at: float = float("inf")
    pace: Pace = QUICK
    at_least: int = 1
    log: list[Closed] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    follows: int = 0

    def life(
        self, founds: bool = False, past: tuple[Closed, ...] = (), keeps: bool = False
    ) -> Generator[Any, Any, None]:
        member = self.member = Member(self.pace, self.at_least)
        if founds:
            yield from member.found(FACTS, past)
            self.log.extend(past)
        else:
            yield from member.meet(FACTS)
        while member.standing.number < min(self.until, self.leaves_at):
            while member.id is None:
                self.follows += 1
                for closed in (yield from member.follow()):
                    self.log.append(closed)
                    yield Think(0.001)
            if member.standing.number >= self.until:
                break
            if not self.ids or self.ids[-1] != member.id:
                self.ids.append(member.id)
            number = member.standing.number
            yield Think(self.step_s(number))
            self.log.append((yield from member.round(number, codes_of(number, member.id), 0.5)))
        yield from member.leave()
        if keeps:
            yield from member.linger()
