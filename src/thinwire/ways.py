"""The ways a vector goes through a group of members, and what comes back.

Which one it is follows from what codec and rule declare, never from their names:

    all-reduce       linear codec, rule that needs sums: codes are added as they are, and decoded once
    sum of packets   summable codec, plain mean: packets are added shard by shard, and decoded once
    scatter-gather   codec that may be applied twice, rule that needs coordinates or sums: each member combines one
                     shard of all contributions and sends the result, encoded again, to all
    gather           everything else, and groups of two: everybody gets all contributions and combines them itself

In a graph there is one way, `mingle`: a member tells its neighbours and averages those that it hears.

Contributions are combined in ascending order of rank, and a member applies the decoded form of what it sent, so all
members of a group hold the same bits afterwards, whatever the link.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from thinwire.aggregators import Aggregator, WeightedMean
from thinwire.codecs import How
from thinwire.codecs.base import Codec
from thinwire.codecs.precision import FP32
from thinwire.errors import PacketError
from thinwire.links.base import Channel
from thinwire.packet import Flag, Header, Kind, Layout, Packet, check, read, wire_bytes
from thinwire.randomness import mix
from thinwire.routes import Group, Neighbours, Route, shares

_ALIGN = 256  # shards begin at multiples of this many elements, so that blocks of a quantiser are rarely cut


@dataclass(frozen=True)
class Exchange:
    """Everything a round needs beside the vectors.

    how        the codec, fitted to the fragment, with its memory and its stages if it has them
    recalls    whether it is asked what was counted as this member's
    ranks of `route` are the members that combine; `witnesses` those whose results must agree at the end, if it is not
    a graph
    """

    channel: Channel
    rank: int
    route: Route
    witnesses: tuple[int, ...]
    how: How
    aggregator: Aggregator
    header: Header
    key: int
    now: Callable[[], float]
    recalls: bool = False

    @property
    def what(self) -> str:
        """The round in words."""
        return f"round {self.header.round}, fragment {self.header.fragment}"


@dataclass(frozen=True)
class Leg:
    """A vector to be combined, and how.

    x          [n] this member's
    weight     of it; what is 0 is left out
    abstains   whether this member takes part with nothing to say
    key        shared randomness of this exchange
    tells      whether `sent` is asked for
    keeps      share of `dropped` that is added before the second encoding; 0 keeps nothing, None has no second encoding
    dropped    by the second encoding of the shard that this member combines, in the last round; None is nothing
    tracks     whether members add up shares of the combined vector: then `dropped` is in such shares too, so that it
               makes up for what it stands for when another share of the members takes part in the next round
    """

    codec: Codec
    rule: Aggregator
    x: Tensor
    weight: float
    abstains: bool
    key: int
    tells: bool = False
    keeps: float | None = 0.0
    dropped: Tensor | None = None
    tracks: bool = False

    def header(self, ex: Exchange) -> Header:
        """Of this member's contribution."""
        return replace(ex.header, sender=ex.rank, weight=self.weight, flags=Flag.ABSTAINS if self.abstains else 0)


@dataclass(frozen=True)
class Outcome:
    """What came back.

    combined  [n], or None if a packet was damaged or nobody contributed
    sent      [n] what others read of this member's vector; None if nobody asked, or nothing came back
    dropped   as in `Leg`, after this exchange
    """

    combined: Tensor | None
    sent: Tensor | None = None
    dropped: Tensor | None = None


@dataclass(frozen=True)
class Mingled:
    """What came back from a graph's neighbours.

    combined  [n], or None if nobody's values are finite
    present   ranks that it is made of, ascending
    damaged   ranks that were left out because their packets were
    """

    combined: Tensor | None
    present: tuple[int, ...]
    damaged: tuple[int, ...]


@dataclass
class Work:
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


def carry(work: Work, route: Group, leg: Leg) -> Outcome:
    """Take a vector through a group, the way that its codec and rule declare."""
    traits, needs = leg.codec.traits, leg.rule.needs
    if traits.summable and needs == "sum" and not leg.rule.weighs:
        return _sum_packets(work, route, leg)
    if len(route.ranks) > 2 and traits.linear and needs == "sum":
        return _all_reduce(work, route, leg)
    if len(route.ranks) > 2 and traits.reencodes and needs != "rows" and leg.keeps is not None:
        return _scatter_gather(work, route, leg)
    return _gather(work, route, leg)


