"""Packets of a few members reach all, once each, and nobody's line carries much more than everybody's."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import thinwire
from thinwire.errors import PacketError
from thinwire.packet import Header, Packet, wire_bytes
from thinwire.seeds.spread import hops, spread

CASES = [(1, 1), (2, 1), (2, 2), (3, 2), (5, 5), (8, 3), (13, 4), (64, 10), (200, 10), (31, 1)]


@pytest.mark.parametrize(("members", "senders"), CASES)
def test_every_packet_reaches_every_member_once_from_somebody_who_has_it(members, senders):
    senders = sorted({(7 * number) % members for number in range(senders)})
    has = {(sender, sender) for sender in senders}
    for level in hops(range(members), senders):
        came = []
        for sender, source, to in level:
            assert (sender, source) in has
            assert (sender, to) not in has
            came.append((sender, to))
        assert len(set(came)) == len(came)
        has |= set(came)
    assert has == {(sender, rank) for sender in senders for rank in range(members)}


@pytest.mark.parametrize(("members", "senders"), CASES)
@pytest.mark.parametrize("spacing", [1, 7])
def test_nobody_sends_more_than_two_packets_beyond_what_it_hears(members, senders, spacing):
    """Also where all senders are neighbours by rank."""
    senders = sorted({(spacing * number) % members for number in range(senders)})
    sent = Counter(source for level in hops(range(members), senders) for _, source, _ in level)
    assert max(sent.values(), default=0) <= len(senders) + 2
    assert len(hops(range(members), senders)) == members.bit_length() - 1


def job(senders, damage=None):
    layout = {"x": (torch.float32, 3)}

    def member(link):
        header = Header(sender=link.rank, round=4, context=9)
        own = Packet("plain", 3, {"x": torch.full((3,), float(link.rank))}, header) if link.rank in senders else None
        if damage == link.rank:
            own = own.stamped(Header(sender=link.rank, round=5, context=9))
        found = spread(link, link.open("pool"), senders, own, header, layout, "plain", 3, "round 4")
        return {rank: packet.fields["x"].tolist() for rank, packet in found.items()}, link.meter.total()

    return member, wire_bytes("plain", layout)


@pytest.mark.parametrize("members", [1, 2, 3, 6, 9])
def test_over_a_link_all_hear_the_same(members):
    senders = tuple(rank for rank in range(members) if rank % 3 == 0)
    member, size = job(senders)
    for rank, (found, traffic) in enumerate(thinwire.run(members, member)):
        assert found == {sender: [float(sender)] * 3 for sender in senders}
        assert traffic.received_bytes == size * (len(senders) - (rank in senders))
        assert traffic.sent_bytes <= size * (len(senders) + 2)


def test_a_packet_of_another_round_is_refused():
    member, _ = job((0, 2), damage=2)
    with pytest.raises(PacketError, match="a packet from member 2 came with round 5"):
        thinwire.run(4, member)
