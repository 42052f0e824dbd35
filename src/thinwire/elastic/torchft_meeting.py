"""Meetings by torchft's Manager at a lighthouse: who is there, and a group among exactly these.

Of torchft the quorum is used, and that it configures our process group; nothing else. Its healing is off
(`allow_heal=False`, and a transport that refuses), its steps are not the model's: a member's step is the number of the
gathering it is in, one more if that one broke. The lighthouse hands on everybody's largest, so all find alike

    number = largest step              the gathering holds: it has that number and the same names
    number = largest step + 1          else: a new one

whatever the quorum ids are, which begin anew with a lighthouse that is restarted and then fit groups they do not mean.

When the lighthouse cannot be reached, members go on to the next place on a list that is the same for all: those given,
then the standby lighthouses of the last gathering's members by rank, round and round. What keeps two groups from going
on at two places is the rule in rendezvous.py, not the lighthouse.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import replace
from typing import TYPE_CHECKING

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from thinwire.elastic.lighthouse import Lookout, serve, split
from thinwire.elastic.meeting import Gathering
from thinwire.elastic.rendezvous import Card, NotFormed, base_after, connected, form
from thinwire.elastic.sentry import Sentry
from thinwire.elastic.servers import Server, compiled
from thinwire.elastic.settings import Limits
from thinwire.errors import ConfigError, LinkError, MeetingLost
from thinwire.links.crew import Crew
from thinwire.links.joining import address_towards
from thinwire.links.torch import TELL_AFTER_S, Pace, TorchLink, first_line

if TYPE_CHECKING:
    from thinwire.elastic.asking import Asker

_log = logging.getLogger("thinwire")

_LOOK_S = 1.0  # how often the lighthouse is looked at while we wait there
_PAUSE_S = 0.5  # between asks that were refused
_FRESH_HEART = 0.5  # of heartbeat_s: younger ones count as beating in what is told
_PERIODS = 20  # rounds that the longest is taken of
_BROKEN_TIMES = 3  # failures to connect after which those who cannot reach one another are told apart
_FIRST_SHUN_S, _LONGEST_SHUN_S = 30.0, 600.0
_NAME = re.compile(r"[A-Za-z0-9._-]+")


class TorchftMeeting:
    """One member's way to the others; see thinwire.elastic.meeting.Meeting for the contract."""

    def __init__(
        self,
        addresses: str | Sequence[str],
        *,
        name: str | None = None,
        host: str | None = None,
        at_least: int = 1,
        founds: bool = True,
        timeout_s: float | None = None,
        limits: Limits | None = None,
        standby_port: int = 0,
    ) -> None:
        """
        addresses     "HOST:PORT" of the run's lighthouse, or several in order of trial, the same on all members
        name          begins this member's name; process and life are added. By default the machine's
        host          this machine's address as the others see it; by default the one that leads to the lighthouse
        at_least      members without whom no gathering forms, wherever
        founds        with others who were in no gathering it begins a run; False: it waits for one that is there
        timeout_s     one override for the time limits of exchanges, as in `thinwire.join`
        limits        of membership; the round period in them is measured and need not be given
        standby_port  of this member's standby lighthouse; 0 takes a free one
        raises        ConfigError for a request that cannot be met
        """
        compiled()
        given = (addresses,) if isinstance(addresses, str) else tuple(addresses)
        self._given = tuple(":".join(map(str, split(address))) for address in given)
        if not self._given:
            raise ConfigError("no address of a lighthouse", expected="one or several HOST:PORT", mend="name the run's")
        if name is not None and not _NAME.fullmatch(name):
            raise ConfigError(
                f"name {name!r}", expected="letters, digits, '.', '_' and '-'", mend="name it by its machine"
            )
        if at_least < 1:
            raise ConfigError(f"at least {at_least} members", expected="1 or more", mend="leave it out for 1")
        self._host = host or address_towards(split(self._given[0])[0]) or "127.0.0.1"
        # Digits at the end: torchft reads them as a number.
        self._name = f"{name or _machine()}-{os.getpid()}-{secrets.randbelow(10**9):09d}"
        self._at_least, self._founds, self._timeout_s = at_least, founds, timeout_s
        self._limits = limits or Limits()
        self._crew = Crew()
        try:
            self._standby = serve(f"{self._host}:{standby_port}", limits=self._limits)
            self._store = TCPStore(self._host, 0, is_master=True, wait_for_workers=False)
        except (LinkError, RuntimeError) as error:
            raise ConfigError(
                f"this machine cannot be reached at {self._host}: {first_line(error)}",
                expected="an address of this machine, as the other members see it",
                mend="give host=ADDRESS (--host), and a free standby port",
            ) from error
        self._at: _At | None = None  # the lighthouse we are connected with
        self._turn = 0  # of which candidate
        self._candidates = self._given
        self._held: Gathering | None = None
        self._link: TorchLink | None = None
        self._sentry: Sentry | None = None
        self._last: tuple[int, tuple[str, ...], str] = (0, (), "")  # number, names, where: of the last that formed
        self._base: tuple[str, ...] = ()
        self._rates: dict[str, float] = {}  # bytes per second with each member that was in a group with this one
        self._step = -1
        self._returned_at: float | None = None
        self._periods: deque[float] = deque(maxlen=_PERIODS)
        self._broken_times, self._shun_s = 0, _FIRST_SHUN_S

    @property
    def name(self) -> str:
        return self._name

    @property
    def lighthouse(self) -> str:
        """Where we meet now, "HOST:PORT": what a newcomer must be told."""
        return self._candidates[self._turn]

    @property
    def candidates(self) -> tuple[str, ...]:
        """All places where we may meet, in order of trial: what a newcomer had better be told."""
        return self._candidates

    @property
    def limits(self) -> Limits:
        """The time limits as they are now."""
        return self._limits

    def meet(self, *, broken: bool = False) -> Gathering:
        if self._returned_at is not None:
            self._periods.append(time.monotonic() - self._returned_at)
            self._limits = replace(self._limits, period_s=max(1e-3, *self._periods))
        if broken:
            self._part("something failed in it")
        until = time.monotonic() + self._limits.meeting_s
        waiting = _Waiting(until, self._last[1], self._name)
        if self._at is not None:
            self._at.heart.live_for(self._limits.meeting_s + self._limits.heart_s)
        while (now := time.monotonic()) < until:
            if self._at is None and not self._reach(until - now, waiting):
                continue
            try:
                gathering = self._ask(until, waiting)
            except _Gone as gone:
                waiting.why = f"the lighthouse at {self.lighthouse} is gone: {gone}"
                self._leave_lighthouse()
            except NotFormed as failure:
                self._part("no group formed")
                self._after(failure, until, waiting)
            else:
                assert self._at is not None
                self._at.accepted()
                self._at.heart.live_for(self._limits.heart_s)
                self._returned_at = time.monotonic()
                self._broken_times, self._shun_s = 0, _FIRST_SHUN_S
                return gathering
        raise MeetingLost(
            f"no group formed within {self._limits.meeting_s:.0f} s: {waiting.refused or waiting.why}",
            expected=f"a lighthouse at {' or '.join(self._candidates)}, and enough members there",
            mend="see whether they run and can be reached from here (`thinwire doctor ADDRESS`); "
            "what was committed is kept, and one may ask again",
        )

    def now(self) -> float:
        return time.perf_counter()

    def close(self) -> None:
        self._leave_lighthouse()
        if self._link is not None:
            self._link.close()
        self._part("this member left")
        self._standby.stop()
        self._crew.close()

    def _part(self, why: str) -> None:
        """End the gathering that holds: its sockets close, so that nobody waits for us in it."""
        if self._sentry is not None:
            self._sentry.end()
        if self._link is not None:
            if self._held is not None:
                names = self._held.names
                self._rates |= {names[rank]: rate for rank, rate in self._link.pace.rates.items()}
                self._limits = replace(self._limits, exchange_s=self._link.pace.longest_wait_s)
            self._link.cut(why)
            self._link.close()
        self._held = self._link = self._sentry = None

    def _reach(self, left_s: float, waiting: _Waiting) -> bool:
        """Connect with the candidate whose turn it is; if that fails, the next one's turn comes."""
        address = self._candidates[self._turn]
        # The others come back to where we met; all who lost a lighthouse for a moment should not scatter.
        patience_s = self._limits.heartbeat_s if address == self._last[2] else 0.0
        start = time.monotonic()
        lookout = Lookout(address)
        while lookout.hearts() is None and time.monotonic() - start < min(patience_s, left_s):
            time.sleep(_PAUSE_S)
            lookout = Lookout(address)
        try:
            if lookout.hearts() is None:
                raise LinkError(f"nothing answers at {address}", expected="a lighthouse", mend="start it")
            self._at = _At(address, lookout, self._new_heart(address, left_s), self._new_asker)
            return True
        except LinkError as error:
            lookout.close()
            waiting.why = f"the lighthouse at {address} cannot be reached: {error.wrong}"
            waiting.tell(None)
            self._next()
            time.sleep(min(_PAUSE_S, left_s))
            return False

    def _new_heart(self, address: str, left_s: float) -> Server:
        limit_s = min(self._limits.connect_s, left_s)
        store = f"{self._host}:{self._store.port}"
        heart = Server(
            "heart", limit_s=limit_s + 5.0, replica_id=self._name, lighthouse=address, store=store, connect_s=limit_s,
            beat_s=self._limits.heartbeat_s / 20,
        )  # fmt: skip
        heart.live_for(self._limits.meeting_s + self._limits.heart_s)
        return heart

    def _new_asker(self, heart: Server) -> Asker:
        from thinwire.elastic.asking import Asker

        return Asker(
            heart.address, self._name, self._host, self._store, self._limits.meeting_s, self._limits.connect_s,
            self._holds, self._form,
        )  # fmt: skip

    def _holds(self, number: int, names: tuple[str, ...]) -> bool:
        if self._held is None or (self._held.number, self._held.names) != (number, names):
            return False
        return self.lighthouse == self._last[2] or self._base == names  # else: whether it may go on here is asked

    def _ask(self, until: float, waiting: _Waiting) -> Gathering:
        """One quorum. Raises _Gone if the lighthouse or the heart went meanwhile, NotFormed if no group came of it."""
        at = self._at
        assert at is not None
        if not at.heart.alive():
            raise _Gone("this member's heart was stopped")
        asker = at.asker()
        step = self._step + (self._held is None)
        asked = self._crew.do(lambda: asker.ask(step, max(0.1, until - time.monotonic())))
        self._watch(asked, at, asker, waiting)
        if isinstance(error := asked.exception(), (RuntimeError, TimeoutError)):
            raise _Gone(first_line(error)) from error
        asked.result()
        if asker.failure is not None:
            raise asker.failure
        assert self._held is not None
        return self._held

    def _watch(self, asked: Future[None], at: _At, asker: Asker, waiting: _Waiting) -> None:
        """Until the ask has ended, look whether there is still somebody who may answer."""
        while not wait_for([asked], _LOOK_S).done:
            if asker.busy:
                continue
            heard = at.lookout.hearts()
            waiting.tell(heard, self._limits.heartbeat_s)
            if not at.heart.alive() or (heard is None and not asker.busy):
                at.heart.stop()  # the call ends with it
                wait_for([asked], self._limits.connect_s)
                raise _Gone("its connection ended" if heard is None else "this member's heart was stopped")

    def _form(self, store: str, rank: int, number: int, names: tuple[str, ...]) -> None:
        """Torchft's thread: leave the gathering that was, form the one that is."""
        self._part("the group changed")
        self._step = number  # whether or not it forms: the next attempt has another number, and so another prefix
        place = self.lighthouse
        last_number, last_names, last_place = self._last
        mine = Card(
            self._name, self._standby.address, last_number, last_names, last_place == place, self._at_least,
            self._founds, self._base,
        )  # fmt: skip
        cards, group = form(store, rank, names, mine, self._host, self._limits.connect_s)
        known = {rank: self._rates[card.name] for rank, card in enumerate(cards) if card.name in self._rates}
        self._link = TorchLink(group, "gloo", self._timeout_s, pace=Pace(known))
        self._held = Gathering(number, tuple(card.name for card in cards), self._link)
        others = tuple(name for name in self._held.names if name != self._name)
        self._sentry = Sentry(place, others, self._link, self._limits.heartbeat_s)
        self._last, self._base = (number, self._held.names, place), base_after(cards)
        self._candidates = tuple(dict.fromkeys((*self._given, place, *(card.standby for card in cards))))
        self._turn = self._candidates.index(place)

    def _after(self, failure: NotFormed, until: float, waiting: _Waiting) -> None:
        """What follows from an attempt that failed: ask again, look elsewhere, or leave the others to themselves."""
        waiting.why = str(failure)
        waiting.tell(None)
        if failure.refused:
            waiting.refused = str(failure)
            assert self._at is not None
            # Unlike on all members, lest two that look for each other change places for ever.
            patience_s = self._limits.heartbeat_s * (1 + secrets.randbelow(100) / 100)
            if len(self._candidates) > 1 and self._at.refused_for_s() > patience_s:
                self._leave_lighthouse()
                self._next()
            time.sleep(min(_PAUSE_S, max(0.0, until - time.monotonic())))
            return
        time.sleep(min(_PAUSE_S, max(0.0, until - time.monotonic())))
        self._broken_times += 1
        if self._broken_times >= _BROKEN_TIMES and failure.unreachable:
            self._broken_times = 0
            self._shun(failure, until)

    def _shun(self, failure: NotFormed, until: float) -> None:
        """Some pairs cannot talk: those outside the largest set that can let the others go on, for a while."""
        assert self._at is not None
        names = self._at.asker().names
        told = "; ".join(f"{name} cannot reach {', '.join(others)}" for name, others in failure.unreachable.items())
        if self._name in connected(names, failure.unreachable):
            _log.warning("%s: going on without those who are cut off", told)
            return
        _log.warning("%s: this member stays away for %.0f s", told, self._shun_s)
        self._leave_lighthouse()
        time.sleep(min(self._shun_s, max(0.0, until - time.monotonic())))
        self._shun_s = min(2 * self._shun_s, _LONGEST_SHUN_S)

    def _next(self) -> None:
        self._turn = (self._turn + 1) % len(self._candidates)

    def _leave_lighthouse(self) -> None:
        if self._at is not None:
            self._at.close()
        self._at = None


