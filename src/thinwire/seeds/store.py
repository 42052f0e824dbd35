"""Meetings at a key-value store: who carries the protocol of elastic.py, and what a training loop sees of it.

    with host("203.0.113.7:29500") as meeting:                # on one member's machine
    with attend("203.0.113.7:29500") as meeting:              # on all others, whenever they like
        for closed in meeting.meet(facts):                    # all rounds so far
            replay(closed)
        while meeting.number < rounds:
            for closed in meeting.backlog():                  # none, unless one closed without this member
                replay(closed)
            codes = evaluate(meeting.number, meeting.member)
            replay(meeting.round(meeting.number, codes, lr))

The store is torch.distributed's: TCPStore between machines, HashStore within a process. It lives in the host's process:
when that ends, the run ends for all, as PeerLost; the log that each member holds is the model.

Size   see `traffic`: beside its codes a member says some 130 bytes a round, keys and lengths included, and hears the
       record; who closes the round hears every member's codes and keys instead.
Trust  the store believes whoever reaches it. Use a private network or a tunnel.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed import DistNetworkError, DistStoreError, Store, TCPStore  # type: ignore[attr-defined]

from thinwire.errors import ConfigError, LinkError, PeerLost
from thinwire.links.joining import host_port
from thinwire.links.meter import Meter
from thinwire.links.torch import first_line
from thinwire.seeds.closed import Closed, digest_of
from thinwire.seeds.elastic import Member
from thinwire.seeds.programs import Add, Clock, Delete, Gather, Op, Program, Put, Swap
from thinwire.seeds.standing import USUAL, Pace
from thinwire.version import __version__

T = TypeVar("T")
_log = logging.getLogger("thinwire")

_TELL_AFTER_S = 5.0  # how long a wait stays silent
_OWN = ("rounds", "log", "weights")  # facts of a member, not of the run
_ANSWERS_S = 10.0  # how long the store may take for an answer that waits for nobody


def host(address: str, *, past: Sequence[Closed] = (), at_least: int = 1, pace: Pace = USUAL) -> AtStore:
    """Keep the store of a run here, and be its founder: what it calls `meet` with is what all others must share.

    address   "HOST:PORT" as the others see it; port 0 finds a free one (`meeting.port`). All of the machine's addresses
              are listened on, whatever HOST says
    past      rounds of a log that the run goes on from: those who come replay them too
    at_least  members, this one included, that the first round waits for, for pace.most_s at most
    raises    LinkError if nothing can listen there
    """
    name, port = (address[:-2], 0) if address.endswith(":0") else host_port(address)
    limit = timedelta(seconds=_ANSWERS_S)
    try:
        store = TCPStore(name, port, None, is_master=True, timeout=limit, wait_for_workers=False)
    except (RuntimeError, OSError) as error:
        raise LinkError(
            f"no store can listen at {address}: {first_line(error)}", expected="a free port of this machine",
            mend="name another port, or end what listens on this one",
        ) from error  # fmt: skip
    return AtStore(store, founds=True, past=past, at_least=at_least, pace=pace)


def attend(address: str, *, past: Sequence[Closed] = (), pace: Pace = USUAL) -> AtStore:
    """Come to a run, at any time.

    address  "HOST:PORT" of its host
    past     rounds that this member took in before: they must be the run's, and are not replayed
    raises   LinkError if nobody answers there
    """
    name, port = host_port(address)
    limit = timedelta(seconds=min(pace.most_s, _ANSWERS_S))
    try:
        store = TCPStore(name, port, None, is_master=False, timeout=limit, wait_for_workers=False)
    except (RuntimeError, OSError) as error:
        raise LinkError(
            f"no run answers at {address}: {first_line(error)}", expected="a host that listens there",
            mend=f"start the host first; then try `thinwire doctor {address}` from here",
        ) from error  # fmt: skip
    return AtStore(store, past=past, pace=pace)


class AtStore:
    """A meeting whose members come and go. Used by one thread; leave it at the end of a `with` block.

    meter  bytes of this member at the store
    """

    def __init__(
        self, store: Store, *, founds: bool = False, past: Sequence[Closed] = (), at_least: int = 1, pace: Pace = USUAL
    ) -> None:
        """store: one of torch.distributed that can compare and set, shared by all; it ends with the one that founds."""
        self.meter = Meter()
        self._store, self._founds, self._past = store, founds, tuple(past)
        self._member = Member(pace, at_least)

    @property
    def on_roster(self) -> bool:
        """Whether the open round takes this member's scalars."""
        return self._member.id is not None

    @property
    def member(self) -> int:
        """This member's number on the roster.

        raises  ConfigError while it is not on it
        """
        if self._member.id is None:
            raise ConfigError(
                "this member is not on the roster", expected="one that replayed every round that closed without it",
                mend="replay backlog() before a round: it is empty for those who are in",
            )  # fmt: skip
        return self._member.id

    @property
    def number(self) -> int:
        """Of the round that is open."""
        return self._member.standing.number

    @property
    def roster(self) -> tuple[int, ...]:
        """Members that the open round takes scalars from, ascending."""
        return self._member.standing.roster

    @property
    def port(self) -> int:
        """Where the store listens."""
        assert isinstance(self._store, TCPStore)
        return self._store.port

    def meet(self, facts: Mapping[str, str]) -> Iterator[Closed]:
        """Found the run, or compare with who did.

        facts    what all members share: name -> value; `rounds`, `log` (digest_of `past`) and `weights` may differ from
                 member to member, `version` is added
        returns  the backlog
        raises   ConfigError naming a fact that differs, or if `log` is not `past`; LinkError if nobody founds a run
        """
        held = digest_of(self._past)
        if facts.get("log", held) != held:
            raise ConfigError(
                f"the tuner has not the log of {len(self._past)} rounds that the meeting was given as `past`",
                expected="one log: of the weights that this member holds",
                mend="host or attend(address, past=tuner.log.rounds), after tuner.load_state_dict; or begin both anew",
            )
        told = {"version": __version__, **{name: value for name, value in facts.items() if name not in _OWN}}
        if self._founds:
            self._run(self._member.found(told, self._past), "the founding")
        else:
            self._run(self._member.meet(told), "the meeting")
        return self.backlog()

    def backlog(self) -> Iterator[Closed]:
        """Rounds that closed without this member, until one admits it; nothing while it is on the roster.

        Asking for a round says that those before it are replayed: the last ones come as they close, and admission is
        asked for when there is nothing left to replay.

        raises  ConfigError if `past` is not how the run began
        """
        while not self.on_roster:
            for closed in self._run(self._member.follow(), f"round {self.number}"):
                if closed.number >= len(self._past):
                    yield closed
                elif closed != self._past[closed.number]:
                    raise self._foreign(f"round {closed.number} of this member's log is not the run's")
        if self.number < len(self._past):
            raise self._foreign(f"this member's log has {len(self._past)} rounds, and the run {self.number}")

    def _foreign(self, wrong: str) -> ConfigError:
        return ConfigError(
            wrong, expected="a log that the run goes on from", mend="come with the base weights and without a log"
        )

    def local_step(self) -> None:
        """A store's clock is the wall's, and goes by itself."""

    def round(self, number: int, codes: Tensor, lr: float) -> Closed:
        """Take part in a round.

        codes    uint8 [as many as every member's], of this member's scalars
        lr       learning rate of the round
        returns  what the round came to, alike on all members; if it closed without this one, its scalars are lost, it
                 is not on the roster any more, and `backlog` leads back
        raises   PeerLost if the store's host is gone; ConfigError if the round is not due
        """
        assert codes.dtype == torch.uint8
        assert codes.dim() == 1
        return self._run(self._member.round(number, bytes(codes.cpu().numpy()), lr), f"round {number}")

    def compare(self, number: int, digest: str) -> None:
        """Compare weights after `number` rounds with who was first to say what its are; nobody waits.

        raises  StateMismatch
        """
        self._run(self._member.compare(number, digest), f"the comparison after round {number}")

    def leave(self) -> None:
        """Say goodbye: rounds go on without this member, and without waiting for it. Who hosts stays for the others."""
        self._run(self._member.leave(), "goodbye")
        if self._founds:
            self._run(self._member.linger(), "waiting for the others to end")

    def __enter__(self) -> AtStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.leave()
            return
        with suppress(PeerLost):  # others need not wait for one that failed
            self._run(self._member.leave(), "goodbye")

    def _run(self, program: Program[T], during: str) -> T:
        answer: Any = None
        try:
            while True:
                op = program.send(answer)
                answer = self._perform(op)
                if not isinstance(op, Clock):
                    sent_bytes, received_bytes = traffic(op, answer)
                    self.meter.count("meeting", sent_bytes=sent_bytes, received_bytes=received_bytes, messages_sent=1)
        except StopIteration as end:
            result: T = end.value
            return result
        except DistNetworkError as error:
            why = f"the store that its process keeps is gone ({first_line(error)})"
            raise PeerLost([self._member.founder], during=during, why=why) from error

    def _perform(self, op: Op) -> Any:
        match op:
            case Put(key, value):
                self._store.set(key, value)  # type: ignore[arg-type]
            case Gather():
                return self._gather(op)
            case Swap(key, expected, desired):
                return self._store.compare_set(key, expected, desired)  # type: ignore[arg-type]
            case Add(key, amount):
                return self._store.add(key, amount)
            case Delete(key):
                self._store.delete_key(key)
            case Clock():
                return time.monotonic()
        return None

    def _gather(self, op: Gather) -> dict[str, bytes]:
        keys = list(op.keys)
        values = self._wait(keys, op.limit_s, op.what) if op.limit_s else None
        if values is None:
            keys = keys if self._store.check(keys) else [key for key in keys if self._store.check([key])]
            values = self._wait(keys, _ANSWERS_S) if keys else None
        return {} if values is None else dict(zip(keys, values, strict=True))

    def _wait(self, keys: list[str], limit_s: float, what: str = "") -> list[bytes] | None:
        """The values of all keys if they come in time. In short pieces: interrupts are noticed, and a line says why."""
        ends = time.monotonic() + limit_s
        while (left_s := ends - time.monotonic()) > 0:
            self._store.set_timeout(timedelta(seconds=max(0.01, min(left_s, _TELL_AFTER_S))))
            try:
                return self._store.multi_get(keys)
            except DistStoreError:
                left_s = ends - time.monotonic()
                if what and left_s > 0:
                    _log.warning("waiting for %s (gives up in %.0f s)", what, left_s)
        return None


def traffic(op: Op, answer: Any) -> tuple[int, int]:
    """Bytes of an operation in TCPStore's own words: one for the kind, eight for every length, one before every key.

    returns  sent, received; TCP's and IP's headers come on top
    """
    match op:
        case Put(key, value):
            return 1 + _text(key) + 8 + len(value), 0
        case Gather(keys):
            asked, found = 9 + sum(map(_text, keys)), sum(8 + len(value) for value in answer.values())
            return (2 + (op.limit_s == 0)) * asked, 1 + (op.limit_s == 0) + found  # are they there? wait; give them
        case Swap(key, expected, desired):
            return 1 + _text(key) + 16 + len(expected) + len(desired), 8 + len(answer)
        case Add(key):
            return 9 + _text(key), 8
        case Delete(key):
            return 1 + _text(key), 8
    raise AssertionError(f"{op} is no message")


def _text(key: str) -> int:
    return 9 + len(key)
