"""Shards to their holders and back, over any link, at a rate that leaves the wire to training.

    share    everybody's newest snapshot, coded, to the members that `placement` deals; in force once all have all
    regain   a member's snapshot out of the shards of those that are there: the newest of which enough are found

All members call these at the same point, and open the channel for it as they open any: `link.open("snapshots")`. To run
beside training, give them to `link.spawn`. A loss in the middle is PeerLost for all, as in a round, and leaves what was
in force. Whoever lacks room or got damaged bytes goes on to the end, so that nobody waits, and then says no for all.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from thinwire.errors import ConfigError, LinkError, PacketError
from thinwire.links.base import Channel, Link
from thinwire.snapshots.erasure import Bytes, Code, Manifest, encode, recover
from thinwire.snapshots.placement import holders
from thinwire.snapshots.store import Store

PIECE_BYTES = 4 << 20
_MOST_TEXT = 16 << 20  # bytes of what a member may tell of its shards


class Pace:
    """Waits after every piece, so that a member sends no more than its rate in the mean."""

    def __init__(
        self, bits_per_s: float, now: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        if not bits_per_s > 0:
            raise ConfigError(
                f"snapshots at {bits_per_s} bits a second",
                expected="more than 0; a fifth of the uplink is usual",
                mend="leave the pace out to send as fast as the link does",
            )
        self._rate, self._now, self._sleep, self._due = bits_per_s, now, sleep, now()

    def sent(self, count: int) -> None:
        """So many bytes were sent: wait until they may have been. Time that was not used is not made up for."""
        self._due = max(self._due + 8 * count / self._rate, self._now())
        if (wait := self._due - self._now()) > 0:
            self._sleep(wait)


@dataclass(frozen=True)
class _Flow:
    """Bytes from one member to another."""

    sender: int
    receiver: int
    owner: int
    index: int
    size: int


def owner_name(rank: int) -> str:
    """Under which a store holds shards of a member's snapshots."""
    return f"shards of {rank}"


def share(
    link: Link, channel: Channel, store: Store, state: Bytes, version: int, code: Code, pace: Pace | None = None
) -> bool:
    """Code this member's state and deal the shards of all members.

    state    uint8 [size], this member's; sizes may differ
    version  ascending; the same on all members
    returns  whether the snapshot is in force: on all members, or on none
    """
    dealt = holders(link.members, code)
    manifest, shards = encode(state, code, version)
    manifests = {rank: Manifest.from_json(text) for rank, text in _tell(link, channel, manifest.to_json()).items()}
    flows = [
        _Flow(owner, holder, owner, index, manifests[owner].code.shard_bytes(manifests[owner].size))
        for owner, of in dealt.items()
        for index, holder in enumerate(of)
    ]
    alike = all((m.version, m.code) == (version, code) for m in manifests.values())
    arrived = _carry(link, channel, flows, lambda flow: shards[flow.index], pace) if alike else {}
    kept = alike and _keep(store, manifests, arrived)
    agreed = all(text == "yes" for text in _tell(link, channel, "yes" if kept else "no").values())
    if agreed:
        for flow in arrived:
            store.promote(owner_name(flow.owner), version)
    return agreed


def regain(
    link: Link, channel: Channel, store: Store, wanted: int | None = None, pace: Pace | None = None
) -> tuple[int, Bytes] | None:
    """A snapshot out of the memory of those that are there.

    wanted   whose; None for a member that only gives
    returns  its version and the state; None where nothing was wanted
    raises   ConfigError where no snapshot has shards enough, on the member that wants it
    """
    held = _held(store)
    told = _tell(link, channel, json.dumps([wanted, [[o, m.to_json(), sorted(s)] for o, m, s in held]]))
    wants, offers = _understand(told)
    plans = {rank: _choose(owner, offers) for rank, owner in wants.items()}
    flows = [
        _Flow(sender, rank, wants[rank], index, manifest.code.shard_bytes(manifest.size))
        for rank, (manifest, senders) in plans.items()
        if manifest is not None
        for index, sender in senders.items()
    ]
    versions = {(rank, wants[rank]): manifest for rank, (manifest, _) in plans.items()}

    def shard(flow: _Flow) -> Bytes:
        return next(s[flow.index] for o, m, s in held if (o, m) == (flow.owner, versions[flow.receiver, flow.owner]))

    arrived = _carry(link, channel, flows, shard, pace)
    if wanted is None:
        return None
    manifest, _ = plans[link.rank]
    if manifest is None:
        raise ConfigError(
            f"no snapshot of member {wanted} can be put together from members {link.members}",
            expected="as many intact shards of one version as its code needs",
            mend="resume from a checkpoint on disk",
        )
    return manifest.version, recover(manifest, {flow.index: data for flow, data in arrived.items()})


def _keep(store: Store, manifests: Mapping[int, Manifest], arrived: Mapping[_Flow, Bytes]) -> bool:
    """Put shards into the store, not yet in force. Returns whether all of them are there as they were sent."""
    try:
        for flow, data in arrived.items():
            manifest = manifests[flow.owner]
            made = store.write(owner_name(flow.owner), manifest.version, {flow.index: data}, manifest.to_json())
            if made[flow.index] != manifest.digests[flow.index]:
                return False
    except (ConfigError, LinkError):  # no room, a version that is not newer, a keeper that ended
        return False
    return True


