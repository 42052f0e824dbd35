"""Rounds of packets over any link: how contributions are combined and how members make sure of the result.

Which way a round goes follows from what its parts declare, never from their names:

    all-reduce       linear codec, rule that needs sums: codes are added as they are, and decoded once
    scatter-gather   codec that may be applied twice, rule that needs coordinates or sums: each member combines one
                     shard of all contributions and sends the result, encoded again, to all
    gather           everything else, and groups of two: everybody gets all contributions and combines them itself

Contributions are combined in ascending order of rank, and a member applies the decoded form of what it sent, so all
members hold the same bits afterwards, whatever the link.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from thinwire.aggregators import Aggregator, WeightedMean
from thinwire.codecs import ErrorFeedback
from thinwire.codecs.base import Codec
from thinwire.codecs.precision import FP32
from thinwire.errors import PacketError, StateMismatch
from thinwire.fragments import digest
from thinwire.links.base import Channel
from thinwire.packet import Fields, Flag, Header, Kind, Layout, Packet, check, read, wire_bytes
from thinwire.randomness import mix
from thinwire.topologies import Group, Route, Tree

_log = logging.getLogger("thinwire")

_ALIGN = 256  # shards begin at multiples of this many elements, so that blocks of a quantiser are rarely cut
#: Why a round that was carried out to its end changes nothing.
NOBODY_FINITE = "no member had finite values to contribute"
OVERFLOW = "each member's values are finite, but not what they combine to"
NO_SAMPLES = "no member has counted a sample since its last round"

_ATTEMPTS = 3  # a round with a damaged packet is sent again this often before it is given up


@dataclass(frozen=True)
class Exchange:
    """Everything a round needs beside the vectors.

    ranks of `route` are the members that combine; `witnesses` those whose results must agree at the end
    """

    channel: Channel
    rank: int
    route: Route
    witnesses: tuple[int, ...]
    codec: Codec
    feedback: ErrorFeedback | None
    aggregator: Aggregator
    header: Header
    key: int
    now: Callable[[], float]

    @property
    def what(self) -> str:
        """The round in words."""
        return f"round {self.header.round}, fragment {self.header.fragment}"


@dataclass(frozen=True)
class Residuals:
    """What a lossy codec dropped and feedback keeps: of the member's own vector, and of the shard it combines."""

    own: Tensor | None = None
    shard: Tensor | None = None


@dataclass(frozen=True)
class Combined:
    """The end of a round on one member.

    update      [n], or None if the round is not to be committed
    residuals   to be remembered if it is
    ranks       members that took part with finite values
    reason      why it is not to be committed
    encode_s, job_s  seconds spent encoding, decoding and merging; from first to last
    """

    update: Tensor | None
    residuals: Residuals
    ranks: tuple[int, ...] = ()
    reason: str = ""
    encode_s: float = 0.0
    job_s: float = 0.0


@dataclass
class _Work:
    """One attempt at a round: the exchange, and the clock that tells coding from waiting."""

    ex: Exchange
    coding_s: float = 0.0
    faults: list[str] = field(default_factory=list)

    def swap(
        self, outgoing: Mapping[int, Packet], expected: Mapping[int, Header], codec: str, layout: Mapping[int, Layout],
        sizes: Mapping[int, int],
    ) -> dict[int, Packet | None]:  # fmt: skip
        """Exchange packets; one that is not what was due is None, and remembered as a fault."""
        unique = {id(packet): packet for packet in outgoing.values()}  # one that goes to all is written once
        written = {name: packet.to_bytes() for name, packet in unique.items()}
        waited = self.ex.now()
        arrived = self.ex.channel.exchange(
            {rank: written[id(packet)] for rank, packet in outgoing.items()},
            {rank: wire_bytes(codec, layout[rank]) for rank in expected},
            self.ex.what,
        )
        self.coding_s -= self.ex.now() - waited
        return {
            rank: self._read(arrived[rank], header, codec, sizes[rank]) for rank, header in sorted(expected.items())
        }

    def _read(self, buffer: Tensor, header: Header, codec: str, n: int) -> Packet | None:
        try:
            return check(read(buffer), header=header, codec=codec, n=n)
        except PacketError as error:
            self.faults.append(f"member {header.sender}: {error.wrong}")
            return None

    def decode(self, packet: Packet, codec: Codec, n: int, key: int, device: torch.device) -> Tensor | None:
        try:
            return codec.decode({name: value.to(device) for name, value in packet.fields.items()}, n, key)
        except PacketError as error:
            self.faults.append(f"member {packet.header.sender}: {error.wrong}")
            return None


