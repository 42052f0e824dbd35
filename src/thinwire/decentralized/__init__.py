"""Decentralised optimisation without rounds: DADAO, and the synchronous methods it is compared with."""

from __future__ import annotations

from thinwire.decentralized.clocks import Event, events
from thinwire.decentralized.dadao import Node
from thinwire.decentralized.graphs import Gossip, Graph, barbell, complete, grid, path, ring, star
from thinwire.decentralized.linked import real_time, run_on
from thinwire.decentralized.problems import Quadratics, ridge
from thinwire.decentralized.rates import optimal, uniform
from thinwire.decentralized.virtual import Run, simulate

__all__ = [
    "Event",
    "Gossip",
    "Graph",
    "Node",
    "Quadratics",
    "Run",
    "barbell",
    "complete",
    "events",
    "grid",
    "optimal",
    "path",
    "real_time",
    "ridge",
    "ring",
    "run_on",
    "simulate",
    "star",
    "uniform",
]
