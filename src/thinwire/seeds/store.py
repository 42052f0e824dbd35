"""Meetings at a key-value store: who carries the protocol of elastic.py, and what a training loop sees of it.

    with host("0.0.0.0:29500", facts) as meeting:             # on one member's machine
    with attend("203.0.113.7:29500", facts) as meeting:       # on all others, whenever they like
        while meeting.number < rounds:
            for closed in meeting.backlog():                  # rounds without this member: all, after it came
                replay(closed)
            codes = evaluate(meeting.number, meeting.id)
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

from thinwire.errors import LinkError, PeerLost
from thinwire.links.joining import host_port
from thinwire.links.meter import Meter
from thinwire.seeds.closed import Closed
from thinwire.seeds.elastic import USUAL, Add, Clock, Delete, Gather, Member, Op, Pace, Program, Put, Swap
from thinwire.version import __version__

T = TypeVar("T")
_log = logging.getLogger("thinwire")

_TELL_AFTER_S = 5.0  # how long a wait stays silent
_ANSWERS_S = 10.0  # how long the store may take for an answer that waits for nobody


def host(
    address: str, facts: Mapping[str, str], *, past: Sequence[Closed] = (), at_least: int = 1, pace: Pace = USUAL
) -> Meeting:
    """Found a run here, keep its store, and be its first member.

    address   "HOST:PORT" to listen on; port 0 finds a free one (`meeting.port`)
    facts     what all members must share: name -> value, as {"recipe": digest, "base": digest}; version is added
    past      rounds of a log that the run goes on from: those who come replay them too
    at_least  members, this one included, that the first round waits for, for pace.most_s at most
    raises    LinkError if nothing can listen there
    """
    name, port = host_port(address) if not address.endswith(":0") else (address[:-2], 0)
    limit = timedelta(seconds=_ANSWERS_S)
    try:
        store = TCPStore(name, port, None, is_master=True, timeout=limit, wait_for_workers=False)
    except (RuntimeError, OSError) as error:
        raise LinkError(
            f"no store can listen at {address}: {str(error).splitlines()[0]}", expected="a free port of this machine",
            mend="name another port, or end what listens on this one",
        ) from error  # fmt: skip
    meeting = Meeting(store, pace=pace, at_least=at_least, keeps=True)
    meeting.found(facts, past)
    return meeting


def attend(address: str, facts: Mapping[str, str], *, pace: Pace = USUAL) -> Meeting:
    """Come to a run, at any time; `backlog` of the meeting leads into it.

    address  "HOST:PORT" of its host
    facts    as the host has them
    raises   ConfigError naming a fact that differs, LinkError if there is no host or no run
    """
    name, port = host_port(address)
    limit = timedelta(seconds=min(pace.most_s, _ANSWERS_S))
    try:
        store = TCPStore(name, port, None, is_master=False, timeout=limit, wait_for_workers=False)
    except (RuntimeError, OSError) as error:
        raise LinkError(
            f"no run answers at {address}: {str(error).splitlines()[0]}", expected="a host that listens there",
            mend=f"start the host first; then try `thinwire doctor {address}` from here",
        ) from error  # fmt: skip
    meeting = Meeting(store, pace=pace)
    meeting.meet(facts)
    return meeting


class Meeting:
    """A member's view of a run whose members come and go. Used by one thread; leave it at the end of a `with` block.

    meter  bytes of this member at the store, by purpose
    """

    def __init__(self, store: Store, *, pace: Pace = USUAL, at_least: int = 1, keeps: bool = False) -> None:
        """store: any of torch.distributed that can compare and set. keeps: it ends when this process does."""
        self.meter = Meter()
        self._store, self._keeps = store, keeps
        self._member = Member(pace, at_least)

    @property
    def id(self) -> int | None:
        """This member on the roster; None until `backlog` was replayed, and after a round that closed without it."""
        return self._member.id

    @property
    def number(self) -> int:
        """Of the round that is open."""
        return self._member.standing.number

    @property
    def roster(self) -> tuple[int, ...]:
        """Ids of the members that the open round takes scalars from, ascending."""
        return self._member.standing.roster

    @property
    def port(self) -> int:
        """Where the store listens."""
        assert isinstance(self._store, TCPStore)
        return self._store.port

    def found(self, facts: Mapping[str, str], past: Sequence[Closed] = ()) -> None:
        """Begin a run in an empty store; see `host`."""
        self._run(self._member.found({"version": __version__, **facts}, past), "the founding")

    def meet(self, facts: Mapping[str, str]) -> None:
        """Compare facts with the founder's; see `attend`."""
        self._run(self._member.meet({"version": __version__, **facts}), "the meeting")

    def backlog(self) -> Iterator[Closed]:
        """Rounds that closed without this member, until one admits it; nothing while it is on the roster.

        Asking for a round says that those before it are replayed: the last ones come as they close, and admission is
        asked for when there is nothing left to replay.
        """
        while self.id is None:
            yield from self._run(self._member.follow(), f"round {self.number}")

    def round(self, number: int, codes: Tensor, lr: float) -> Closed:
        """Take part in a round.

        codes    uint8 [as many as every member's], of this member's scalars
        lr       learning rate of the round
        returns  what the round came to, alike on all members; if it closed without this one, `id` is None, its scalars
                 are lost and `backlog` leads back
        raises   PeerLost if the store's host is gone; ConfigError if the round is not due
        """
        assert codes.dtype == torch.uint8
        assert codes.dim() == 1
        return self._run(self._member.round(number, bytes(codes.cpu().numpy()), lr), f"round {number}")

    def leave(self) -> None:
        """Say goodbye: rounds go on without this member, and without waiting for it. Who hosts stays for the others."""
        self._run(self._member.leave(), "goodbye")
        if self._keeps:
            self._run(self._member.linger(), "waiting for the others to end")

    def __enter__(self) -> Meeting:
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
            why = f"the store that its process keeps is gone ({str(error).splitlines()[0]})"
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
