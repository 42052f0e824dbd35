"""Routes: who combines with whom in a round, as a topology deals it and the collectives follow it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from thinwire.codecs.base import Codec


@dataclass(frozen=True)
class Group:
    """Members who combine directly with each other, ascending.

    shares  of the vector that each combines for all, where members combine a shard each; empty: even ones
    """

    ranks: tuple[int, ...]
    shares: tuple[float, ...] = ()


@dataclass(frozen=True)
class Tree:
    """Islands that combine inside first, with a codec of their own; their leaders go on along `between`."""

    islands: tuple[tuple[int, ...], ...]
    inside: Codec
    between: Route


@dataclass(frozen=True)
class Neighbours:
    """A member's place in a graph: whom it tells, and what those weigh whose vectors it averages.

    to       ranks that it sends to, ascending
    weights  of itself and of those that it hears, by ascending rank; they add up to 1
    """

    to: tuple[int, ...]
    weights: Mapping[int, float]


Route = Group | Tree | Neighbours


class Topology(Protocol):
    """Who takes part in a member's round."""

    @property
    def consensus(self) -> bool:
        """Whether all members end a round with the same result."""

    @property
    def mixes(self) -> bool:
        """Whether it weighs neighbours (routes are `Neighbours`), and each member ends with a result of its own."""

    def route(self, rank: int, members: tuple[int, ...], key: int, number: int = 0) -> Route:
        """The route of `rank` among `members` (ascending).

        key     the round's shared randomness
        number  of the round, from 0, for those who take turns
        """


def members_of(route: Route) -> tuple[int, ...]:
    """Everybody whose contribution a route combines, ascending."""
    match route:
        case Group(ranks):
            return ranks
        case Neighbours(_, weights):
            return tuple(weights)
    leaders = set(members_of(route.between))
    return tuple(sorted(rank for island in route.islands if island[0] in leaders for rank in island))


def shares(route: Route, rank: int, present: Collection[int]) -> dict[int, float]:
    """What those who are present weigh in the result of `rank`.

    In a graph the weight of an absent neighbour goes to the member itself; if that is absent too, to all others in
    proportion.
    """
    if not isinstance(route, Neighbours):
        return dict.fromkeys(present, 1.0)
    kept = {each: weight for each, weight in route.weights.items() if each in present}
    if rank in kept:
        kept[rank] += sum(weight for each, weight in route.weights.items() if each not in present)
    return kept
