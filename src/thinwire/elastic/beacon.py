"""A lighthouse in simulated time: it hears hearts beat and requests, and answers by torchft's rules (quorum.py).

What is said to it takes no time. Where there is no way to it, nothing is heard: a heartbeat that would have been sent
then is missing, a request is made again later, and an answer may miss whom it is for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol

from thinwire.elastic.quorum import Quorum, Request, quorum
from thinwire.elastic.schedules import LIGHTHOUSE, Cut, Plan, Stop, host_of
from thinwire.links.actors import Actor, Actors

_ASK_AGAIN_S = 2.0  # without an answer a member asks again: the lighthouse may have been restarted
_NOT_REACHED = "the lighthouse is not reached"


class Heart(Protocol):
    """Whose heart beats: a process."""

    @property
    def name(self) -> str: ...
    @property
    def began_s(self) -> float: ...
    @property
    def ended_s(self) -> float: ...


class Beacon:
    """The lighthouse.

    is_cut  (here, there, now) -> whether nothing passes between two hosts
    hearts  everybody
    reason  name -> why it had no answer when it last asked
    """

    def __init__(self, plan: Plan, actors: Actors, is_cut: Callable[[str, str, float], bool],
                 hearts: Callable[[], Iterable[Heart]]) -> None:  # fmt: skip
        self.plan, self.actors, self.is_cut, self.hearts = plan, actors, is_cut, hearts
        self.reason: dict[str, str] = {}
        self._up, self._up_since_s = True, 0.0
        self._previous: Quorum | None = None
        self._requests: dict[str, Request] = {}
        self._asked_s: dict[str, float] = {}  # a request is a heartbeat too
        self._waiting: dict[str, Actor] = {}  # who is on the line
        self._answers: dict[str, tuple[Quorum, float]] = {}  # and since when
        self._ticks = False
        self._silent = {life.name: _silences(plan, life.name) for life in plan.lives}

    def ask(self, name: str, *, failed: bool, limit_s: float) -> Quorum | None:
        """Wait for the next quorum with this process in it; None: none in time."""
        give_up_s = self.actors.me.time_s + limit_s
        while (now := self.actors.me.time_s) < give_up_s:
            self.reason[name] = _NOT_REACHED
            if self._reached_from(name, now):
                self._request(name, failed, now)
            again_s = min(_ASK_AGAIN_S, give_up_s - now)
            self.actors.pause(until=lambda: self._answers[name][1] if name in self._answers else None, limit_s=again_s)
            self._waiting.pop(name, None)
            if name in self._answers:
                return self._answers.pop(name)[0]
        return None

    def go_down(self, now: float) -> None:
        self._up, self._previous = False, None
        self._requests, self._asked_s = {}, {}

    def come_up(self, now: float) -> None:
        self._up, self._up_since_s = True, now

    def hang_up(self, name: str) -> None:
        """A process is no more. What it asked is not forgotten."""
        self._waiting.pop(name, None)

    def _request(self, name: str, failed: bool, now: float) -> None:
        since_s = self._requests[name].since_s if name in self._requests else now
        self._requests[name] = Request(since_s, failed=failed)
        self._asked_s[name] = now
        self._waiting[name] = self.actors.me
        self._look(now)
        if not self._ticks:
            self._ticks = True
            self.actors.at(now + self.plan.tick_s, self._tick)

    def _reached_from(self, name: str, now: float) -> bool:
        return self._up and not self.is_cut(host_of(name), LIGHTHOUSE, now)

    def _tick(self, now: float) -> None:
        """It looks again as long as somebody waits who is not stopped; who goes on asks again."""
        self._ticks = any(not self._is_silent(name, now) for name in self._waiting)
        if self._ticks:
            self._look(now)
            self.actors.at(now + self.plan.tick_s, self._tick)

    def _look(self, now: float) -> None:
        if not self._up:
            return
        beats = {heart.name: self._beat_s(heart, now) for heart in self.hearts()}
        heard = {name: beat_s for name, beat_s in beats.items() if beat_s is not None}
        for name, asked_s in self._asked_s.items():
            heard[name] = max(heard.get(name, asked_s), asked_s)
        found = quorum(heard, self._requests, self._previous, self.plan.rules, now)
        reached = [name for name in self._waiting if self._reached_from(name, now)]
        if isinstance(found, str):
            self.reason.update(dict.fromkeys(reached, found))
            return
        unheard, self._previous, self._requests = self._requests, found, {}
        for name in reached:
            if name in found.names:
                self._answers[name] = found, now
                self.actors.ask(self._waiting[name])
            elif name in unheard:
                self._requests[name] = replace(unheard[name], since_s=now)

    def _is_silent(self, name: str, now: float) -> bool:
        return any(since_s <= now < until_s for since_s, until_s in self._silent[name])

    def _beat_s(self, heart: Heart, now: float) -> float | None:
        """When the last heartbeat was heard: the n-th is due n intervals after the beginning."""
        every = self.plan.heartbeat_s
        if heart.began_s > now:
            return None
        n = math.floor((min(now, heart.ended_s) - heart.began_s) / every)
        while n >= 0 and (at := heart.began_s + n * every) >= self._up_since_s:
            silence = next((each for each in self._silent[heart.name] if each[0] <= at < each[1]), None)
            if silence is None:
                return at
            n = min(n - 1, math.floor((silence[0] - heart.began_s) / every))
        return None


def _silences(plan: Plan, name: str) -> list[tuple[float, float]]:
    """When no heartbeat of a life reaches the lighthouse, though it lives."""
    stops = [fault for fault in plan.faults if isinstance(fault, Stop) and fault.who == name]
    cuts = [fault for fault in plan.faults if isinstance(fault, Cut) and fault.is_between(host_of(name), LIGHTHOUSE)]
    return [(stop.from_s, stop.until_s) for stop in stops] + [(cut.from_s, cut.until_s) for cut in cuts]
