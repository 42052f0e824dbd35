"""Joining a group: members meet at a store, say who is still missing, and connect with each other."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import psutil
import torch.distributed as dist
from torch.distributed import Store, TCPStore, rendezvous  # type: ignore[attr-defined]

from thinwire.errors import ConfigError, LinkError, PeerLost
from thinwire.links.base import Link
from thinwire.links.islands import IslandLink
from thinwire.links.local import alone
from thinwire.links.torch import TELL_AFTER_S, TorchLink, first_line, names

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_log = logging.getLogger("thinwire")


@contextmanager
def join(
    address: str | None = None,
    *,
    rank: int | None = None,
    world: int | None = None,
    backend: str = "gloo",
    timeout_s: float | None = None,
    across: dist.ProcessGroup | DeviceMesh | None = None,
    within: dist.ProcessGroup | DeviceMesh | None = None,
) -> Iterator[Link]:
    """Join the group of members; leave it at the end of the `with` block.

        mesh = init_device_mesh("cpu", (islands, members), mesh_dim_names=("across", "within"))
        with thinwire.join(across=mesh["across"], within=mesh["within"]) as link:

    address    "HOST:PORT" of member 0, the same on all members; needs rank and world. Without it the group that is
               already initialised is used, else the one torchrun describes, else this member is a group of one
    rank       this member, from 0
    world      number of members
    backend    "gloo" (processors; GPU tensors are staged through memory) or "nccl" (GPUs)
    timeout_s  one override for every time limit; by default they follow from payload and measured link
    across     members of an initialised group that make up this one, instead of all; all of these call it
    within     this member's island, over Gloo: those that hold the other shards of its model, or the same model (FSDP2,
               DDP, ZeRO). `across` are then the members of equal rank in the islands, and the link leads to them
    raises     ConfigError for a request that cannot be met, LinkError if the group does not form in time
    """
    if backend not in ("gloo", "nccl"):
        raise ConfigError(
            f"backend {backend!r}", expected="gloo or nccl", mend="use gloo unless every member has a GPU"
        )
    if across is not None or within is not None:
        with _among(address, across, within, backend, timeout_s) as link:
            yield link
        return
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


@contextmanager
def _among(
    address: str | None, across: dist.ProcessGroup | DeviceMesh | None, within: dist.ProcessGroup | DeviceMesh | None,
    backend: str, timeout_s: float | None,
) -> Iterator[Link]:  # fmt: skip
    """Over some members of a group that is there already, and perhaps within an island of others."""
    if across is None or address is not None or not dist.is_initialized():
        told = "within without across" if across is None else "across " + (
            f"with address {address!r}" if address is not None else "before torch.distributed is initialised"
        )  # fmt: skip
        raise ConfigError(
            f"join: {told}",
            expected="an initialised process group, of which `across` names the members that combine",
            mend='mesh = init_device_mesh("cpu", (islands, members), mesh_dim_names=("across", "within")), then '
            'join(across=mesh["across"], within=mesh["within"])',
        )
    link = beside(across, timeout_s, backend)
    joined = link if within is None else IslandLink(link, beside(within, timeout_s, behind=link))
    try:
        yield joined
    finally:
        joined.close()


def beside(
    group: dist.ProcessGroup | DeviceMesh | None, timeout_s: float | None, backend: str = "gloo",
    behind: TorchLink | None = None,
) -> TorchLink:  # fmt: skip
    """A link over the members of a process group, by a group of its own: tags cannot meet those of others.

    behind  see TorchLink
    """
    found = group if group is None or isinstance(group, dist.ProcessGroup) else group.get_group()
    world = found is None or found == dist.group.WORLD
    ranks = None if world else dist.get_process_group_ranks(found)
    ours = dist.new_group(ranks, backend=backend, use_local_synchronization=not world)
    assert isinstance(ours, dist.ProcessGroup)
    return TorchLink(ours, backend, timeout_s, behind)


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
        host, port = host_port(address)
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


def host_port(address: str) -> tuple[str, int]:
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
    if (mine := address_towards(host)) is None:
        return
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address == mine for found in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return


def address_towards(host: str) -> str | None:
    """This machine's address on the way to `host`, as the routing table has it; None if there is no way."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing: it only asks the routing table
        except OSError:
            return None
        return str(probe.getsockname()[0])


def _roll_call(store: Store, rank: int, world: int, limit_s: float) -> None:
    """Wait until every member has signed in, naming those who have not; the store is not asked more than it must be."""
    keys = [f"thinwire/here/{peer}" for peer in range(world)]
    store.set(keys[rank], "1")
    start = time.monotonic()
    while True:
        left_s = limit_s - (time.monotonic() - start)
        try:
            store.wait(keys, timedelta(seconds=max(0.1, min(TELL_AFTER_S, left_s))))
            return
        except (dist.DistStoreError, RuntimeError):
            missing = _missing(store, keys)
        left_s = limit_s - (time.monotonic() - start)
        if missing and left_s <= 0:
            raise PeerLost(missing, during="joining", why=f"not there after {limit_s:g} s")
        if missing:
            _log.warning("waiting for %s to join (gives up in %.0f s)", names(missing), left_s)


def _missing(store: Store, keys: list[str]) -> list[int]:
    """Members that have not signed in. Member 0 keeps the store: if it does not answer, it is the one that is lost."""
    try:
        return [peer for peer, key in enumerate(keys) if not store.check([key])]
    except (dist.DistNetworkError, RuntimeError) as error:
        raise PeerLost([0], during="joining", why=f"its meeting point is gone: {first_line(error)}") from error


@contextmanager
def _telling(whom: str, limit_s: float) -> Iterator[None]:
    """Say whom we wait for while something blocks that cannot be asked."""
    timer = threading.Timer(TELL_AFTER_S, _log.warning, (f"waiting for {whom} (gives up after {limit_s:g} s)",))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
