"""The torch link: packets over torch.distributed process groups, Gloo on processors and NCCL on GPUs.

Messages travel point to point under a tag made of the channel's number and the count of messages between the two
members in it, so several exchanges may be under way at once. Gloo sends exactly the bytes of a message; NCCL needs
equal sizes on both sides, so there a message is padded to the bound that the receiver was told.

Time limits follow from what was measured: see `time_limit_s`. A group is fixed: after a member is lost the link is
broken and says so at every further use; what was committed stays valid, and the run goes on from its checkpoint.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from thinwire.errors import PeerLost
from thinwire.links.base import Channel
from thinwire.links.meter import Meter
from thinwire.packet import length

T = TypeVar("T")
_log = logging.getLogger("thinwire")

TELL_AFTER_S = 5.0  # how long a wait stays silent
_TURNS = 1 << 10  # exchanges a channel may have before its tags run into the next channel's
_TAGS = 1 << 30

#: rank -> what to send or the most bytes to receive, and the tag.
Outgoing = Mapping[int, tuple[Tensor, int]]
Incoming = Mapping[int, tuple[int, int]]


def time_limit_s(payload_bytes: int, rate_bytes_per_s: float, longest_wait_s: float) -> float:
    """How long an exchange may take before the peers that did not answer count as lost.

    payload_bytes     what it moves, both ways
    rate_bytes_per_s  slowest rate measured on this link so far
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
        self.rank = dist.get_rank(group)
        self.members = tuple(range(dist.get_world_size(group)))
        self.meter = Meter()
        self._group = group
        self._timeout_s = timeout_s
        self._transfer = _gloo if backend == "gloo" else _nccl
        # NCCL runs one exchange after the other on one stream; Gloo takes them side by side.
        self._slots = threading.Semaphore(8 if backend == "gloo" else 1)
        self._opened = 0
        self._lock = threading.Lock()
        self._rate_bytes_per_s = 125_000.0  # 1 Mbit/s until something was measured
        self._measured = False
        self._longest_wait_s = 0.0
        self._longest_limit_s, self._behind = 0.0, behind
        self._broken: PeerLost | None = None
        self._jobs: list[threading.Thread] = []

    def open(self, purpose: str) -> Channel:
        number, self._opened = self._opened, self._opened + 1
        return _TorchChannel(self, purpose, number)

    def spawn(self, job: Callable[[], T], name: str) -> _ThreadJob[T]:
        future: Future[T] = Future()

        def body() -> None:
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)

        self._jobs = [thread for thread in self._jobs if thread.is_alive()]
        thread = threading.Thread(target=body, name=name, daemon=True)
        self._jobs.append(thread)
        thread.start()
        return _ThreadJob(future)

    def now(self) -> float:
        return time.perf_counter()

    def local_step(self) -> None:
        """Time passes by itself."""

    def close(self) -> None:
        """Let the jobs under way end (each has its time limits), unless the link is broken."""
        if self._broken is None:
            for thread in self._jobs:
                thread.join()
        self._jobs = []

    def exchange(self, outgoing: Outgoing, incoming: Incoming, purpose: str, what: str) -> dict[int, Tensor]:
        """One exchange of a channel."""
        if self._broken is not None:
            raise self._broken
        sent_bytes = sum(buffer.numel() for buffer, _ in outgoing.values())
        moved = sent_bytes + sum(most for most, _ in incoming.values())
        limit_s = self._timeout_s or time_limit_s(moved, self._rate_bytes_per_s, self._longest_wait_s)
        if self._behind is not None:
            limit_s += self._behind._longest_limit_s
        self._longest_limit_s = max(self._longest_limit_s, limit_s)
        start = time.perf_counter()
        try:
            with self._slots:
                arrived = self._transfer(self._group, outgoing, incoming, limit_s, what)
        except PeerLost as lost:
            self._broken = lost
            raise
        self._learn(moved, time.perf_counter() - start)
        received_bytes = sum(length(buffer) for buffer in arrived.values())
        self.meter.count(purpose, sent_bytes=sent_bytes, received_bytes=received_bytes, messages_sent=len(outgoing))
        return arrived

    def _learn(self, moved_bytes: int, took_s: float) -> None:
        """Keep the slowest rate and the longest wait; small messages tell of latency, not of rate."""
        with self._lock:
            self._longest_wait_s = max(self._longest_wait_s, took_s)
            if moved_bytes >= 1 << 16:
                rate = moved_bytes / max(took_s, 1e-6)
                self._rate_bytes_per_s = min(self._rate_bytes_per_s, rate) if self._measured else rate
                self._measured = True


