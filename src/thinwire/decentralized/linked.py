"""DADAO on a link: every member is a node, with a thread for its gradient beside the one that gossips.

Nobody coordinates. Both ends of an edge read the same clock (clocks.py), so each member knows its own events and their
order; it goes through them and waits only for the neighbour that the next one concerns, never for the group. That ends:
of all events that are left the earliest has both its ends ready. The gradient of a member's next gradient event depends
on nothing that gossip brings until then, so it is computed in a job beside the exchanges.

A message carries the number and time of its event and a digest of what the run was started with; anything else than
what is due is a PacketError, and a neighbour that is silent too long is PeerLost, as everywhere on a link.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.decentralized.clocks import Event, events
from thinwire.decentralized.dadao import (
    Constants,
    Gradient,
    Node,
    advance,
    constants,
    evaluate,
    gossip_event,
    gradient_event,
    offer,
    start,
)
from thinwire.decentralized.graphs import Gossip
from thinwire.errors import ConfigError, PacketError
from thinwire.links.base import Channel, Handle, Link
from thinwire.packet import Header, Packet, check, read, wire_bytes

#: Called with an event's time before it; may wait for it.
Pace = Callable[[float], None]

_EXCHANGES = 1000  # in one channel between two members: the torch link has tags for 1024
_CODEC = "dadao"


@dataclass(frozen=True)
class _Wire:
    """A member's way to its neighbours. Channels are opened by all alike: as many as the busiest edge needs."""

    link: Link
    channels: tuple[Channel, ...]
    context: int
    d: int

    def trade(self, event: Event, own: Tensor) -> Tensor:
        """Give the other end of the event's edge ours, and get its."""
        (peer,) = (rank for rank in event.nodes if rank != self.link.rank)
        mine = Header(sender=self.link.rank, round=event.turn, context=self.context)
        moment = torch.tensor([event.time], dtype=torch.float64)
        buffer = Packet(_CODEC, self.d, {"time": moment, "value": own}, mine).to_bytes()
        most = wire_bytes(_CODEC, {"time": (torch.float64, 1), "value": (torch.float64, self.d)})
        what = f"gossip {event.turn} of members {event.nodes[0]} and {event.nodes[1]}"
        arrived = self.channels[event.turn // _EXCHANGES].exchange({peer: buffer}, {peer: most}, what)[peer]
        theirs = Header(sender=peer, round=event.turn, context=self.context)
        fields = check(read(arrived), header=theirs, codec=_CODEC, n=self.d).fields
        layout = {name: (value.dtype, value.numel()) for name, value in fields.items()}
        if layout != {"time": (torch.float64, 1), "value": (torch.float64, self.d)} or fields["time"] != moment:
            raise PacketError(f"member {peer} sent something else than event {event.turn} at {event.time}")
        return fields["value"]


def run_on(
    link: Link,
    gradient: Gradient,
    gossip: Gossip,
    *,
    smoothness: float,
    convexity: float,
    x0: Tensor,
    horizon: float,
    seed: int = 0,
    pace: Pace | None = None,
) -> Node:
    """This member's part; all members call it with the same arguments but for `gradient`, their own function's.

    x0       float64 [d], where all start
    pace     `real_time(...)` lets events happen when the wall's clock says; None: as soon as they can
    returns  this member's node at `horizon`; the bits that `simulate` gives
    """
    if link.members != tuple(range(gossip.graph.nodes)):
        raise ConfigError(
            f"{len(link.members)} members on a graph of {gossip.graph.nodes} nodes",
            expected="one member a node",
            mend="make the graph for as many nodes as there are members",
        )
    c = constants(smoothness, convexity, gossip)
    everything = events(gossip, seed, horizon)
    mine = [event for event in everything if link.rank in event.nodes]
    busiest = max((event.turn for event in everything if len(event.nodes) == 2), default=-1)
    channels = tuple(link.open("gossip") for _ in range(busiest // _EXCHANGES + 1))
    wire = _Wire(link, channels, _context(gossip, smoothness, convexity, horizon, seed, x0), len(x0))
    times = iter([event.time for event in mine if len(event.nodes) == 1])
    node = start(x0)
    ahead = _begin(link, gradient, c, node, next(times, None))
    for event in mine:
        if pace is not None:
            pace(event.time)
        if len(event.nodes) == 1:
            assert ahead is not None
            node = gradient_event(c, node, event.time, ahead.wait())
            ahead = _begin(link, gradient, c, node, next(times, None))
        else:
            node = advance(c, node, event.time)
            node = gossip_event(c, node, wire.trade(event, offer(node)))
    return advance(c, node, horizon)


def _begin(link: Link, gradient: Gradient, c: Constants, node: Node, due: float | None) -> Handle[Tensor] | None:
    """The next gradient, beside the gossip until then."""
    if due is None:
        return None
    x = advance(c, node, due).x

    def job() -> Tensor:
        found = evaluate(gradient, x)
        link.local_step()
        return found

    return link.spawn(job, f"gradient at {due:.3f}")


def _context(gossip: Gossip, smoothness: float, convexity: float, horizon: float, seed: int, x0: Tensor) -> int:
    """64 bits of all that members have to agree on."""
    told = repr((gossip, smoothness, convexity, horizon, seed)).encode() + x0.numpy().tobytes()
    return int.from_bytes(hashlib.sha256(told).digest()[:8], "little")


def real_time(
    unit_s: float, *, now: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
) -> Pace:
    """Events happen when they are due on the wall's clock, `unit_s` seconds a unit of time from now on, or later if
    computing and the link are not as quick."""
    begun = now()

    def pace(due: float) -> None:
        left = begun + due * unit_s - now()
        if left > 0:
            sleep(left)

    return pace