def _machine() -> str:
    """This machine's name, as far as a member's may have it."""
    return "".join(letter if _NAME.fullmatch(letter) else "-" for letter in socket.gethostname()) or "member"


class _Gone(Exception):
    """Whoever was to answer went."""


class _At:
    """Being at a lighthouse: the connection that tells whether it is there, the heart it hears, who asks it."""

    def __init__(self, address: str, lookout: Lookout, heart: Server, make: Callable[[Server], Asker]) -> None:
        self.address, self.lookout, self.heart = address, lookout, heart
        self._make = make
        self._asker: Asker | None = None
        self._refused_since: float | None = None

    def asker(self) -> Asker:
        if self._asker is None:
            self._asker = self._make(self.heart)
        return self._asker

    def refused_for_s(self) -> float:
        """Since it refused us for the first time; to be called when it did."""
        self._refused_since = self._refused_since or time.monotonic()
        return time.monotonic() - self._refused_since

    def accepted(self) -> None:
        self._refused_since = None

    def close(self) -> None:
        self.heart.stop()
        self.lookout.close()
        if self._asker is not None:
            self._asker.close()


class _Waiting:
    """What a meeting waits for, said every five seconds."""

    def __init__(self, until: float, names: tuple[str, ...], mine: str) -> None:
        self.why = "nobody was asked"
        self.refused = ""  # why those who came together did not go on: more to the point than who was not reached since
        self._until, self._others = until, [name for name in names if name != mine]
        self._told = time.monotonic()

    def tell(self, heard: dict[str, float] | None, heartbeat_s: float = 5.0) -> None:
        """heard: whose hearts the lighthouse has heard, name -> seconds ago; None: say why nothing is waited for."""
        if heard is not None:
            beating = [name for name in self._others if heard.get(name, 1e9) <= _FRESH_HEART * heartbeat_s]
            silent = [name for name in self._others if name not in beating]
            others = [
                f"{told}: {', '.join(names)}"
                for told, names in (("still computing", beating), ("not heard", silent))
                if names
            ]
            self.why = "waiting for others to come" + (f" ({'; '.join(others)})" if others else "")
        if (now := time.monotonic()) - self._told >= TELL_AFTER_S:
            self._told = now
            _log.warning("meeting: %s (gives up in %.0f s)", self.why, max(0.0, self._until - now))
