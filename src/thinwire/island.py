"""The members of an island decide together, since each has only a part of one model.

A round is carried out part by part, each by the members of equal rank, one of every island. A part that took effect
alone would tear the model, so a round has a frame within the island:

    tell whether what I send is finite, and its weight   ── not all are: the whole island abstains; weights add up
        the round itself, across
    tell how it ended here                               ── not all committed: nobody does, and all say why

Size   two messages of some 50 bytes to every other member of the island in every round.
Loss   whoever loses a member across tells its island before it raises PeerLost, and the others raise it too, with the
       same members: those of `across`, that is islands. So all members of all islands learn of it within their time
       limits, or at once where a connection breaks. Nothing is committed by an island of which one part failed; as
       everywhere, a loss in a verdict's last moment may leave survivors a round apart, which a resumed run finds out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, replace
from typing import Any

import torch
from torch import Tensor

from thinwire.collectives import Carried, Combined, finite, gather_packets
from thinwire.errors import LinkError, PeerLost, ThinwireError
from thinwire.handshake import all_of
from thinwire.links.base import Channel, Link
from thinwire.pace import Told
from thinwire.packet import Header, Kind, Layout, Packet

_MOST_BYTES = 1 << 12
_WORDS = 500  # characters of a reason that are passed on: six bytes each at most

#: The round itself: what is sent and its weight -> what came of it.
Run = Callable[[Tensor, float], Combined]


class Island:
    """A member among those that hold the other parts of its model."""

    def __init__(self, link: Link) -> None:
        self.link = link

    def frame(self, what: str) -> Callable[[Run, Tensor, float, Carried], Combined]:
        """What to run a round in; made by the caller, in the order of rounds, and called by the round's job."""
        channel = self.link.open("island")

        def framed(run: Run, x: Tensor, weight: float, carried: Carried) -> Combined:
            told = self._tell(channel, {"finite": finite(x), "weight": weight}, what)
            if not all(facts["finite"] for facts in told):
                x = torch.full_like(x, torch.nan)  # what makes a member abstain
            try:
                combined = run(x, math.fsum(facts["weight"] for facts in told))
            except Exception as error:
                with suppress(ThinwireError):  # the first error is the one to be seen
                    self._tell(channel, _failure(error), what)
                raise
            ended = {"committed": combined.update is not None, "reason": combined.reason[:_WORDS]}
            return _together(combined, carried, self._tell(channel, ended, what), what)

        return framed

    def all_of(self, holds: bool) -> bool:
        """Whether something holds on every member; all of them call it."""
        return all_of(self.link, holds)

    def told(self, told: Mapping[int, Told]) -> dict[int, Told]:
        """What every island has told on which its pace depends, by what its members have; all of them call it.

        An island is as slow as its slowest member; samples and squares add up.
        """
        rows = torch.tensor([astuple(each) for each in told.values()], dtype=torch.float64)  # [islands, numbers]
        packet = Packet("pace", 0, {"numbers": rows.flatten()}, Header(sender=self.link.rank))
        layout: Layout = {"numbers": (torch.float64, rows.numel())}
        channel, what = self.link.open("island"), "the pace within the island"
        found = gather_packets(channel, self.link.rank, self.link.members, packet, layout, what)
        parts = [each.fields["numbers"].view(rows.shape).tolist() for each in found.values()]
        return {rank: _joined([Told(*part[place]) for part in parts]) for place, rank in enumerate(told)}

    def gather(self, vector: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Everybody's vector, by rank.  float32 [sizes[rank]]"""
        packet = Packet("shares", 0, {"value": vector}, Header(sender=self.link.rank))
        layout: Layout = {"value": (torch.float32, max(sizes))}
        channel, what = self.link.open("island"), "shares within the island"
        found = gather_packets(channel, self.link.rank, self.link.members, packet, layout, what)
        return [each.fields["value"].to(vector.device) for each in found.values()]

    def _tell(self, channel: Channel, facts: Mapping[str, Any], what: str) -> list[dict[str, Any]]:
        text = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
        packet = Packet("json", 0, {"text": text}, Header(kind=Kind.HELLO, sender=self.link.rank))
        layout: Layout = {"text": (torch.uint8, _MOST_BYTES)}
        found = gather_packets(channel, self.link.rank, self.link.members, packet, layout, f"{what} within the island")
        return [json.loads(bytes(each.fields["text"].numpy()).decode()) for each in found.values()]


def _joined(parts: Sequence[Told]) -> Told:
    return Told(
        step_s=max(part.step_s for part in parts),
        samples=math.fsum(part.samples for part in parts),
        lr=parts[0].lr,
        round_s=max(part.round_s for part in parts),
        size2=math.fsum(part.size2 for part in parts) if all(part.size2 >= 0 for part in parts) else -1.0,
        update2=math.fsum(part.update2 for part in parts),
    )


def _failure(error: Exception) -> dict[str, Any]:
    text = str(error).splitlines()[0][:_WORDS] if str(error) else type(error).__name__
    return {"lost": list(error.ranks) if isinstance(error, PeerLost) else None, "failed": text}


def _together(combined: Combined, before: Carried, told: list[dict[str, Any]], what: str) -> Combined:
    """What a round comes to on all parts, by what it came to on each."""
    for part, facts in enumerate(told):
        if facts.get("lost"):
            raise PeerLost(facts["lost"], during=what, why=f"part {part} of this island's model cannot reach it")
        if "failed" in facts:
            raise LinkError(
                f"{what} failed on part {part} of this island's model: {facts['failed']}",
                expected="a round of all parts",
                mend="see that member's own output; resume all members from the last checkpoint",
            )
    reasons = [facts["reason"] for facts in told if not facts["committed"]]
    if combined.update is None or not reasons:
        return combined if not reasons else replace(combined, reason=reasons[0])
    return replace(combined, update=None, carried=before, ranks=(), reason=reasons[0])
