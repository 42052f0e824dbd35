"""DADAO in virtual time: all nodes in one loop, event after event. The same call gives the same bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from thinwire.decentralized.clocks import Event, events
from thinwire.decentralized.dadao import (
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
from thinwire.errors import ConfigError


@dataclass(frozen=True)
class Run:
    """nodes as they are at the end, all at one time, and how many events of each kind there were."""

    nodes: tuple[Node, ...]
    gradients: int
    gossips: int


def simulate(
    gradients: Sequence[Gradient],
    gossip: Gossip,
    *,
    smoothness: float,
    convexity: float,
    x0: Tensor,
    horizon: float,
    seed: int = 0,
    watch: Callable[[Event, Sequence[Node]], bool] | None = None,
) -> Run:
    """Run until `horizon` (a node takes about as many gradients).

    gradients              one for each node
    smoothness, convexity  L and mu of every node's function
    x0                     float64 [d], where all start
    watch                  is shown each event and the nodes after it (each at the time of its own last event); if it
                           returns True, the run ends there
    """
    if len(gradients) != gossip.graph.nodes:
        raise ConfigError(
            f"{len(gradients)} functions on a graph of {gossip.graph.nodes} nodes",
            expected="one function a node",
            mend="give as many gradients as the graph has nodes",
        )
    c = constants(smoothness, convexity, gossip)
    nodes = [start(x0) for _ in gradients]
    since = list(nodes)  # as they were after their last gradient
    taken = gossiped = 0
    end = horizon
    for event in events(gossip, seed, horizon):
        i, time = event.nodes[0], event.time
        if len(event.nodes) == 1:
            gradient = evaluate(gradients[i], advance(c, since[i], time).x)
            nodes[i] = since[i] = gradient_event(c, nodes[i], time, gradient)
            taken += 1
        else:
            j = event.nodes[1]
            nodes[i], nodes[j] = advance(c, nodes[i], time), advance(c, nodes[j], time)
            offers = offer(nodes[i]), offer(nodes[j])
            nodes[i], nodes[j] = gossip_event(c, nodes[i], offers[1]), gossip_event(c, nodes[j], offers[0])
            gossiped += 1
        if watch is not None and watch(event, nodes):
            end = time
            break
    return Run(tuple(advance(c, node, end) for node in nodes), taken, gossiped)