def combine(ex: Exchange, x: Tensor, weight: float, residuals: Residuals, shared: Tensor | None) -> Combined:
    """A member's whole round, from its vector to a result that all witnesses hold. Runs beside the compute.

    x          [n] what this member sends; if it is not finite the member abstains, and takes part without it
    weight     of the contribution; with 0 it is left out, though the member takes part
    residuals  from the last round
    shared     [n] state that all witnesses should hold alike, compared with the result; None compares the result alone
    raises     PeerLost, StateMismatch; a round that failed without a loss of members comes back with `update=None`
    """
    start = ex.now()
    abstains = not _finite(x)
    weight = weight if ex.aggregator.weighs else 1.0
    if abstains:
        x = torch.zeros_like(x)
    reasons: list[str] = []
    coding_s = 0.0
    for _ in range(_ATTEMPTS):
        work = _Work(ex)
        began = ex.now()
        update, after = _along(work, ex.route, x, weight, abstains, residuals)
        work.coding_s += ex.now() - began
        coding_s += work.coding_s
        present = _verdict(work, update, shared, abstains)
        if present is not None and not present:
            return Combined(None, residuals, reason=NOBODY_FINITE, encode_s=coding_s, job_s=ex.now() - start)
        if present is not None and update is None:  # nobody failed, nobody abstained, nothing came: weights of 0
            return Combined(None, residuals, present, NO_SAMPLES, encode_s=coding_s, job_s=ex.now() - start)
        if present is not None and update is not None and len(present) > 1 and not _finite(update):
            return Combined(None, residuals, reason=OVERFLOW, encode_s=coding_s, job_s=ex.now() - start)
        if present is not None and update is not None:
            kept = residuals if abstains or weight == 0 else after
            return Combined(update, kept, present, encode_s=coding_s, job_s=ex.now() - start)
        reasons = work.faults or ["another member received a damaged packet"]
        _log.warning("%s: sent again, because of %s", ex.what, "; ".join(reasons))
    reason = f"given up after {_ATTEMPTS} attempts: " + "; ".join(reasons)
    return Combined(None, residuals, reason=reason, encode_s=coding_s, job_s=ex.now() - start)


def _along(
    work: _Work, route: Route, x: Tensor, weight: float, abstains: bool, residuals: Residuals
) -> tuple[Tensor | None, Residuals]:
    """Follow a route. The result is None if a packet was damaged or nobody contributed."""
    if isinstance(route, Tree):
        return _tree(work, route, x, weight, abstains, residuals)
    codec, needs = work.ex.codec, work.ex.aggregator.needs
    if len(route.ranks) > 2 and codec.traits.linear and needs == "sum":
        return _all_reduce(work, route, x, weight, abstains, residuals)
    if len(route.ranks) > 2 and codec.traits.reencodes and needs != "rows":
        return _scatter_gather(work, route, x, weight, abstains, residuals, codec, work.ex.feedback)
    return _gather(work, route, x, weight, abstains, residuals)


def _gather(
    work: _Work, route: Group, x: Tensor, weight: float, abstains: bool, residuals: Residuals
) -> tuple[Tensor | None, Residuals]:
    """Everybody sends its contribution to all and combines all of them."""
    ex, n = work.ex, x.numel()
    fields, own = _encode(ex, x, residuals.own, mix(ex.key, 0, ex.rank))
    header = replace(ex.header, sender=ex.rank, weight=weight, flags=Flag.ABSTAINS if abstains else 0)
    packet = Packet(ex.codec.spec, n, fields, header)
    others = _others(route.ranks, ex.rank)
    arrived = work.swap(
        dict.fromkeys(others, packet),
        {rank: replace(ex.header, sender=rank) for rank in others},
        ex.codec.spec,
        dict.fromkeys(others, ex.codec.layout(n)),
        dict.fromkeys(others, n),
    )
    keys = {sender: mix(ex.key, 0, sender) for sender in route.ranks}
    rows = _rows(work, {**arrived, ex.rank: packet}, ex.codec, n, keys, x.device)
    update = None if rows is None else _merge(ex.aggregator, *rows)
    return update, Residuals(own, residuals.shard)


