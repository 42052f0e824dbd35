"""Two hosts measure the link between them, over the engine that training will use: torch.distributed's Gloo.

The listening host keeps the meeting point (a TCPStore, where both leave a note about themselves); then both join a
Gloo group of two, and follow one script: round trips with the clock on them, then bulk each way. Nobody is trusted:
a note that is no note is an error, lengths are bounded, and every wait has a limit.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.distributed import (  # type: ignore[attr-defined]  # public, and not in torch's own list of exports
    PrefixStore,
    ProcessGroupGloo,
    TCPStore,
)

from thinwire.doctor.advice import SyncCost, link_advice, sync_costs
from thinwire.doctor.machine import Versions
from thinwire.doctor.reach import parse_address, reach
from thinwire.errors import ConfigError, LinkError
from thinwire.randomness import random_bytes

_ROUND_TRIPS = 21  # the first opens the way and is not counted
_FIRST_BLOCK_BYTES = 64 << 10
_LARGEST_BLOCK_BYTES = 256 << 20
_PATTERN_BYTES = 1 << 20  # random, since a VPN may compress
_LONGEST_NOTE = 4096
_MEET_LIMIT_S = 20.0
_STEP_LIMIT_S = 60.0  # blocks are sized to take about a second; the first, of 64 KiB, takes 52 s at 10 kbit/s
_TAG = 1


@dataclass(frozen=True)
class Note:
    """What each host tells the other at the meeting point.

    address  of the host itself, where the other's data connection will go
    """

    versions: Versions
    address: str


@dataclass(frozen=True)
class PairReport:
    """The link between this host and another.

    round_trip_s     median of 20 exchanges of 8 bytes; `slowest_s` is the longest of them
    sent_bits_per_s  from here to there, of content; `received_bits_per_s` the other way
    clock_ahead_s    the other host's wall clock less this one's, known to half a round trip
    costs            of synchronising models over the slower direction
    advice           sentences with numbers
    """

    mine: Note
    theirs: Note
    round_trip_s: float
    slowest_s: float
    sent_bits_per_s: float
    received_bits_per_s: float
    clock_ahead_s: float
    costs: tuple[SyncCost, ...]
    advice: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return asdict(self)


def listen(port: int, *, wait_s: float = 300.0, bulk_s: float = 1.5) -> PairReport:
    """Wait for another host's `call`, then measure with it.

    port    1 to 65535, on all interfaces
    wait_s  for the other host to come
    bulk_s  how long the last, decisive block of each direction is to take
    raises  ConfigError if the port cannot be had, LinkError if nobody came or the link broke
    """
    store = _open_meeting_point(port)
    theirs, dialled = _read_note(store, "caller", wait_s, f"nobody called at port {port}")
    here = dialled in _own_addresses()
    _leave_note(store, "listener", Note(Versions.here(), dialled if here else ""), "")
    if not here:
        _await(store, "read", _MEET_LIMIT_S, "the caller hung up")  # the meeting point goes when this process does
        raise _behind_nat(dialled)
    return _measure(store, 0, Note(Versions.here(), dialled), theirs, bulk_s)


def call(address: str, *, limit_s: float = 10.0, bulk_s: float = 1.5) -> PairReport:
    """Measure the link to a host that listens.

    address  HOST:PORT of the other
    limit_s  for the first connection
    bulk_s   how long the last, decisive block of each direction is to take
    raises   ConfigError or LinkError that says where exactly it failed, and what to do
    """
    route = reach(*parse_address(address), limit_s=limit_s)
    mine = Note(Versions.here(), route.local)
    with _blaming(_not_a_doctor(address)):
        store = TCPStore(
            route.remote, route.port, None, is_master=False, timeout=timedelta(seconds=limit_s), wait_for_workers=False
        )
        _leave_note(store, "caller", mine, route.remote)
    theirs, _ = _read_note(store, "listener", _MEET_LIMIT_S, f"{address} does not answer as a doctor")
    store.set("read", "1")
    if not theirs.address:
        raise _behind_nat(route.remote)
    return _measure(store, 1, mine, theirs, bulk_s)


# ------------------------------------------------------------------------------------------------ meeting


def _open_meeting_point(port: int) -> TCPStore:
    try:
        return TCPStore(
            "127.0.0.1", port, None, is_master=True, timeout=timedelta(seconds=_MEET_LIMIT_S), wait_for_workers=False
        )
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"doctor: cannot listen on port {port}: {str(error).splitlines()[0]}",
            expected="a free port from 1 to 65535 (from 1024 without root)",
            mend="choose another, for example 29500; `ss -ltnp` shows who has which",
        ) from error


def _leave_note(store: TCPStore, key: str, note: Note, dialled: str) -> None:
    store.set(key, json.dumps(asdict(note) | {"dialled": dialled}))


def _read_note(store: TCPStore, key: str, wait_s: float, wrong: str) -> tuple[Note, str]:
    """The other host's note, and the address at which it found us."""
    _await(store, key, wait_s, wrong)
    text = store.get(key)
    try:
        if len(text) > _LONGEST_NOTE:
            raise ValueError(f"{len(text)} bytes")
        found = json.loads(text)
        versions = Versions(*(_word(found["versions"][name]) for name in ("thinwire", "torch", "python", "system")))
        return Note(versions, _word(found["address"])), _word(found["dialled"])
    except (ValueError, KeyError, TypeError) as error:
        raise LinkError(
            f"doctor: the other host left a note that is none: {error!r}",
            expected="versions and addresses, in at most 4096 bytes",
            mend="run the same version of thinwire on both hosts",
        ) from error


