"""To whom? Who combines with whom in a round, as a route that the collectives follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from thinwire.codecs.base import Codec
from thinwire.codecs.precision import FP32
from thinwire.errors import ConfigError
from thinwire.randomness import mix


@dataclass(frozen=True)
class Group:
    """Members who combine directly with each other, ascending."""

    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Tree:
    """Islands that combine inside first, with a codec of their own; their leaders go on along `between`."""

    islands: tuple[tuple[int, ...], ...]
    inside: Codec
    between: Route


Route = Group | Tree


class Topology(Protocol):
    """Who takes part in a member's round."""

    @property
    def consensus(self) -> bool:
        """Whether all members end a round with the same result."""

    def route(self, rank: int, members: tuple[int, ...], key: int) -> Route:
        """The route of `rank` among `members` (ascending); `key` is the round's shared randomness."""


@dataclass(frozen=True)
class Everyone:
    """All members combine with all."""

    consensus: bool = field(default=True, init=False, repr=False)

    def route(self, rank: int, members: tuple[int, ...], key: int) -> Route:
        return Group(members)


@dataclass(frozen=True)
class RandomPairs:
    """Each member combines with one partner, dealt anew every round; one is left alone if the number is odd.

    Members agree on the deal because it follows from the round's key: they are ordered by a hash of (key, rank) and
    taken two by two. There is no global model; `Synchronizer.consensus()` averages the members' own.
    Source: gossip averaging, Boyd et al. 2006; random pairs as in Kolehmainen et al. 2025, arXiv:2506.10911.
    """

    consensus: bool = field(default=False, init=False, repr=False)

    def route(self, rank: int, members: tuple[int, ...], key: int) -> Route:
        dealt = sorted(members, key=lambda member: (mix(key, member), member))
        place = dealt.index(rank) // 2 * 2
        return Group(tuple(sorted(dealt[place : place + 2])))


@dataclass(frozen=True)
class Islands:
    """Groups of `size` consecutive ranks with fast links inside; only their first members talk across.

    `between` says how these leaders combine, and may be Islands again. `inside` is the codec within an island: bytes
    are cheap there, so full precision is the default; the method's codec is used between leaders.
    """

    size: int
    between: Topology = field(default_factory=Everyone)
    inside: Codec = field(default_factory=FP32)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"islands of {self.size} members", expected="at least 1", mend="size=2 or more")
        if self.inside.traits.wants_feedback:
            raise ConfigError(
                f"codec {self.inside.spec} inside islands: it needs error feedback, and there is none inside",
                expected="a codec that loses little: bytes are cheap inside",
                mend="use fp32, bf16 or int8 inside, and the strong codec as the method's own",
            )

    @property
    def consensus(self) -> bool:
        return self.between.consensus

    def route(self, rank: int, members: tuple[int, ...], key: int) -> Route:
        islands = tuple(members[at : at + self.size] for at in range(0, len(members), self.size))
        leaders = tuple(island[0] for island in islands)
        leader = next(island[0] for island in islands if rank in island)
        return Tree(islands, self.inside, self.between.route(leader, leaders, key))


#: Every topology by the name used in expressions: "islands(4)", "islands(2, between=pairs)".
TOPOLOGIES: Mapping[str, Callable[..., Topology]] = {"everyone": Everyone, "pairs": RandomPairs, "islands": Islands}


def members_of(route: Route) -> tuple[int, ...]:
    """Everybody whose contribution a route combines, ascending."""
    if isinstance(route, Group):
        return route.ranks
    leaders = set(members_of(route.between))
    return tuple(sorted(rank for island in route.islands if island[0] in leaders for rank in island))