def _scatter_gather(
    work: _Work, route: Group, x: Tensor, weight: float, abstains: bool, residuals: Residuals, codec: Codec,
    feedback: ErrorFeedback | None,
) -> tuple[Tensor | None, Residuals]:  # fmt: skip
    """Each member combines one shard; everybody collects the combined shards."""
    ex, ranks = work.ex, route.ranks
    bounds = shards(x.numel(), len(ranks))
    sizes = dict(zip(ranks, (end - begin for begin, end in bounds), strict=True))
    target = x if feedback is None or residuals.own is None else x + feedback.decay * residuals.own
    header = replace(ex.header, sender=ex.rank, weight=weight, flags=Flag.ABSTAINS if abstains else 0)
    packets = {
        rank: Packet(codec.spec, sizes[rank], codec.encode(target[begin:end], mix(ex.key, 0, ex.rank, rank)), header)
        for rank, (begin, end) in zip(ranks, bounds, strict=True)
    }
    mine = sizes[ex.rank]
    others = _others(ranks, ex.rank)
    arrived = work.swap(
        {rank: packets[rank] for rank in others if sizes[rank]},
        {rank: replace(ex.header, sender=rank) for rank in others if mine},
        codec.spec,
        dict.fromkeys(others, codec.layout(mine)),
        dict.fromkeys(others, mine),
    )
    keys = {sender: mix(ex.key, 0, sender, ex.rank) for sender in ranks}
    rows = _rows(work, {**arrived, ex.rank: packets[ex.rank]}, codec, mine, keys, x.device) if mine else None
    merged = None if rows is None else _merge(ex.aggregator, *rows)
    failed = mine > 0 and rows is None
    result, shard = _again(ex, codec, feedback, merged, mine, x, residuals.shard, failed)
    collected = work.swap(
        dict.fromkeys(others, result) if mine else {},
        {rank: replace(ex.header, kind=Kind.RESULT, sender=rank) for rank in others if sizes[rank]},
        codec.spec,
        {rank: codec.layout(sizes[rank]) for rank in others},
        sizes,
    )
    update = _joined(work, {**collected, ex.rank: result}, codec, sizes, x)
    own = None if feedback is None else target - _decoded(ex, packets, codec, sizes)
    return update, Residuals(own, shard)


def _again(
    ex: Exchange, codec: Codec, feedback: ErrorFeedback | None, merged: Tensor | None, n: int, like: Tensor,
    residual: Tensor | None, failed: bool,
) -> tuple[Packet, Tensor | None]:  # fmt: skip
    """The combined shard encoded for everyone, and what that second encoding dropped."""
    flags = Flag.FAILED if failed else Flag.ABSTAINS if merged is None else 0
    vector = like.new_zeros(n) if merged is None else merged
    key = mix(ex.key, 1, ex.rank)
    if feedback is None:
        fields: Fields = codec.encode(vector, key)
    else:
        fields, residual = feedback.encode(vector, residual, key)
    header = replace(ex.header, kind=Kind.RESULT, sender=ex.rank, flags=flags)
    return Packet(codec.spec, n, fields, header), residual


def _joined(
    work: _Work, packets: Mapping[int, Packet | None], codec: Codec, sizes: Mapping[int, int], like: Tensor
) -> Tensor | None:
    """The combined shards in order; None if one is missing, failed, or empty because all abstained."""
    parts = []
    for rank in sizes:
        if not sizes[rank]:
            continue
        packet = packets.get(rank)
        if packet is None or packet.header.flags:
            return None
        part = work.decode(packet, codec, sizes[rank], mix(work.ex.key, 1, rank), like.device)
        if part is None:
            return None
        parts.append(part)
    return torch.cat(parts) if parts else like.new_zeros(0)


def _all_reduce(
    work: _Work, route: Group, x: Tensor, weight: float, abstains: bool, residuals: Residuals
) -> tuple[Tensor | None, Residuals]:
    """Add codes and decode the sum: all members encode with one key, so that codes mean the same."""
    ex, n = work.ex, x.numel()
    key = mix(ex.key, 2)
    fields, own = _encode(ex, x, residuals.own, key)
    (name, code), *rest = fields.items()
    assert not rest, "a linear codec writes one field"
    summed, _ = _scatter_gather(work, route, code, weight, abstains, Residuals(), FP32(), None)
    update = None if summed is None else ex.codec.decode({name: summed}, n, key)
    return update, Residuals(own, residuals.shard)