def _word(value: object) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"{value!r} is no text")
    return value


def _await(store: TCPStore, key: str, wait_s: float, wrong: str) -> None:
    """In short looks rather than one long wait, so that Ctrl-C works."""
    limit = time.monotonic() + wait_s
    with _blaming(_not_a_doctor("the other host")):
        while not store.check([key]):
            if time.monotonic() > limit:
                raise LinkError(
                    f"doctor: {wrong} within {wait_s:g} s",
                    expected="`thinwire doctor --listen PORT` on one host and `thinwire doctor HOST:PORT` on the other",
                    mend="start both within that time; if the other one cannot connect, do what it says there",
                )
            time.sleep(0.05)


def _not_a_doctor(who: str) -> LinkError:
    return LinkError(
        f"doctor: {who} accepts connections but does not answer as a doctor",
        expected="`thinwire doctor --listen PORT` at the other end",
        mend="something else may have that port, or the other side was stopped: start it there, try another port",
    )


def _behind_nat(dialled: str) -> LinkError:
    return LinkError(
        f"doctor: the port is reached at {dialled}, which is not an address of the listening host: NAT or port "
        "forwarding is between",
        expected="hosts that reach each other at their own addresses, as torch.distributed connects them directly",
        mend="join both hosts by a VPN (WireGuard, Tailscale) and use its addresses, or listen on the host that has "
        "a public address of its own",
    )


def _own_addresses() -> set[str]:
    return {found.address for addresses in psutil.net_if_addrs().values() for found in addresses}


# ------------------------------------------------------------------------------------------------ measuring


@dataclass(frozen=True)
class _Talk:
    """The two ends of a Gloo group; every transfer waits, and no longer than its limit."""

    group: Any  # a ProcessGroupGloo; torch's type stubs lack its send and recv
    rank: int

    def send(self, tensor: Tensor) -> None:
        self.group.send([tensor], 1 - self.rank, _TAG).wait(timedelta(seconds=_STEP_LIMIT_S))

    def receive(self, tensor: Tensor) -> Tensor:
        self.group.recv([tensor], 1 - self.rank, _TAG).wait(timedelta(seconds=_STEP_LIMIT_S))
        return tensor

    def tell(self, *values: float) -> None:
        self.send(torch.tensor(values, dtype=torch.float64))

    def hear(self, count: int) -> list[float]:
        values: list[float] = self.receive(torch.zeros(count, dtype=torch.float64)).tolist()
        return values


def _measure(store: TCPStore, rank: int, mine: Note, theirs: Note, bulk_s: float) -> PairReport:
    with _blaming(_no_data_connection(mine, theirs)):
        talk = _Talk(_join(store, rank, mine.address), rank)
    with _blaming(_broken(theirs)):
        if rank == 1:
            times, ahead_s = _ping(talk)
            round_trip_s, slowest_s = statistics.median(times), max(times)
            talk.tell(round_trip_s, slowest_s, ahead_s)
            sent = _push(talk, bulk_s, round_trip_s)
            _take(talk)
            (received,) = talk.hear(1)
            talk.tell(sent)
        else:
            _answer(talk)
            round_trip_s, slowest_s, behind_s = talk.hear(3)
            ahead_s = -behind_s
            _take(talk)
            sent = _push(talk, bulk_s, round_trip_s)
            talk.tell(sent)
            (received,) = talk.hear(1)
    return PairReport(
        *(mine, theirs, round_trip_s, slowest_s, sent, received, ahead_s),
        costs=sync_costs(rate_bits_per_s=min(sent, received), round_trip_s=round_trip_s),
        advice=link_advice(
            sent_bits_per_s=sent,
            received_bits_per_s=received,
            clock_ahead_s=ahead_s,
            differing=_differing(mine.versions, theirs.versions),
        ),
    )


