"""What a few members have to tell, to all of them, over any link: nobody's line carries much more than everybody's.

Each packet goes down a binary tree of its own. Its sender is the root, the others follow it round a circle, the one at
distance v passing on to those at 2v + 1 and 2v + 2: half of the members pass a packet on, twice. Senders sit evenly
around the circle, so that everybody is in the passing half for about every second packet.

Size    m packets told to N members: m received by each; m + 2 sent at most, by anyone. Told directly (gather_packets),
        a sender would send N - 1.
Cost    ceil(log2(N + 1)) - 1 exchanges, one after the other
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from thinwire.links.base import Channel, Link
from thinwire.packet import Header, Layout, Packet, check, read, wire_bytes

#: (sender of the packet, who passes it on, to whom)
Hop = tuple[int, int, int]


def hops(members: Sequence[int], senders: Sequence[int]) -> list[list[Hop]]:
    """The way of all packets, exchange by exchange; all members plan alike."""
    circle, size = _around(members, senders), len(members)
    levels: list[list[Hop]] = []
    first = 0  # distance of the nodes of a level from the root: from first to 2 first
    while 2 * first + 1 < size:
        nodes = range(first, min(2 * first + 1, size))
        levels.append([
            (sender, circle[(place + v) % size], circle[(place + child) % size])
            for sender in sorted(senders)
            for place in [circle.index(sender)]
            for v in nodes
            for child in (2 * v + 1, 2 * v + 2)
            if child < size
        ])  # fmt: skip
        first = 2 * first + 1
    return levels


def _around(members: Sequence[int], senders: Sequence[int]) -> list[int]:
    """Members with the senders evenly spaced among them."""
    others, circle = [rank for rank in members if rank not in senders], list[int]()
    for number, sender in enumerate(sorted(senders)):
        begin, end = (len(others) * each // len(senders) for each in (number, number + 1))
        circle += [sender, *others[begin:end]]
    return circle


def spread(
    link: Link, channel: Channel, senders: Sequence[int], own: Packet | None, header: Header, layout: Layout,
    codec: str, n: int, what: str,
) -> dict[int, Packet]:  # fmt: skip
    """Every sender's packet to every member, by rank.

    own     this member's, if it is a sender
    header  round and context of those due
    layout  the exact sizes of fields, alike for all
    raises  PacketError, PeerLost
    """
    size, me = wire_bytes(codec, layout), link.rank
    held: dict[int, Tensor] = {} if own is None else {me: own.to_bytes()}
    for level in hops(link.members, senders):
        gives: dict[int, list[int]] = {}
        takes: dict[int, list[int]] = {}
        for sender, source, to in level:
            if source == me:
                gives.setdefault(to, []).append(sender)
            elif to == me:
                takes.setdefault(source, []).append(sender)
        if gives or takes:
            outgoing = {to: torch.cat([held[sender] for sender in those]) for to, those in gives.items()}
            incoming = {source: size * len(those) for source, those in takes.items()}
            for source, buffer in channel.exchange(outgoing, incoming, what).items():
                held.update(zip(takes[source], buffer.split(size), strict=True))  # type: ignore[no-untyped-call]
    found = {sender: read(held[sender]) for sender in sorted(senders)}
    due = {sender: Header(sender=sender, round=header.round, context=header.context) for sender in found}
    return {sender: check(packet, header=due[sender], codec=codec, n=n) for sender, packet in found.items()}