class _TorchChannel:
    def __init__(self, link: TorchLink, purpose: str, number: int) -> None:
        self._link, self._purpose, self._number = link, purpose, number
        self._sent: Counter[int] = Counter()
        self._received: Counter[int] = Counter()

    def exchange(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, int], what: str) -> dict[int, Tensor]:
        out = {rank: (buffer, self._tag(self._sent[rank])) for rank, buffer in outgoing.items()}
        into = {rank: (most, self._tag(self._received[rank])) for rank, most in incoming.items()}
        self._sent.update(outgoing.keys())
        self._received.update(incoming.keys())
        return self._link.exchange(out, into, self._purpose, what)

    def _tag(self, turn: int) -> int:
        assert turn < _TURNS
        return (self._number * _TURNS + turn) % _TAGS


class _ThreadJob(Generic[T]):
    """A handle on a job in a thread."""

    def __init__(self, future: Future[T]) -> None:
        self._future = future

    def done(self) -> bool:
        return self._future.done()

    def wait(self) -> T:
        return self._future.result()  # no time limit here: every exchange inside the job has one


def _gloo(
    group: dist.ProcessGroup, outgoing: Outgoing, incoming: Incoming, limit_s: float, what: str
) -> dict[int, Tensor]:
    """Send and receive over Gloo; a shorter message than the posted buffer fills its beginning."""
    buffers = {rank: torch.empty(most, dtype=torch.uint8) for rank, (most, _) in incoming.items()}
    limit = timedelta(seconds=limit_s + 5)  # ours comes first, and names all who are missing
    try:
        receiving = {rank: group.recv([buffer], rank, incoming[rank][1]) for rank, buffer in buffers.items()}
        sending = {rank: group.send([buffer], rank, tag) for rank, (buffer, tag) in outgoing.items()}
    except RuntimeError as error:
        raise PeerLost(set(outgoing) | set(incoming), during=what, why=first_line(error)) from error
    waits = [(rank, _wait_beside(work, limit)) for rank, work in receiving.items()]
    waits += [(rank, _wait_beside(work, limit)) for rank, work in sending.items()]
    _await_all(waits, limit_s, what)
    return buffers


def _wait_beside(work: dist.Work, limit: timedelta) -> Future[bool]:
    """Wait in a thread of its own, so that whoever fails first is seen first. Daemons: a stuck wait ends with us."""
    future: Future[bool] = Future()

    def body() -> None:
        try:
            future.set_result(work.wait(limit))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=body, daemon=True).start()
    return future


def _await_all(waits: list[tuple[int, Future[bool]]], limit_s: float, what: str) -> None:
    """Until all are done, the first fails or the limit has passed; every five seconds say who is missing.

    Only the first to fail is lost for certain: those after it may have left because of it.
    """
    ended: SimpleQueue[tuple[int, Future[bool]]] = SimpleQueue()
    for rank, future in waits:
        future.add_done_callback(partial(_put, ended, rank))
    left = Counter(rank for rank, _ in waits)
    start = told = time.monotonic()
    while pending := set(+left):
        now = time.monotonic()
        if now - start >= limit_s:
            raise PeerLost(pending, during=what, why=f"no answer within {limit_s:.0f} s")
        if now - told >= TELL_AFTER_S:
            told = now
            _log.warning("%s: waiting for %s (gives up in %.0f s)", what, names(pending), limit_s - (now - start))
        try:
            rank, future = ended.get(timeout=max(0.001, min(told + TELL_AFTER_S, start + limit_s) - now))
        except Empty:
            continue
        if (error := future.exception()) is not None:
            raise PeerLost([rank], during=what, why=first_line(error))
        left[rank] -= 1


def _put(ended: SimpleQueue[tuple[int, Future[bool]]], rank: int, future: Future[bool]) -> None:
    ended.put((rank, future))


def _nccl(
    group: dist.ProcessGroup, outgoing: Outgoing, incoming: Incoming, limit_s: float, what: str
) -> dict[int, Tensor]:
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
    return {rank: buffer.cpu() for rank, buffer in buffers.items()}


def names(ranks: set[int] | list[int]) -> str:
    told = ", ".join(map(str, sorted(ranks)))
    return f"member {told}" if len(ranks) == 1 else f"members {told}"


def first_line(error: BaseException | None) -> str:
    """The engine's reason without its source path and its advice."""
    text = str(error).splitlines()[0] if error is not None and str(error) else type(error).__name__
    return text.split("] ", 1)[-1].split(". ", 1)[0] if text.startswith("[") else text
