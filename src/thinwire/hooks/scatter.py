"""Reduce-scatter: every member sends each of the others the shard that is theirs, written small, and gets its own.

    out_r = mean_i C(x_i)[r]        r: the rank, [r]: its row of x viewed as [members, m]

A packet is written once and never combined with a second loss, so any codec will do; of codecs that are summable the
packets are added as they are and decoded once (TAGC's setting, arXiv:2504.05638).

Size    (N-1)/N of the encoded vector sent per member: half of what an all-reduce of the same codec takes.
Differs from other rounds: members end with different shards, so there is nothing to compare. A packet that is damaged
        is an error on the member that reads it, and is not sent again.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from thinwire.aggregators import Mean
from thinwire.codecs import Codec, Feedback, How, Staged
from thinwire.codecs.feedback import Place
from thinwire.codecs.stages import Tensors
from thinwire.errors import PacketError
from thinwire.packet import Flag, Packet
from thinwire.randomness import mix
from thinwire.ways import Exchange, Work, decode_all, merge, others_of, rows_of


def scatters(how: How) -> bool:
    """Whether a member needs nothing but its own shard: one exchange, and no memory of what all members hold."""
    codec = how.codec if isinstance(how, Feedback) else how
    if isinstance(codec, Staged):
        return False
    if not isinstance(how, Feedback):
        return True
    _, shared = how.receive(torch.zeros(1), {}, 1.0)
    return not (shared or how.tracks or how.weighs)


def scatter_mean(ex: Exchange, x: Tensor, own: Tensors) -> tuple[Tensor | None, Tensors, tuple[int, ...]]:
    """A round of a `how` that scatters.

    x        float32 [members * m]; if it is not finite this member abstains
    own      feedback's memory of this member
    returns  the mean of this member's row [m] (None if nobody's values are finite), own after it, who took part
    raises   PeerLost, PacketError
    """
    ranks = ex.witnesses
    abstains = not bool(x.isfinite().all())
    if abstains:
        x = torch.zeros_like(x)
    feedback, codec = (ex.how, ex.how.codec) if isinstance(ex.how, Feedback) else (None, ex.how)
    assert isinstance(codec, Codec)
    target, held = feedback.prepare(x, own, {}, Place(ex.rank, ranks)) if feedback else (x, own)
    m = len(x) // len(ranks)
    rows = dict(zip(ranks, target.view(len(ranks), m), strict=True))
    parts = {rank: codec.part(at * m, (at + 1) * m) for at, rank in enumerate(ranks)}
    alike = codec.traits.linear or codec.traits.summable  # codes mean the same whoever wrote them
    keys = {
        owner: {sender: mix(ex.key, 2, owner) if alike else mix(ex.key, 0, sender, owner) for sender in ranks}
        for owner in ranks
    }
    header = replace(ex.header, sender=ex.rank, flags=Flag.ABSTAINS if abstains else 0)
    packets = {
        rank: Packet(codec.spec, m, parts[rank].encode(row, keys[rank][ex.rank]), header) for rank, row in rows.items()
    }
    others, mine = others_of(ranks, ex.rank), parts[ex.rank]
    work = Work(ex)
    arrived = work.swap(
        {rank: packets[rank] for rank in others},
        {rank: replace(ex.header, sender=rank) for rank in others},
        codec.spec,
        dict.fromkeys(others, mine.layout(m)),
        dict.fromkeys(others, m),
    )
    shard, present = _mean(work, {**arrived, ex.rank: packets[ex.rank]}, mine, m, keys[ex.rank], x)
    if feedback and not abstains:
        sent = [parts[rank].decode(packet.fields, m, keys[rank][ex.rank]) for rank, packet in packets.items()]
        own = feedback.commit(target, held, torch.cat(sent))
    return shard, own, present


def _mean(
    work: Work, arrived: dict[int, Packet | None], part: Codec, m: int, keys: dict[int, int], like: Tensor
) -> tuple[Tensor | None, tuple[int, ...]]:
    """The mean of one shard's contributions, and whose they are."""
    packets = {rank: packet for rank, packet in sorted(arrived.items()) if packet is not None}
    counted = {rank: packet for rank, packet in packets.items() if not packet.header.flags & Flag.ABSTAINS}
    mean = None
    if part.traits.summable and counted and not work.faults:
        fields = part.add([packet.fields for packet in counted.values()], m)
        mean = part.decode(fields, m, keys[work.ex.rank]).to(like.device) / len(counted)
    elif not work.faults:
        read_of = decode_all(work, packets, part, m, keys, like.device)
        mean = None if read_of is None else merge(Mean(), *rows_of(read_of.values(), like[:m]))
    if work.faults:
        raise PacketError(f"{work.ex.what}: " + "; ".join(work.faults), expected="every member's gradients")
    return mean, tuple(counted)