def mingle(work: Work, route: Neighbours, leg: Leg) -> Mingled:
    """Tell some members, hear some, and take the mean of these and the own vector by the route's weights."""
    ex, n, codec = work.ex, leg.x.numel(), leg.codec
    keys = {sender: mix(leg.key, 0, sender) for sender in route.weights}
    packet = Packet(codec.spec, n, codec.encode(leg.x, keys[ex.rank]), leg.header(ex))
    told, heard = (others_of(tuple(sorted({*ranks, ex.rank})), ex.rank) for ranks in (route.to, route.weights))
    arrived = work.swap(
        dict.fromkeys(told, packet),
        {rank: replace(ex.header, sender=rank) for rank in heard},
        codec.spec,
        dict.fromkeys(heard, codec.layout(n)),
        dict.fromkeys(heard, n),
    )
    rows, damaged = {}, []
    for sender, found in sorted({**arrived, ex.rank: packet}.items()):
        row = None if found is None else work.decode(found, codec, n, keys[sender], leg.x.device)
        if found is None or row is None:
            damaged.append(sender)
        elif not found.header.flags & Flag.ABSTAINS:
            rows[sender] = row
    weights = shares(route, ex.rank, rows)
    combined = merge(WeightedMean(), *rows_of(((row, weights[rank]) for rank, row in rows.items()), leg.x))
    return Mingled(combined, tuple(rows), tuple(damaged))


def _gather(work: Work, route: Group, leg: Leg) -> Outcome:
    """Everybody sends its contribution to all and combines all of them."""
    ex, n, codec = work.ex, leg.x.numel(), leg.codec
    keys = {sender: mix(leg.key, 0, sender) for sender in route.ranks}
    if codec.traits.linear:  # its codes mean the same on all members in every way that it goes
        keys = dict.fromkeys(route.ranks, mix(leg.key, 2))
    packet = Packet(codec.spec, n, codec.encode(leg.x, keys[ex.rank]), leg.header(ex))
    others = others_of(route.ranks, ex.rank)
    arrived = work.swap(
        dict.fromkeys(others, packet),
        {rank: replace(ex.header, sender=rank) for rank in others},
        codec.spec,
        dict.fromkeys(others, codec.layout(n)),
        dict.fromkeys(others, n),
    )
    read_of = decode_all(work, {**arrived, ex.rank: packet}, codec, n, keys, leg.x.device)
    if read_of is None:
        return Outcome(None, dropped=leg.dropped)
    sent = read_of[ex.rank][0] if leg.tells else None
    return Outcome(merge(leg.rule, *rows_of(read_of.values(), leg.x)), sent, leg.dropped)


def _scatter_gather(work: Work, route: Group, leg: Leg) -> Outcome:
    """Each member combines one shard; everybody collects the combined shards."""
    ex, ranks, codec, x = work.ex, route.ranks, leg.codec, leg.x
    bounds = dict(zip(ranks, shards(x.numel(), len(ranks), route.shares), strict=True))
    sizes = {rank: end - begin for rank, (begin, end) in bounds.items()}
    parts = {rank: codec.part(*bounds[rank]) for rank in ranks}
    of_mine = {owner: mix(leg.key, 0, ex.rank, owner) for owner in ranks}
    for_mine = {sender: mix(leg.key, 0, sender, ex.rank) for sender in ranks}
    header = leg.header(ex)
    packets = {
        rank: Packet(codec.spec, sizes[rank], parts[rank].encode(x[begin:end], of_mine[rank]), header)
        for rank, (begin, end) in bounds.items()
    }
    arrived = _to_owners(work, route, leg, packets, parts[ex.rank], sizes)
    mine, part = sizes[ex.rank], parts[ex.rank]
    contributions = {**arrived, ex.rank: packets[ex.rank]}
    read_of = decode_all(work, contributions, part, mine, for_mine, x.device)
    share = _share(contributions, read_of) if leg.tracks and read_of is not None else 1.0
    merged = None if read_of is None else merge(leg.rule, *rows_of(read_of.values(), x[:mine]))
    flags = Flag.FAILED if read_of is None else Flag.ABSTAINS if merged is None else 0
    vector = x.new_zeros(mine) if merged is None else merged
    if leg.dropped is not None:
        vector = vector.add(leg.dropped, alpha=(leg.keeps or 0.0) / share)
    again = mix(leg.key, 1, ex.rank)
    fields = part.encode(vector, again)
    dropped = (vector - part.decode(fields, mine, again)).mul_(share) if leg.keeps else None
    result = Packet(codec.spec, mine, fields, replace(ex.header, kind=Kind.RESULT, sender=ex.rank, flags=flags))
    collected = _from_owners(work, route, leg, result, parts, sizes)
    finals = {rank: mix(leg.key, 1, rank) for rank in ranks}
    combined = _joined(work, collected, parts, sizes, finals, x)
    sent = None
    if leg.tells:
        read = (parts[rank].decode(p.fields, sizes[rank], of_mine[rank]) for rank, p in packets.items())
        sent = torch.cat(list(read))
    return Outcome(None if combined is None else torch.cat([part for part, _ in combined]), sent, dropped)