def _tree(
    work: _Work, tree: Tree, x: Tensor, weight: float, abstains: bool, residuals: Residuals
) -> tuple[Tensor | None, Residuals]:
    """Islands combine at their leaders, leaders combine among themselves, and pass the result on.

    A mean of means is the members' mean only in proportion to what is behind each: hence WeightedMean at every level.
    """
    ex, n, codec, rule = work.ex, x.numel(), tree.inside, WeightedMean()
    weight = weight if ex.aggregator.weighs else 1.0
    work.ex = replace(ex, aggregator=rule)
    island = next(island for island in tree.islands if ex.rank in island)
    leader, followers = island[0], island[1:]
    header = replace(ex.header, sender=ex.rank, weight=weight, flags=Flag.ABSTAINS if abstains else 0)
    packet = Packet(codec.spec, n, codec.encode(x, mix(ex.key, 3, ex.rank)), header)
    if ex.rank != leader:
        work.swap({leader: packet}, {}, codec.spec, {}, {})
        due = {leader: replace(ex.header, kind=Kind.RESULT, sender=leader)}
        got = work.swap({}, due, codec.spec, {leader: codec.layout(n)}, {leader: n})[leader]
        if got is None or got.header.flags:
            return None, residuals
        return work.decode(got, codec, n, mix(ex.key, 4, leader), x.device), residuals
    arrived = work.swap(
        {},
        {rank: replace(ex.header, sender=rank) for rank in followers},
        codec.spec,
        dict.fromkeys(followers, codec.layout(n)),
        dict.fromkeys(followers, n),
    )
    keys = {sender: mix(ex.key, 3, sender) for sender in island}
    rows = _rows(work, {**arrived, leader: packet}, codec, n, keys, x.device)
    failed = rows is None
    merged, total = None, weight
    if rows is not None:
        merged, total = _merge(rule, *rows), float(rows[1].sum()) if len(rows[1]) else weight
    update, after = _along(
        work, tree.between, torch.zeros_like(x) if merged is None else merged, total, merged is None, residuals
    )
    flags = Flag.FAILED if failed or update is None else 0
    vector = torch.zeros_like(x) if update is None else update
    key = mix(ex.key, 4, leader)
    fields = codec.encode(vector, key)
    result = Packet(codec.spec, n, fields, replace(ex.header, kind=Kind.RESULT, sender=leader, flags=flags))
    work.swap(dict.fromkeys(followers, result), {}, codec.spec, {}, {})
    return (None if flags else codec.decode(fields, n, key)), after


def _verdict(work: _Work, update: Tensor | None, shared: Tensor | None, abstains: bool) -> tuple[int, ...] | None:
    """Compare what all witnesses hold, before anybody commits.

    returns  ranks whose values were finite; None if somebody's packet was damaged, so that nobody commits
    raises   StateMismatch naming the members in the minority; PacketError if a verdict itself is damaged
    """
    ex = work.ex
    others = _others(ex.witnesses, ex.rank)
    if not others:
        return () if abstains else (ex.rank,)
    own = digest(*(tensor for tensor in (update, shared) if tensor is not None))
    failed = bool(work.faults)
    flags = (Flag.ABSTAINS if abstains else 0) | (Flag.FAILED if failed else 0)
    header = replace(ex.header, kind=Kind.VERDICT, sender=ex.rank, flags=flags)
    packet = Packet("verdict", 0, {"digest": torch.frombuffer(bytearray(own), dtype=torch.uint8)}, header)
    layout: Layout = {"digest": (torch.uint8, 8)}
    before = len(work.faults)
    arrived = work.swap(
        dict.fromkeys(others, packet),
        {rank: replace(header, sender=rank) for rank in others},
        "verdict",
        dict.fromkeys(others, layout),
        dict.fromkeys(others, 0),
    )
    verdicts = {rank: found for rank, found in sorted({**arrived, ex.rank: packet}.items()) if found is not None}
    if len(work.faults) > before:
        raise PacketError(f"{ex.what}: " + "; ".join(work.faults[before:]), expected="every member's verdict")
    if any(verdict.header.flags & Flag.FAILED for verdict in verdicts.values()):
        return None
    present = tuple(rank for rank, verdict in verdicts.items() if not verdict.header.flags & Flag.ABSTAINS)
    if present:
        _same({rank: bytes(verdict.fields["digest"].numpy()) for rank, verdict in verdicts.items()}, ex.what)
    return present


