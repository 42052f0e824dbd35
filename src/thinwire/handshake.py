"""Who is there, and do we mean the same: members compare versions, method, model and initial weights before a round."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn

from thinwire.collectives import gather_packets
from thinwire.errors import ConfigError, PacketError
from thinwire.fragments import digest
from thinwire.links.base import Link
from thinwire.packet import WIRE_VERSION, Header, Kind, Packet
from thinwire.sharding import local

_MOST_BYTES = 1 << 16
_MEND = {
    "weights": "seed every member alike before it builds the model, or call thinwire.broadcast(model, link) first",
    "version": "install the same version of thinwire on all members",
    "model": "build the same model, with the same parameters trainable, on all members",
    "shards": "shard alike in all islands (the same mesh and fully_shard), and let `across` join members of equal rank",
    "state": "load the checkpoint of the same step on all members",
}


def agree(link: Link, facts: Mapping[str, str]) -> int:
    """Compare facts with all members.

    facts    name -> what this member holds, e.g. {"method.codec": "int4", "weights": "9f0c..."}
    returns  64-bit digest of what was agreed on: the `context` of all packets that follow
    raises   ConfigError naming the first fact that differs, and who differs
    """
    told = {"wire version": str(WIRE_VERSION), **facts}
    everyone = tell(link, told)
    for name in sorted({name for facts in everyone.values() for name in facts}):
        _compare(name, {rank: facts.get(name, "nothing") for rank, facts in everyone.items()})
    whole = json.dumps(told, sort_keys=True).encode() + repr(link.members).encode()
    return int.from_bytes(hashlib.blake2b(whole, digest_size=8).digest(), "little")


def tell(link: Link, facts: Mapping[str, str]) -> dict[int, dict[str, str]]:
    """What every member holds, by rank; all members call it."""
    text = json.dumps(facts, sort_keys=True).encode()
    if len(text) > _MOST_BYTES:
        raise ConfigError(
            f"{len(text)} bytes to agree on", expected=f"at most {_MOST_BYTES}", mend="use shorter options"
        )
    packet = Packet(
        "json",
        0,
        {"text": torch.frombuffer(bytearray(text), dtype=torch.uint8)},
        Header(kind=Kind.HELLO, sender=link.rank),
    )
    found = gather_packets(
        link.open("handshake"), link.rank, link.members, packet, {"text": (torch.uint8, _MOST_BYTES)}, "the handshake"
    )
    return {rank: _parse(packet) for rank, packet in found.items()}


def all_of(link: Link, holds: bool) -> bool:
    """Whether something holds on every member; all members call it."""
    packet = Packet(
        "flag", 0, {"holds": torch.tensor([holds], dtype=torch.uint8)}, Header(kind=Kind.HELLO, sender=link.rank)
    )
    channel = link.open("handshake")
    found = gather_packets(channel, link.rank, link.members, packet, {"holds": (torch.uint8, 1)}, "the handshake")
    return all(bool(packet.fields["holds"].all()) for packet in found.values())


def broadcast(model: nn.Module, link: Link) -> None:
    """Give all members member 0's parameters and buffers, bit for bit; all members call it. Across islands, the shards.

    raises  ConfigError if the models differ in more than values
    """
    tensors = [local(value) for value in model.state_dict().values()]
    named = zip(model.state_dict(), tensors, strict=True)
    shapes = repr([(name, tuple(value.shape), str(value.dtype)) for name, value in named])
    context = agree(link, {"model": digest(torch.frombuffer(bytearray(shapes.encode()), dtype=torch.uint8)).hex()})
    raw = torch.cat([value.detach().cpu().contiguous().view(-1).view(torch.uint8) for value in tensors])
    mine = raw if link.rank == 0 else raw[:0]
    header = Header(sender=link.rank, context=context)
    packet = Packet("raw", 0, {"bytes": mine}, header)
    channel = link.open("broadcast")
    found = gather_packets(channel, link.rank, link.members, packet, {"bytes": (torch.uint8, raw.numel())}, "broadcast")
    pieces = found[0].fields["bytes"].split_with_sizes([value.numel() * value.element_size() for value in tensors])
    for value, piece in zip(tensors, pieces, strict=True):
        value.copy_(piece.clone().view(value.dtype).view(value.shape))


def _parse(packet: Packet) -> dict[str, str]:
    try:
        facts = json.loads(bytes(packet.fields["text"].numpy()).decode())
    except (KeyError, ValueError, RecursionError) as error:
        raise PacketError(f"member {packet.header.sender} said hello in no words of ours") from error
    if not isinstance(facts, dict):
        raise PacketError(f"member {packet.header.sender} said hello with no table of facts")
    return {str(name): str(value) for name, value in facts.items()}


def _compare(name: str, values: Mapping[int, str]) -> None:
    if len(set(values.values())) == 1:
        return
    most, _ = Counter(values.values()).most_common(1)[0]
    odd = {rank: value for rank, value in values.items() if value != most}
    told = "; ".join(f"member {rank} has {value}" for rank, value in odd.items())
    raise ConfigError(
        f"members disagree on {name}: {told}; the others have {most}",
        expected=f"the same {name} on all members",
        mend=_MEND.get(name.split(".")[0], "give all members the same configuration"),
    )
