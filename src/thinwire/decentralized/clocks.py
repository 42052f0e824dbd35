"""Poisson clocks that everybody who knows the seed reads alike.

Each node has a clock for its gradients and each edge one for its gossip. A clock's times follow from (seed, kind,
index) alone, so both ends of an edge know when it rings without asking anybody.

Waiting times are exponential by von Neumann's method, which compares uniform numbers and takes no logarithm: with the
sums and one division in double precision, all of it comes out to the same bits on every machine.

Source  von Neumann 1951, "Various techniques used in connection with random digits" (exponential from comparisons).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, takewhile
from typing import NamedTuple

from thinwire.decentralized.graphs import Gossip
from thinwire.randomness import mix

_GRADIENT, _GOSSIP = 0, 1


class Event(NamedTuple):
    """Something that happens at a moment; events are in one order for all.

    time   in units of the mean time between two gradients of a node
    clock  of which: node, or number of nodes + edge
    turn   how many events of this clock were before
    nodes  whom it concerns: one takes a gradient, two gossip
    """

    time: float
    clock: int
    turn: int
    nodes: tuple[int, ...]


def events(gossip: Gossip, seed: int, horizon: float, *, node: int | None = None) -> list[Event]:
    """Everything that happens before `horizon`, in order; with `node`, all that concerns it."""
    graph = gossip.graph
    clocks: list[tuple[tuple[int, ...], float, int]] = []
    clocks += [((i,), 1.0, mix(seed, _GRADIENT, i)) for i in range(graph.nodes)]
    clocks += [
        (edge, rate, mix(seed, _GOSSIP, at))
        for at, (edge, rate) in enumerate(zip(graph.edges, gossip.rates, strict=True))
    ]
    return sorted(
        Event(time, clock, turn, nodes)
        for clock, (nodes, rate, key) in enumerate(clocks)
        if node is None or node in nodes
        for turn, time in enumerate(takewhile(lambda time: time < horizon, poisson(key, rate)))
    )


def poisson(key: int, rate: float) -> Iterator[float]:
    """Ascending times of a Poisson process: `rate` in a unit of time, never at 0. Of rate 0: none."""
    if rate == 0:
        return
    time = 0.0
    for wait in _exponential(key):
        time += wait / rate
        yield time


def _exponential(key: int) -> Iterator[float]:
    """Exponential numbers of mean 1.

    The first number of a run of falling uniform ones is kept if the run is odd: x is kept with chance exp(-x).
    Every run that was not kept adds 1.
    """
    uniform = (mix(key, turn) >> 11 for turn in count())  # integers of 53 bits
    whole, first = 0, next(uniform)
    lowest, odd = first, True
    for drawn in uniform:
        if drawn < lowest:
            lowest, odd = drawn, not odd
            continue
        if odd:
            yield whole + first * 2.0**-53
            whole = 0
        else:
            whole += 1
        first = next(uniform)
        lowest, odd = first, True