def _same(digests: Mapping[int, bytes], what: str) -> None:
    if len(set(digests.values())) == 1:
        return
    most, count = Counter(digests.values()).most_common(1)[0]
    odd = [str(rank) for rank, found in digests.items() if found != most]
    if 2 * count <= len(digests):  # no majority to be right
        told = f"members {', '.join(map(str, digests))} do not hold the same result"
    else:
        told = f"member{'s' * (len(odd) > 1)} {', '.join(odd)} and the rest do not hold the same result"
    raise StateMismatch(
        f"{what}: {told}",
        expected="the same bits on every member",
        mend="do not write to parameters outside the optimizer; look for broken memory or other library versions there",
    )


def gather_packets(
    channel: Channel, rank: int, ranks: Iterable[int], packet: Packet, layout: Layout, what: str
) -> dict[int, Packet]:
    """Every rank's packet of one kind and codec, by rank.

    layout  an upper bound of the fields' sizes
    raises  PacketError, PeerLost
    """
    others = _others(tuple(ranks), rank)
    most = wire_bytes(packet.codec, layout)
    arrived = channel.exchange(dict.fromkeys(others, packet.to_bytes()), dict.fromkeys(others, most), what)
    found = {rank: packet}
    for sender, buffer in arrived.items():
        due = replace(packet.header, sender=sender)
        found[sender] = check(read(buffer), header=due, codec=packet.codec, n=packet.n)
    return dict(sorted(found.items()))


def shards(n: int, count: int) -> list[tuple[int, int]]:
    """[begin, end) of each of `count` shards of n elements, as even as whole blocks of 256 allow; some may be empty."""
    blocks = -(-n // _ALIGN)
    edges = [min(n, blocks * index // count * _ALIGN) for index in range(count + 1)]
    return list(itertools.pairwise(edges))


def _encode(ex: Exchange, x: Tensor, residual: Tensor | None, key: int) -> tuple[Fields, Tensor | None]:
    if ex.feedback is None:
        return ex.codec.encode(x, key), residual
    return ex.feedback.encode(x, residual, key)


def _decoded(ex: Exchange, packets: Mapping[int, Packet], codec: Codec, sizes: Mapping[int, int]) -> Tensor:
    """What others read of a member's shards, in order.  [n]"""
    keys = {owner: mix(ex.key, 0, ex.rank, owner) for owner in packets}
    return torch.cat([codec.decode(packet.fields, sizes[rank], keys[rank]) for rank, packet in packets.items()])


def _rows(
    work: _Work, packets: Mapping[int, Packet | None], codec: Codec, n: int, keys: Mapping[int, int],
    device: torch.device,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Contributions in ascending order of rank and their weights; None if one was damaged; empty if all abstain.

    keys  what each sender encoded with
    """
    rows, weights = [], []
    for sender, packet in sorted(packets.items()):
        if packet is None:
            return None
        row = work.decode(packet, codec, n, keys[sender], device)
        if row is None:
            return None
        if not packet.header.flags & Flag.ABSTAINS and packet.header.weight > 0:
            rows.append(row)
            weights.append(packet.header.weight)
    if len(rows) == 1:
        stacked = rows[0].unsqueeze(0)  # no copy
    else:
        stacked = torch.stack(rows) if rows else torch.zeros(0, n, device=device)
    return stacked, torch.tensor(weights, dtype=torch.float64)


def _finite(x: Tensor) -> bool:
    """Whether all elements are. A finite sum proves it in one pass; only a sum that is not asks for a closer look."""
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


def _merge(aggregator: Aggregator, rows: Tensor, weights: Tensor) -> Tensor | None:
    return aggregator.combine(rows, weights) if len(rows) else None


def _others(ranks: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """The other ranks, starting after our own, so that not everybody sends to the same member first."""
    at = ranks.index(rank)
    return ranks[at + 1 :] + ranks[:at]
