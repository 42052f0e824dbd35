"""The torch link: packets over torch.distributed process groups, Gloo on processors and NCCL on GPUs.

Messages travel point to point under a tag made of the channel's number and the count of messages between the two
members in it, so any number of exchanges may be under way at once, and none waits for another: places for only so many
would fill up with different rounds on different members, who would then wait for each other in a circle. Gloo sends
exactly the bytes of a message; NCCL needs equal sizes on both sides, so there a message is padded to the bound that the
receiver was told. NCCL pairs messages up by their order alone: there jobs run one after the other, as they were given.

Time limits follow from what was measured: see `time_limit_s`. A group is fixed: after a member is lost the link is
broken and says so at every further use; what was committed stays valid, and the run goes on from its checkpoint.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future, wait
from contextlib import suppress
from datetime import timedelta
from functools import partial
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from thinwire.errors import PeerLost
from thinwire.links.base import Channel
from thinwire.links.crew import Crew
from thinwire.links.meter import Meter
from thinwire.links.timings import Timings
from thinwire.packet import length

T = TypeVar("T")
_log = logging.getLogger("thinwire")

TELL_AFTER_S = 5.0  # how long a wait stays silent
_UNMEASURED_BYTES_PER_S = 125_000.0  # 1 Mbit/s, until something was measured
_TELLING_BYTES = 1 << 16
_TURNS = 1 << 10  # tags of a channel, taken in turn: two members have far fewer messages under way in it
_TAGS = 1 << 30
_CUT = _TAGS  # nobody sends under it

#: rank -> what to send or the most bytes to receive, and the tag.
Outgoing = Mapping[int, tuple[Tensor, int]]
Incoming = Mapping[int, tuple[int, int]]
#: What arrived, the seconds after which each peer was served, and those after which its message was there:
#: rank -> uint8 [most], rank -> s, rank -> s.
Arrived = tuple[dict[int, Tensor], dict[int, float], dict[int, float]]


def time_limit_s(payload_bytes: int, rate_bytes_per_s: float, longest_wait_s: float) -> float:
    """How long an exchange may take before the peers that did not answer count as lost.

    payload_bytes     what it and all others under way move, both ways
    rate_bytes_per_s  the slowest measured so far with any of its peers
    longest_wait_s    longest exchange so far: members that compute at unlike speeds arrive apart
    returns           60 s, plus ten times what the transfer should take and what waiting has taken before
    """
    return 60.0 + 10.0 * payload_bytes / rate_bytes_per_s + 10.0 * longest_wait_s


class TorchLink:
    """A process group as a link. Made by `join`; see thinwire.links.base.Link for the contract."""

    def __init__(
        self, group: dist.ProcessGroup, backend: str, timeout_s: float | None, behind: TorchLink | None = None
    ) -> None:
        """behind: a link that others wait at while we wait for them on this one; time limits here add its longest."""
        self.rank = group.rank()
        self.members = tuple(range(group.size()))
        self.meter = Meter()
        self.timings = Timings()
        self._group = group
        self._timeout_s = timeout_s
        self._transfer = _gloo if backend == "gloo" else _nccl
        self.one_by_one = backend == "nccl"
        self._crew = Crew()
        self._opened = 0
        self._lock = threading.Lock()
        self._pace = Pace()
        self._longest_limit_s, self._behind = 0.0, behind
        self._broken: PeerLost | None = None
        self._jobs: list[Future[object]] = []

    def open(self, purpose: str) -> Channel:
        number, self._opened = self._opened, self._opened + 1
        return _TorchChannel(self, purpose, number)

    def spawn(self, job: Callable[[], T], name: str) -> _ThreadJob[T]:
        self._jobs = [each for each in self._jobs if not each.done()]
        before = list(self._jobs) if self.one_by_one else []

        def body() -> T:
            threading.current_thread().name = name
            wait(before)
            return job()

        future = self._crew.do(body)
        self._jobs.append(future)  # type: ignore[arg-type]
        return _ThreadJob(future)

    def now(self) -> float:
        return time.perf_counter()

    def local_step(self) -> None:
        """Time passes by itself."""

    def close(self) -> None:
        """Let the jobs under way end (each has its time limits), unless the link is broken."""
        if self._broken is None:
            self.await_jobs()
        self._jobs = []
        self._crew.close()

    def cut(self, why: str) -> None:
        """End at once, over Gloo: what is under way ends in PeerLost, here and, as sockets close, at other members."""
        others = [rank for rank in self.members if rank != self.rank]
        if self._broken is None:
            self._broken = PeerLost(others or [self.rank], during="a gathering that has ended", why=why)
        for rank in others[:1]:
            # Gloo closes all pairs of a group when a receive runs out of time; there is no other way to end its waits.
            with suppress(RuntimeError):
                self._group.recv([torch.empty(1, dtype=torch.uint8)], rank, _CUT).wait(timedelta(milliseconds=1))

    def await_jobs(self) -> None:
        """Until all jobs given so far have ended, well or not."""
        wait(self._jobs)

    def exchange(self, outgoing: Outgoing, incoming: Incoming, purpose: str, what: str) -> dict[int, Tensor]:
        """One exchange of a channel."""
        if self._broken is not None:
            raise self._broken
        moved = Counter({rank: buffer.numel() for rank, (buffer, _) in outgoing.items()})
        moved.update({rank: most for rank, (most, _) in incoming.items()})
        with self._lock:
            limit_s = self._timeout_s or self._pace.begin(moved)
            if self._behind is not None:
                limit_s += self._behind._longest_limit_s
            self._longest_limit_s = max(self._longest_limit_s, limit_s)
        took: Mapping[int, float] = {}
        try:
            arrived, took, came = self._transfer(self._crew, self._group, outgoing, incoming, limit_s, what)
        except PeerLost as lost:
            self._broken = self._broken or lost
            raise
        finally:
            with self._lock:
                self._pace.end(moved, took)
        for rank, buffer in arrived.items():
            self.timings.took(rank, length(buffer), came[rank])
        sent_bytes = sum(buffer.numel() for buffer, _ in outgoing.values())
        received_bytes = sum(length(buffer) for buffer in arrived.values())
        self.meter.count(purpose, sent_bytes=sent_bytes, received_bytes=received_bytes, messages_sent=len(outgoing))
        return arrived


class Pace:
    """What the link was measured to do, and how much is under way: time limits follow from it.

    Rates are kept peer by peer: what a fast one taught must not be asked of a slow one that was never met.
    """

    def __init__(self) -> None:
        self._rates: dict[int, float] = {}  # bytes per second, the slowest so far
        self._longest_wait_s = 0.0
        self._under_way_bytes = 0

    def begin(self, moved: Mapping[int, int]) -> float:
        """An exchange of so many bytes with each peer begins; returns its time limit in seconds."""
        self._under_way_bytes += sum(moved.values())
        slowest = min(
            (self._rates.get(rank, _UNMEASURED_BYTES_PER_S) for rank in moved), default=_UNMEASURED_BYTES_PER_S
        )
        return time_limit_s(self._under_way_bytes, slowest, self._longest_wait_s)

    def end(self, moved: Mapping[int, int], took_s: Mapping[int, float]) -> None:
        """It ended, after so many seconds with each peer; small messages tell of latency, not of rate."""
        self._under_way_bytes -= sum(moved.values())
        for rank, seconds in took_s.items():
            self._longest_wait_s = max(self._longest_wait_s, seconds)
            if moved[rank] >= _TELLING_BYTES:
                rate = moved[rank] / max(seconds, 1e-6)
                self._rates[rank] = min(self._rates.get(rank, rate), rate)


class _TorchChannel:
    def __init__(self, link: TorchLink, purpose: str, number: int) -> None:
        self._link, self._purpose, self._number = link, purpose, number
        self._opener = threading.get_ident()  # jobs open nothing: who opened is their caller
        self._sent: Counter[int] = Counter()
        self._received: Counter[int] = Counter()

    def exchange(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, int], what: str) -> dict[int, Tensor]:
        out = {rank: (buffer, self._tag(self._sent[rank])) for rank, buffer in outgoing.items()}
        into = {rank: (most, self._tag(self._received[rank])) for rank, most in incoming.items()}
        self._sent.update(outgoing.keys())
        self._received.update(incoming.keys())
        if self._link.one_by_one and threading.get_ident() == self._opener:
            self._link.await_jobs()
        return self._link.exchange(out, into, self._purpose, what)

    def _tag(self, turn: int) -> int:
        return (self._number * _TURNS + turn % _TURNS) % _TAGS


class _ThreadJob(Generic[T]):
    """A handle on a job in a thread."""

    def __init__(self, future: Future[T]) -> None:
        self._future = future

    def done(self) -> bool:
        return self._future.done()

    def wait(self) -> T:
        return self._future.result()  # no time limit here: every exchange inside the job has one


def _gloo(
    crew: Crew, group: dist.ProcessGroup, outgoing: Outgoing, incoming: Incoming, limit_s: float, what: str
) -> Arrived:
    """Send and receive over Gloo; a shorter message than the posted buffer fills its beginning."""
    buffers = {rank: torch.empty(most, dtype=torch.uint8) for rank, (most, _) in incoming.items()}
    limit = timedelta(seconds=limit_s + 5)  # ours comes first, and names all who are missing
    works: dict[int, list[dist.Work]] = {rank: [] for rank in (*incoming, *outgoing)}
    try:
        for rank, buffer in buffers.items():
            works[rank].append(group.recv([buffer], rank, incoming[rank][1]))
        for rank, (buffer, tag) in outgoing.items():
            works[rank].append(group.send([buffer], rank, tag))
    except RuntimeError as error:
        raise PeerLost(works, during=what, why=first_line(error)) from error
    # A waiter for each peer, so that whoever fails first is seen first.
    start = time.monotonic()
    waits = {rank: crew.do(partial(_finish, work, limit)) for rank, work in works.items()}
    took = _await_all(waits, limit_s, what)
    return buffers, took, {rank: waits[rank].result() - start for rank in incoming}


def _finish(works: Iterable[dist.Work], limit: timedelta) -> float:
    """Wait for all works with a peer; returns when the first was done: the message from it, where one is due."""
    first = math.inf
    for work in works:
        work.wait(limit)
        first = min(first, time.monotonic())
    return first


def _await_all(waits: Mapping[int, Future[float]], limit_s: float, what: str) -> dict[int, float]:
    """Until all are done, the first fails or the limit has passed; every five seconds say who is missing.

    Only the first to fail is lost for certain: those after it may have left because of it.

    returns  rank -> seconds until it was done
    """
    ended: SimpleQueue[int] = SimpleQueue()
    for rank, future in waits.items():
        future.add_done_callback(partial(_put, ended, rank))
    took: dict[int, float] = {}
    start = told = time.monotonic()
    while pending := waits.keys() - took.keys():
        now = time.monotonic()
        if now - start >= limit_s:
            raise PeerLost(pending, during=what, why=f"no answer within {limit_s:.0f} s")
        if now - told >= TELL_AFTER_S:
            told = now
            _log.warning("%s: waiting for %s (gives up in %.0f s)", what, names(pending), limit_s - (now - start))
        try:
            rank = ended.get(timeout=max(0.001, min(told + TELL_AFTER_S, start + limit_s) - now))
        except Empty:
            continue
        if (error := waits[rank].exception()) is not None:
            raise PeerLost([rank], during=what, why=first_line(error))
        took[rank] = time.monotonic() - start
    return took


def _put(ended: SimpleQueue[int], rank: int, future: Future[float]) -> None:
    ended.put(rank)


def _nccl(
    crew: Crew, group: dist.ProcessGroup, outgoing: Outgoing, incoming: Incoming, limit_s: float, what: str
) -> Arrived:
    """Send and receive over NCCL, on a stream of its own, polled so that a time limit can be kept."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        buffers = {rank: torch.empty(most, dtype=torch.uint8, device="cuda") for rank, (most, _) in incoming.items()}
        staged = {rank: buffer.cuda() for rank, (buffer, _) in outgoing.items()}
        ops = [dist.P2POp(dist.irecv, buffer, rank, group) for rank, buffer in buffers.items()]
        ops += [dist.P2POp(dist.isend, buffer, rank, group) for rank, buffer in staged.items()]
        for work in dist.batch_isend_irecv(ops) if ops else []:
            work.wait()  # NCCL: makes the stream wait, not the caller
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(stream)
    start = told = time.monotonic()
    peers = set(outgoing) | set(incoming)
    while not done.query():  # type: ignore[no-untyped-call]
        now = time.monotonic()
        if now - start > limit_s:
            raise PeerLost(peers, during=what, why=f"no answer within {limit_s:.0f} s")
        if now - told >= TELL_AFTER_S:
            told = now
            _log.warning("%s: waiting for %s (gives up in %.0f s)", what, names(peers), limit_s - (now - start))
        time.sleep(0.0005)
    took_s = time.monotonic() - start
    took = dict.fromkeys(peers, took_s)
    return {rank: buffer.cpu() for rank, buffer in buffers.items()}, took, took


def names(ranks: Collection[int]) -> str:
    told = ", ".join(map(str, sorted(ranks)))
    return f"member {told}" if len(ranks) == 1 else f"members {told}"


def first_line(error: BaseException | None) -> str:
    """The engine's reason without its source path and its advice."""
    text = str(error).splitlines()[0] if error is not None and str(error) else type(error).__name__
    return text.split("] ", 1)[-1].split(". ", 1)[0] if text.startswith("[") else text