def _sum_packets(work: Work, route: Group, leg: Leg) -> Outcome:
    """Shards of packets are added by their owners without being decoded, and the sums decoded by all."""
    ex, ranks, codec, x = work.ex, route.ranks, leg.codec, leg.x
    bounds = dict(zip(ranks, shards(x.numel(), len(ranks), route.shares), strict=True))
    sizes = {rank: end - begin for rank, (begin, end) in bounds.items()}
    parts = {rank: codec.part(*bounds[rank]) for rank in ranks}
    keys = {owner: mix(leg.key, 2, owner) for owner in ranks}  # of all senders: codes mean the same
    packets = {
        rank: Packet(codec.spec, sizes[rank], parts[rank].encode(x[begin:end], keys[rank]), leg.header(ex))
        for rank, (begin, end) in bounds.items()
    }
    arrived = _to_owners(work, route, leg, packets, parts[ex.rank], sizes)
    result = _added(work, {**arrived, ex.rank: packets[ex.rank]}, parts[ex.rank], sizes[ex.rank], packets[ex.rank])
    collected = _from_owners(work, route, leg, result, parts, sizes)
    sums = _joined(work, collected, parts, sizes, keys, x)
    combined = None if sums is None else torch.cat([total / weight for total, weight in sums])
    sent = None
    if leg.tells:
        sent = torch.cat([parts[rank].decode(p.fields, sizes[rank], keys[rank]) for rank, p in packets.items()])
    return Outcome(combined, sent, leg.dropped)


def _added(work: Work, packets: Mapping[int, Packet | None], part: Codec, n: int, own: Packet) -> Packet:
    """What an owner makes of contributions that add up; the weight is how many there are."""
    ex = work.ex
    head = replace(ex.header, kind=Kind.RESULT, sender=ex.rank, weight=1.0)
    given = [packet for _, packet in sorted(packets.items()) if packet is not None]
    counted = [packet.fields for packet in given if not packet.header.flags & Flag.ABSTAINS]
    if len(given) < len(packets):
        return replace(own, header=replace(head, flags=Flag.FAILED))
    if not counted:
        return replace(own, header=replace(head, flags=Flag.ABSTAINS))
    try:
        fields = part.add(counted, n)
    except PacketError as error:
        work.faults.append(error.wrong)
        return replace(own, header=replace(head, flags=Flag.FAILED))
    return Packet(own.codec, n, fields, replace(head, weight=float(len(counted))))


def _all_reduce(work: Work, route: Group, leg: Leg) -> Outcome:
    """Add codes and decode the sum: all members encode with one key, so that codes mean the same."""
    key = mix(leg.key, 2)
    (name, code), *rest = leg.codec.encode(leg.x, key).items()
    assert not rest, "a linear codec writes one field"
    n = leg.x.numel()
    sent = leg.codec.decode({name: code}, n, key) if leg.tells else None
    plain = replace(leg, codec=FP32(), x=code, tells=False, keeps=0.0, dropped=None)
    summed = _scatter_gather(work, route, plain).combined
    return Outcome(None if summed is None else leg.codec.decode({name: summed}, n, key), sent, leg.dropped)


def _to_owners(
    work: Work, route: Group, leg: Leg, packets: Mapping[int, Packet], part: Codec, sizes: Mapping[int, int]
) -> dict[int, Packet | None]:
    """Send every owner its shard; returns the others' contributions to this member's own shard."""
    ex, mine = work.ex, sizes[work.ex.rank]
    others = others_of(route.ranks, ex.rank)
    return work.swap(
        {rank: packets[rank] for rank in others if sizes[rank]},
        {rank: replace(ex.header, sender=rank) for rank in others if mine},
        leg.codec.spec,
        dict.fromkeys(others, part.layout(mine)),
        dict.fromkeys(others, mine),
    )


