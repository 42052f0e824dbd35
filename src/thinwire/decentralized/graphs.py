"""Who gossips with whom, and how often.

    Lap = sum_e rate_e (e_i - e_j)(e_i - e_j)^T      n nodes; edge e joins i and j, gossips rate_e times a unit of time
    chi1 = 1 / lambda_2(Lap)                         how long it takes until all have heard of all
    chi2 = 1/2 max_e (e_i - e_j)^T Lap^+ (e_i - e_j) half the largest effective resistance over the edges that gossip

The unit of time is that in which a node takes one gradient in the mean. Both chi halve where all rates double.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.errors import ConfigError

Edge = tuple[int, int]


@dataclass(frozen=True)
class Graph:
    """Nodes 0 to `nodes` - 1 and the pairs that may talk; connected.

    edges  (i, j) with i < j, each once; kept in ascending order
    """

    nodes: int
    edges: tuple[Edge, ...]

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise ConfigError(f"a graph of {self.nodes} nodes", expected="at least one", mend="ask for one or more")
        wrong = [edge for edge in self.edges if not 0 <= edge[0] < edge[1] < self.nodes]
        if wrong or len(set(self.edges)) < len(self.edges):
            raise ConfigError(
                f"edges {wrong or 'that are listed twice'} in a graph of {self.nodes} nodes",
                expected="each edge once, as (i, j) with 0 <= i < j < nodes",
                mend="order the two ends of each edge and drop repeated ones",
            )
        object.__setattr__(self, "edges", tuple(sorted(self.edges)))
        lonely = set(range(self.nodes)) - self._reached_from(0)
        if lonely:
            raise ConfigError(
                f"no way through the graph from node 0 to {sorted(lonely)}",
                expected="a connected graph: what one node knows has to reach all",
                mend="add an edge between the parts",
            )

    def _reached_from(self, node: int) -> set[int]:
        reached, fresh = {node}, {node}
        while fresh:
            fresh = {there for i, j in self.edges for here, there in ((i, j), (j, i)) if here in fresh} - reached
            reached |= fresh
        return reached

    def laplacian(self, rates: Sequence[float] | None = None) -> Tensor:
        """float64 [n, n]; every edge counts 1 where no rates are given."""
        lap = torch.zeros(self.nodes, self.nodes, dtype=torch.float64)
        for (i, j), rate in zip(self.edges, rates if rates is not None else [1.0] * len(self.edges), strict=True):
            lap[i, i] += rate
            lap[j, j] += rate
            lap[i, j] -= rate
            lap[j, i] -= rate
        return lap


@dataclass(frozen=True)
class Gossip:
    """A graph and its edges' rates: how often each gossips, in the mean, in a unit of time. See `rates` for good ones.

    rates  one for each of graph.edges, not negative; edges of rate 0 never talk
    """

    graph: Graph
    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        good = [rate for rate in self.rates if math.isfinite(rate) and rate >= 0]
        if len(good) != len(self.graph.edges) or len(good) != len(self.rates):
            raise ConfigError(
                f"rates {self.rates} for {len(self.graph.edges)} edges",
                expected="one finite rate of at least 0 for each edge",
                mend="use uniform(graph) or optimal(graph)",
            )
        Graph(self.graph.nodes, tuple(self.used))  # refuses rates that cut the graph in two

    @property
    def used(self) -> list[Edge]:
        """Edges that gossip."""
        return [edge for edge, rate in zip(self.graph.edges, self.rates, strict=True) if rate > 0]

    @property
    def rate(self) -> float:
        """Gossip events of the whole graph in a unit of time."""
        return math.fsum(self.rates)

    @property
    def chi1(self) -> float:
        if self.graph.nodes == 1:
            return 0.0
        return 1.0 / float(torch.linalg.eigvalsh(self.graph.laplacian(self.rates))[1])

    @property
    def chi2(self) -> float:
        inverse = torch.linalg.pinv(self.graph.laplacian(self.rates), hermitian=True)
        resistances = [float(inverse[i, i] + inverse[j, j] - 2 * inverse[i, j]) for i, j in self.used]
        return max(resistances, default=0.0) / 2

    def scaled(self, factor: float) -> Gossip:
        """The same edges, `factor` times as often."""
        return Gossip(self.graph, tuple(rate * factor for rate in self.rates))


def path(nodes: int) -> Graph:
    return Graph(nodes, tuple((i, i + 1) for i in range(nodes - 1)))


def ring(nodes: int) -> Graph:
    return _graph(nodes, [(i, (i + 1) % nodes) for i in range(nodes)])


def star(nodes: int) -> Graph:
    """Node 0 in the middle."""
    return Graph(nodes, tuple((0, i) for i in range(1, nodes)))


def complete(nodes: int) -> Graph:
    return Graph(nodes, tuple((i, j) for j in range(nodes) for i in range(j)))


def grid(rows: int, columns: int, *, torus: bool = False) -> Graph:
    """Each node beside its four neighbours; on a torus the sides are joined."""
    pairs = []
    for row in range(rows):
        for column in range(columns):
            for down, right in ((row + 1, column), (row, column + 1)):
                if torus or (down < rows and right < columns):
                    pairs.append((row * columns + column, down % rows * columns + right % columns))
    return _graph(rows * columns, pairs)


def barbell(each: int) -> Graph:
    """Two complete graphs of `each` nodes, joined by one edge."""
    left = complete(each).edges
    right = tuple((i + each, j + each) for i, j in left)
    return Graph(2 * each, (*left, *right, (each - 1, each)))


def _graph(nodes: int, pairs: Sequence[Edge]) -> Graph:
    """Ends in either order, repeated edges and loops (a ring of two, a torus of one row) left out."""
    return Graph(nodes, tuple({(min(pair), max(pair)) for pair in pairs if pair[0] != pair[1]}))