def _held(store: Store) -> list[tuple[int, Manifest, Mapping[int, Bytes]]]:
    """Owner, manifest and intact shards of every snapshot that a store has shards of."""
    names = [name for name in store.owners() if name.startswith(owner_name(0)[:-1])]
    found = [(int(name.split()[-1]), snapshot) for name in names for snapshot in store.read(name)]
    return [(owner, Manifest.from_json(snapshot.note), snapshot.parts) for owner, snapshot in found]


_Offers = Sequence[tuple[int, int, Manifest, Collection[int]]]  # rank of the holder, owner, manifest, indices


def _understand(told: Mapping[int, str]) -> tuple[dict[int, int], _Offers]:
    wants, offers = {}, []
    for rank, text in sorted(told.items()):
        try:
            wanted, held = json.loads(text)
            if wanted is not None:
                wants[rank] = int(wanted)
            offers += [(rank, int(o), Manifest.from_json(m), [int(index) for index in s]) for o, m, s in held]
        except (ValueError, TypeError) as error:
            raise PacketError(f"member {rank} told of its shards in no words of ours") from error
    return wants, offers


def _choose(owner: int, offers: _Offers) -> tuple[Manifest | None, dict[int, int]]:
    """The newest snapshot of which enough shards are there, and who is to send which; all members choose alike."""
    found: dict[Manifest, dict[int, int]] = {}
    for rank, whose, manifest, indices in offers:
        if whose == owner:
            for index in indices:
                found.setdefault(manifest, {}).setdefault(index, rank)
    enough = [manifest for manifest, senders in found.items() if len(senders) >= manifest.code.needed]
    if not enough:
        return None, {}
    newest = max(enough, key=lambda manifest: (manifest.version, manifest.digests))
    return newest, dict(sorted(found[newest].items())[: newest.code.needed])  # data shards first: those are copied


def _carry(
    link: Link, channel: Channel, flows: Sequence[_Flow], shard: Callable[[_Flow], Bytes], pace: Pace | None
) -> dict[_Flow, Bytes]:
    """Carry shards in pieces, a piece of each flow at a time; all members take the same turns.

    returns  what was for this member, what it had itself included
    """
    mine = [flow for flow in flows if flow.receiver == link.rank]
    arrived = {flow: shard(flow) if flow.sender == link.rank else np.empty(flow.size, np.uint8) for flow in mine}
    away = [flow for flow in flows if flow.sender == link.rank and flow.receiver != link.rank]
    come = [flow for flow in mine if flow.sender != link.rank]
    # Between two members there may be several flows: one after another, each in turns of its own.
    for turn, start in _turns(flows):
        sent = {flow.receiver: shard(flow)[start : start + PIECE_BYTES] for flow in _at(flows, away, turn, start)}
        due = {flow.sender: flow for flow in _at(flows, come, turn, start)}
        sizes = {sender: min(PIECE_BYTES, flow.size - start) for sender, flow in due.items()}
        outgoing = {receiver: _message(piece) for receiver, piece in sent.items()}
        for sender, data in channel.exchange(outgoing, sizes, "a snapshot's shards").items():
            arrived[due[sender]][start : start + sizes[sender]] = data[: sizes[sender]].numpy()
        if pace is not None:
            pace.sent(sum(len(piece) for piece in sent.values()))
    return arrived


def _rank_among(flows: Sequence[_Flow], flow: _Flow) -> int:
    """Which flow between its two members this one is."""
    return [f for f in flows if (f.sender, f.receiver) == (flow.sender, flow.receiver)].index(flow)


def _turns(flows: Sequence[_Flow]) -> list[tuple[int, int]]:
    across = [flow for flow in flows if flow.sender != flow.receiver]
    most: dict[int, int] = {}
    for flow in across:
        turn = _rank_among(flows, flow)
        most[turn] = max(most.get(turn, 0), flow.size)
    return [(turn, start) for turn in sorted(most) for start in range(0, most[turn], PIECE_BYTES)]


def _at(flows: Sequence[_Flow], some: Sequence[_Flow], turn: int, start: int) -> list[_Flow]:
    return [flow for flow in some if _rank_among(flows, flow) == turn and start < flow.size]


def _tell(link: Link, channel: Channel, text: str) -> dict[int, str]:
    """What every member says, by rank, this one included."""
    raw = np.frombuffer(text.encode(), np.uint8)
    others = [rank for rank in link.members if rank != link.rank]
    length = torch.frombuffer(bytearray(len(raw).to_bytes(8, "little")), dtype=torch.uint8)
    lengths = channel.exchange(dict.fromkeys(others, length), dict.fromkeys(others, 8), "how much there is to tell")
    sizes = {rank: int.from_bytes(bytes(data[:8].tolist()), "little") for rank, data in lengths.items()}
    if max(sizes.values(), default=0) > _MOST_TEXT:
        raise PacketError(f"a member wants to tell {max(sizes.values())} bytes of its shards")
    arrived = channel.exchange(dict.fromkeys(others, _message(raw)), sizes, "what snapshots there are")
    try:
        told = {rank: bytes(data[: sizes[rank]].tolist()).decode() for rank, data in arrived.items()}
    except UnicodeDecodeError as error:
        raise PacketError("a member told of its shards in no words of ours") from error
    return {**told, link.rank: text}


def _message(data: Bytes) -> Tensor:
    """As a link sends it: memory of its own, writable, which shards in a store's memory may not be."""
    return torch.from_numpy(data.copy())
