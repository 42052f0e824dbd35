"""The torch link: packets over torch.distributed process groups, Gloo on processors and NCCL on GPUs.

Messages travel point to point under a tag made of the channel's number and the count of messages between the two
members in it, so several exchanges may be under way at once. Gloo sends exactly the bytes of a message; NCCL needs
equal sizes on both sides, so there a message is padded to the bound that the receiver was told.

Time limits follow from what was measured: see `time_limit_s`. A group is fixed: after a member is lost the link is
broken and says so at every further use; what was committed stays valid, and the run goes on from its checkpoint.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store, TCPStore, rendezvous  # type: ignore[attr-defined]

from thinwire.errors import ConfigError, LinkError, PeerLost
from thinwire.links.base import Channel, Link
from thinwire.links.local import alone
from thinwire.links.meter import Meter
from thinwire.packet import length

T = TypeVar("T")
_log = logging.getLogger("thinwire")

_TELL_AFTER_S = 5.0  # how long a wait stays silent
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


@contextmanager
def join(
    address: str | None = None,
    *,
    rank: int | None = None,
    world: int | None = None,
    backend: str = "gloo",
    timeout_s: float | None = None,
) -> Iterator[Link]:
    """Join the group of members; leave it at the end of the `with` block.

    address    "HOST:PORT" of member 0, the same on all members; needs rank and world. Without it the group that is
               already initialised is used, else the one torchrun describes, else this member is a group of one
    rank       this member, from 0
    world      number of members
    backend    "gloo" (processors; GPU tensors are staged through memory) or "nccl" (GPUs)
    timeout_s  one override for every time limit; by default they follow from payload and measured link
    raises     ConfigError for a request that cannot be met, LinkError if the group does not form in time
    """
    if backend not in ("gloo", "nccl"):
        raise ConfigError(
            f"backend {backend!r}", expected="gloo or nccl", mend="use gloo unless every member has a GPU"
        )
    if address is None and not dist.is_initialized() and "RANK" not in os.environ:
        _log.warning("no group was named (address, torchrun): this member trains alone")
        yield alone()
        return
    ours = not dist.is_initialized()
    if ours:
        _form_group(address, rank, world, backend, timeout_s)
    # A group of our own beside the caller's: our tags cannot meet messages of theirs.
    group = dist.group.WORLD if ours else dist.new_group(backend=backend)
    assert group is not None
    link = TorchLink(group, backend, timeout_s)
    try:
        yield link
    finally:
        link.close()
        if ours and dist.is_initialized():
            dist.destroy_process_group()


def _form_group(
    address: str | None, rank: int | None, world: int | None, backend: str, timeout_s: float | None
) -> None:
    """Meet the other members at the store, saying who is still missing, then connect with all of them."""
    limit_s = timeout_s or 300.0
    limit = timedelta(seconds=limit_s)
    if address is None:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        with _telling(f"the meeting point {where}", limit_s):
            store, rank, world = next(rendezvous("env://", timeout=limit))
        host = os.environ.get("MASTER_ADDR", "localhost")
    else:
        host, port = _host_port(address)
        if rank is None or world is None or not 0 <= rank < world:
            raise ConfigError(
                f"rank {rank} of {world}",
                expected="a rank from 0 and the number of members, rank < world",
                mend="give every member its own --rank and the same --world",
            )
        try:
            with _telling(f"member 0 at {address}", limit_s):
                store = TCPStore(host, port, world, is_master=rank == 0, timeout=limit, wait_for_workers=False)
        except (RuntimeError, OSError) as error:
            raise _no_meeting(address, rank, str(error)) from error
    assert rank is not None
    assert world is not None
    _choose_interface(host)
    _roll_call(store, rank, world, limit_s)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)


def _no_meeting(address: str, rank: int, why: str) -> LinkError:
    return LinkError(
        f"member {rank} cannot meet the others at {address}: {why.splitlines()[0]}",
        expected="member 0 to listen there, and its port to be open to all members",
        mend=f"start member 0 first; then try `thinwire doctor {address}` from here",
    )


def _host_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"address {address!r}",
            expected="HOST:PORT of member 0, e.g. 203.0.113.7:29500",
            mend="name the machine of member 0 as the others see it, and a port that is open there",
        )
    return host, int(port)


def _choose_interface(host: str) -> None:
    """Tell Gloo the network interface that leads to `host`; it would guess by host name, often wrongly."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing: it only asks the routing table
        except OSError:
            return
        mine = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address == mine for found in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return


def _roll_call(store: Store, rank: int, world: int, limit_s: float) -> None:
    """Wait until every member has signed in, naming those who have not; the store is not asked more than it must be."""
    keys = [f"thinwire/here/{peer}" for peer in range(world)]
    store.set(keys[rank], "1")
    start = time.monotonic()
    while True:
        left_s = limit_s - (time.monotonic() - start)
        try:
            store.wait(keys, timedelta(seconds=max(0.1, min(_TELL_AFTER_S, left_s))))
            return
        except (dist.DistStoreError, RuntimeError):
            missing = _missing(store, keys)
        left_s = limit_s - (time.monotonic() - start)
        if missing and left_s <= 0:
            raise PeerLost(missing, during="joining", why=f"not there after {limit_s:g} s")
        if missing:
            _log.warning("waiting for %s to join (gives up in %.0f s)", _names(missing), left_s)


def _missing(store: Store, keys: list[str]) -> list[int]:
    """Members that have not signed in. Member 0 keeps the store: if it does not answer, it is the one that is lost."""
    try:
        return [peer for peer, key in enumerate(keys) if not store.check([key])]
    except (dist.DistNetworkError, RuntimeError) as error:
        raise PeerLost([0], during="joining", why=f"its meeting point is gone: {_first_line(error)}") from error


@contextmanager
def _telling(whom: str, limit_s: float) -> Iterator[None]:
    """Say whom we wait for while something blocks that cannot be asked."""
    timer = threading.Timer(_TELL_AFTER_S, _log.warning, (f"waiting for {whom} (gives up after {limit_s:g} s)",))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class TorchLink:
    """A process group as a link. Made by `join`; see thinwire.links.base.Link for the contract."""

    def __init__(self, group: dist.ProcessGroup, backend: str, timeout_s: float | None) -> None:
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
        raise PeerLost(set(outgoing) | set(incoming), during=what, why=_first_line(error)) from error
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
        if now - told >= _TELL_AFTER_S:
            told = now
            _log.warning("%s: waiting for %s (gives up in %.0f s)", what, _names(pending), limit_s - (now - start))
        try:
            rank, future = ended.get(timeout=max(0.001, min(told + _TELL_AFTER_S, start + limit_s) - now))
        except Empty:
            continue
        if (error := future.exception()) is not None:
            raise PeerLost([rank], during=what, why=_first_line(error))
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
        if now - told >= _TELL_AFTER_S:
            told = now
            _log.warning("%s: waiting for %s (gives up in %.0f s)", what, _names(peers), limit_s - (now - start))
        time.sleep(0.0005)
    return {rank: buffer.cpu() for rank, buffer in buffers.items()}


def _names(ranks: set[int] | list[int]) -> str:
    told = ", ".join(map(str, sorted(ranks)))
    return f"member {told}" if len(ranks) == 1 else f"members {told}"


def _first_line(error: BaseException | None) -> str:
    """The engine's reason without its source path and its advice."""
    text = str(error).splitlines()[0] if error is not None and str(error) else type(error).__name__
    return text.split("] ", 1)[-1].split(". ", 1)[0] if text.startswith("[") else text
