"""Graphs, in which members average with their neighbours alone: theta_i <- sum_j W_ij theta_j.

In all of them W is doubly stochastic: rows add up to 1, so a result is a mean, and columns do, so the mean of all
members' models stays what it is. Where whoever is told is heard, neighbours weigh as Metropolis has it,

    W_ij = 1 / (1 + max(degree_i, degree_j)),   W_ii = 1 - sum_j W_ij,

and where not, everybody hears as many as it tells and all weigh alike. How fast members come together is the spectral
gap, 1 - |second largest eigenvalue of W|: with a ring's of order 1/N^2, a torus's 1/N, an exponential graph's 1/log N.
Source: Lian et al. 2017, arXiv:1705.09056 (training on graphs); Xiao, Boyd & Lall 2005 (weights).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from thinwire.errors import ConfigError
from thinwire.randomness import mix
from thinwire.routes import Neighbours, Topology, members_of, shares


@dataclass(frozen=True)
class Ring:
    """Each member averages with the two beside it."""

    consensus: bool = field(default=False, init=False, repr=False)
    mixes: bool = field(default=True, init=False, repr=False)

    def route(self, rank: int, members: tuple[int, ...], key: int, number: int = 0) -> Neighbours:
        count = len(members)
        return _metropolis(rank, members, lambda at: ((at - 1) % count, (at + 1) % count))


@dataclass(frozen=True)
class Torus:
    """Members in rows and columns, as square as their number allows, each averaging with the four around it.

    The edges are joined. A prime number of members makes one row: a ring.
    """

    consensus: bool = field(default=False, init=False, repr=False)
    mixes: bool = field(default=True, init=False, repr=False)

    def route(self, rank: int, members: tuple[int, ...], key: int, number: int = 0) -> Neighbours:
        rows = max(each for each in range(1, math.isqrt(len(members)) + 1) if len(members) % each == 0)
        columns = len(members) // rows

        def around(at: int) -> list[int]:
            row, column = divmod(at, columns)
            beside = [row * columns + (column + step) % columns for step in (-1, 1)]
            return beside + [(row + step) % rows * columns + column for step in (-1, 1)]

        return _metropolis(rank, members, around)


@dataclass(frozen=True)
class Exponential:
    """Member i tells i + 1, i + 2, i + 4, ... and hears i - 1, i - 2, i - 4, ...

    one_peer  one of these a round, in turn: each result is the mean of two, and with a power of two of members all
              hold the mean of all after log2 N rounds; else all of them in every round
    Source    Ying et al. 2021, arXiv:2110.13363.
    """

    one_peer: bool = True
    consensus: bool = field(default=False, init=False, repr=False)
    mixes: bool = field(default=True, init=False, repr=False)

    def route(self, rank: int, members: tuple[int, ...], key: int, number: int = 0) -> Neighbours:
        count, at = len(members), members.index(rank)
        steps = [1 << power for power in range((count - 1).bit_length())]
        if self.one_peer and steps:
            steps = [steps[number % len(steps)]]
        return _regular(rank, members, steps, at)


@dataclass(frozen=True)
class RandomGraph:
    """Each member tells `degree` others and hears as many, dealt anew every round.

    Members sit in a circle in an order that follows from the round's key, and tell those who come next.
    Source: de Vos et al. 2023, arXiv:2310.01972 (their regular variant; they draw among all regular graphs).
    """

    degree: int
    consensus: bool = field(default=False, init=False, repr=False)
    mixes: bool = field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.degree < 1:
            raise ConfigError(
                f"a random graph of degree {self.degree}", expected="at least 1", mend="degree=1 is the cheapest"
            )

    def route(self, rank: int, members: tuple[int, ...], key: int, number: int = 0) -> Neighbours:
        seated = sorted(members, key=lambda member: (mix(key, member), member))
        return _regular(rank, seated, range(1, min(self.degree, len(members) - 1) + 1), seated.index(rank))


@dataclass(frozen=True)
class Graph:
    """A graph of your own, as lines between members: Graph(((0, 1), (1, 2))) is three members in a row."""

    lines: tuple[tuple[int, int], ...]
    consensus: bool = field(default=False, init=False, repr=False)
    mixes: bool = field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        pairs = all(isinstance(line, tuple) and len(line) == 2 and line[0] != line[1] for line in self.lines)
        reached = {0}
        for _ in self.lines if pairs else ():  # as often as a path may be long
            reached |= {end for line in self.lines if reached & set(line) for end in line}
        if not pairs or reached != set(range(self._count)):
            raise ConfigError(
                f"a graph of the lines {self.lines}",
                expected="lines between two different members, numbered from 0, which together reach all of them",
                mend="write the pairs of those that talk, such as ((0, 1), (1, 2))",
            )

    @property
    def _count(self) -> int:
        return 1 + max((end for line in self.lines for end in line), default=0)

    def route(self, rank: int, members: tuple[int, ...], key: int, number: int = 0) -> Neighbours:
        if len(members) != self._count:
            raise ConfigError(
                f"a graph of {self._count} members, and {len(members)} are here",
                expected="lines that reach every member",
                mend="name the lines of those that are new or gone, or use Ring(), which fits any number",
            )
        return _metropolis(rank, members, lambda at: [end for line in self.lines if at in line for end in line])


#: Every graph by the name used in expressions.
GRAPHS: Mapping[str, Callable[..., Topology]] = {
    "ring": Ring,
    "torus": Torus,
    "exponential": Exponential,
    "random_graph": RandomGraph,
    "graph": Graph,
}


def mixing_matrix(topology: Topology, members: int, key: int = 0, number: int = 0) -> Tensor:
    """What each member's result is made of in a round, for any topology: row i is the weights in i's.

    returns  float64 [members, members]
    """
    everybody, matrix = tuple(range(members)), torch.zeros(members, members, dtype=torch.float64)
    for rank in everybody:
        route = topology.route(rank, everybody, key, number)
        weights = shares(route, rank, members_of(route))
        for other, weight in weights.items():
            matrix[rank, other] = weight / sum(weights.values())
    return matrix


def _metropolis(rank: int, members: tuple[int, ...], around: Callable[[int], Iterable[int]]) -> Neighbours:
    """The row of a graph without directions; `around` tells the places around a place."""

    def neighbours(at: int) -> set[int]:
        return set(around(at)) - {at}

    at = members.index(rank)
    own = neighbours(at)
    weights = {members[other]: 1 / (1 + max(len(own), len(neighbours(other)))) for other in own}
    return _row(rank, weights, weights)


def _regular(rank: int, seated: Iterable[int], steps: Iterable[int], at: int) -> Neighbours:
    """The row of a circle in which everybody tells those who sit so many steps further; all weigh alike."""
    circle, steps = tuple(seated), tuple(steps)
    to = [circle[(at + step) % len(circle)] for step in steps]
    heard = [circle[(at - step) % len(circle)] for step in steps]
    return _row(rank, to, dict.fromkeys(heard, 1 / (1 + len(steps))))


def _row(rank: int, to: Iterable[int], weights: Mapping[int, float]) -> Neighbours:
    """With the member's own weight, which is what is left."""
    row = {**weights, rank: 1.0 - sum(weights.values())}
    return Neighbours(tuple(sorted(to)), dict(sorted(row.items())))