def _join(store: TCPStore, rank: int, address: str) -> Any:
    """A ProcessGroupGloo beside any other group, on the interface that leads to the other host."""
    gloo: Any = ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=address)]
    options._timeout = timedelta(seconds=_MEET_LIMIT_S)
    return gloo(PrefixStore("doctor", store), rank, 2, options)


def _ping(talk: _Talk) -> tuple[list[float], float]:
    """Round trips in seconds, and how far the other clock is ahead, from the fastest of them."""
    seen = []
    for _ in range(_ROUND_TRIPS):
        wall_s, started = time.time(), time.perf_counter()
        talk.tell(0.0)
        (their_s,) = talk.hear(1)
        took_s = time.perf_counter() - started
        seen.append((took_s, their_s - (wall_s + took_s / 2)))
    return [took_s for took_s, _ in seen[1:]], min(seen[1:])[1]


def _answer(talk: _Talk) -> None:
    for _ in range(_ROUND_TRIPS):
        talk.hear(1)
        talk.tell(time.time())


def _push(talk: _Talk, bulk_s: float, round_trip_s: float) -> float:
    """Blocks that grow until one takes at least half of `bulk_s`; the last one counts.

    returns  bits a second; the acknowledgement's round trip is taken off
    """
    pattern, size = random_bytes(0, _PATTERN_BYTES), _FIRST_BLOCK_BYTES
    while True:
        block = pattern.repeat(-(-size // _PATTERN_BYTES))[:size]
        talk.tell(float(size))
        started = time.perf_counter()
        talk.send(block)
        talk.hear(1)
        took_s = time.perf_counter() - started
        if took_s >= bulk_s / 2 or size == _LARGEST_BLOCK_BYTES:
            talk.tell(0.0)
            return 8 * size / max(took_s - round_trip_s, took_s / 2)
        size = min(_LARGEST_BLOCK_BYTES, round(size * min(8.0, max(2.0, bulk_s / took_s))))


def _take(talk: _Talk) -> None:
    while size := talk.hear(1)[0]:
        if not 0 < size <= _LARGEST_BLOCK_BYTES:
            raise LinkError(
                f"doctor: the other host announced a block of {size} bytes",
                expected=f"at most {_LARGEST_BLOCK_BYTES}",
                mend="run the same version of thinwire on both hosts",
            )
        talk.receive(torch.empty(int(size), dtype=torch.uint8))
        talk.tell(0.0)


def _differing(mine: Versions, theirs: Versions) -> tuple[str, ...]:
    names = ("thinwire", "torch", "python")
    pairs = {name: (getattr(mine, name), getattr(theirs, name)) for name in names}
    return tuple(f"{name} {here} here, {there} there" for name, (here, there) in pairs.items() if here != there)


def _no_data_connection(mine: Note, theirs: Note) -> LinkError:
    return LinkError(
        f"doctor: the meeting point works, but no data connection between {mine.address} and {theirs.address}",
        expected="TCP connections between the two on any port, as Gloo chooses a free one for its data",
        mend="let the firewalls on both hosts pass all TCP from each other's address (ufw allow from "
        f"{theirs.address}), or join both by a VPN",
    )


def _broken(theirs: Note) -> LinkError:
    return LinkError(
        f"doctor: the connection to {theirs.address} broke while it was measured",
        expected="both hosts to answer within a minute a step",
        mend="see the other host's output; if it was not stopped, the link drops long transfers: try again, and if it "
        "happens each time, lower the MTU (ip link set dev DEVICE mtu 1400)",
    )


@contextmanager
def _blaming(error: LinkError) -> Iterator[None]:
    """torch.distributed reports lost connections and time limits as RuntimeError: say what it means here."""
    try:
        yield
    except RuntimeError as cause:
        raise error from cause