def _from_owners(
    work: Work, route: Group, leg: Leg, result: Packet, parts: Mapping[int, Codec], sizes: Mapping[int, int]
) -> dict[int, Packet | None]:
    """Send everybody the own shard's result; returns all results, the own one included."""
    ex = work.ex
    others = others_of(route.ranks, ex.rank)
    collected = work.swap(
        dict.fromkeys(others, result) if sizes[ex.rank] else {},
        {rank: replace(ex.header, kind=Kind.RESULT, sender=rank) for rank in others if sizes[rank]},
        leg.codec.spec,
        {rank: parts[rank].layout(sizes[rank]) for rank in others},
        sizes,
    )
    return {**collected, ex.rank: result}


def _joined(
    work: Work, packets: Mapping[int, Packet | None], parts: Mapping[int, Codec], sizes: Mapping[int, int],
    keys: Mapping[int, int], like: Tensor,
) -> list[tuple[Tensor, float]] | None:  # fmt: skip
    """The combined shards in order, with their weights; None if one is missing, failed, or empty: all abstained."""
    found = [(like.new_zeros(0), 1.0)]
    for rank in sizes:
        if not sizes[rank]:
            continue
        packet = packets.get(rank)
        if packet is None or packet.header.flags:
            return None
        part = work.decode(packet, parts[rank], sizes[rank], keys[rank], like.device)
        if part is None:
            return None
        found.append((part, packet.header.weight))
    return found


def shards(n: int, count: int, shares: Sequence[float] = ()) -> list[tuple[int, int]]:
    """[begin, end) of each of `count` shards of n elements, in blocks of 256; some may be empty.

    shares  of each, in any unit; empty: as even as whole blocks allow
    """
    blocks = -(-n // _ALIGN)
    ends = list(itertools.accumulate(shares, initial=0.0))
    even = [blocks * index // count for index in range(count + 1)]
    cuts = [round(blocks * end / ends[-1]) for end in ends] if shares else even
    return list(itertools.pairwise(min(n, cut * _ALIGN) for cut in cuts))


def decode_all(
    work: Work, packets: Mapping[int, Packet | None], codec: Codec, n: int, keys: Mapping[int, int],
    device: torch.device,
) -> dict[int, tuple[Tensor, float]] | None:  # fmt: skip
    """Contributions and their weights by ascending rank, 0 for those that do not count; None if one was damaged.

    keys  what each sender encoded with
    """
    found = {}
    for sender, packet in sorted(packets.items()):
        row = None if packet is None else work.decode(packet, codec, n, keys[sender], device)
        if packet is None or row is None:
            return None
        found[sender] = row, 0.0 if packet.header.flags & Flag.ABSTAINS else packet.header.weight
    return found


def rows_of(read_of: Iterable[tuple[Tensor, float]], like: Tensor) -> tuple[Tensor, Tensor]:
    """Those that count, as rows [m, n] and weights [m]."""
    counted = [(row, weight) for row, weight in read_of if weight > 0]
    weights = torch.tensor([weight for _, weight in counted], dtype=torch.float64)
    if len(counted) == 1:
        return counted[0][0].unsqueeze(0), weights  # no copy
    return torch.stack([row for row, _ in counted]) if counted else like.new_zeros(0, len(like)), weights


def _share(packets: Mapping[int, Packet | None], read_of: Mapping[int, tuple[Tensor, float]]) -> float:
    """Of the weight of all contributions, how much counts; 1 if none does, since nothing comes of that."""
    counted = sum(weight for _, weight in read_of.values())
    total = sum(packet.header.weight for _, packet in sorted(packets.items()) if packet is not None)
    return counted / total if counted else 1.0


def merge(rule: Aggregator, rows: Tensor, weights: Tensor) -> Tensor | None:
    """What the rule makes of the rows; None of none."""
    return rule.combine(rows, weights) if len(rows) else None


def others_of(ranks: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """The other ranks, starting after our own, so that not everybody sends to the same member first."""
    at = ranks.index(rank)
    return ranks[at + 1 :] + ranks[:at]
