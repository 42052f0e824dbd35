"""To whom? Who combines with whom in a round: all, pairs, islands; graphs are in graphs.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from thinwire.codecs.base import Codec
from thinwire.codecs.precision import FP32
from thinwire.errors import ConfigError
from thinwire.graphs import GRAPHS, Exponential, Graph, RandomGraph, Ring, Torus
from thinwire.randomness import mix
from thinwire.routes import Group, Neighbours, Route, Topology, Tree, members_of

__all__ = [
    "TOPOLOGIES",
    "Everyone",
    "Exponential",
    "Graph",
    "Group",
    "Islands",
    "Neighbours",
    "RandomGraph",
    "RandomPairs",
    "Ring",
    "Route",
    "Topology",
    "Torus",
    "Tree",
    "Window",
    "members_of",
]


@dataclass(frozen=True)
class Everyone:
    """All members combine with all.

    shares  of the vector that each member combines for all, one for each, where shards are combined: small ones for
            slow lines (thinwire.plan.shares finds them), 0 for a member that is to receive and send as little as can
            be. Empty: even ones
    """

    shares: tuple[float, ...] = ()
    consensus: bool = field(default=True, init=False, repr=False)
    mixes: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if any(not 0 <= share < math.inf for share in self.shares) or (self.shares and not sum(self.shares) > 0):
            raise ConfigError(
                f"shares {self.shares}",
                expected="numbers from 0 up, not all of them 0",
                mend="shares=() for even ones, or what thinwire.plan.shares(rates) gives",
            )

    def route(self, rank: int, members: tuple[int, ...], key: int, number: int = 0) -> Route:
        if self.shares and len(self.shares) != len(members):
            raise ConfigError(
                f"{len(self.shares)} shares for {len(members)} members",
                expected="one for each member",
                mend="leave shares out, or give as many as there are members",
            )
        return Group(members, self.shares)


@dataclass(frozen=True)
class RandomPairs:
    """Each member combines with one partner, dealt anew every round; one is left alone if the number is odd.

    Members agree on the deal because it follows from the round's key: they are ordered by a hash of (key, rank) and
    taken two by two. There is no global model; `Synchronizer.consensus()` averages the members' own.

    share   of the pairs that combine in a round, each by chance; the others' members idle. R(p) in arXiv:2507.06542
    Source  gossip averaging, Boyd et al. 2006; random pairs as in Kolehmainen et al. 2025, arXiv:2506.10911.
    """

    share: float = 1.0
    consensus: bool = field(default=False, init=False, repr=False)
    mixes: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ConfigError(
                f"a share of {self.share} of the pairs",
                expected="a number in [0, 1]",
                mend="1 lets all combine in every round, 0.2 every fifth of them",
            )

    def route(self, rank: int, members: tuple[int, ...], key: int, number: int = 0) -> Route:
        dealt = sorted(members, key=lambda member: (mix(key, member), member))
        place = dealt.index(rank) // 2 * 2
        combines = mix(key, dealt[place], 1) < self.share * 2**64
        return Group(tuple(sorted(dealt[place : place + 2])) if combines else (rank,))


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
        if self.between.mixes:
            raise ConfigError(
                f"islands with {self.between!r} between them: every island would end with a result of its own",
                expected="leaders who combine in groups",
                mend="use Everyone() or RandomPairs() between islands, or the graph without islands",
            )

    @property
    def consensus(self) -> bool:
        return self.between.consensus

    @property
    def mixes(self) -> bool:
        return False

    def route(self, rank: int, members: tuple[int, ...], key: int, number: int = 0) -> Route:
        islands = tuple(members[at : at + self.size] for at in range(0, len(members), self.size))
        leaders = tuple(island[0] for island in islands)
        leader = next(island[0] for island in islands if rank in island)
        return Tree(islands, self.inside, self.between.route(leader, leaders, key, number))


@dataclass(frozen=True)
class Window:
    """One topology in `rounds` rounds from round `first` on, counted from 0, and another one before and after.

    Source: the window schedules of arXiv:2507.06542, which ask when to spend what may be sent.
    """

    first: int
    rounds: int
    inside: Topology = field(default_factory=Everyone)
    outside: Topology = field(default_factory=lambda: RandomPairs(0.2))
    consensus: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.first < 0 or self.rounds < 1:
            raise ConfigError(
                f"a window of {self.rounds} rounds from round {self.first} on",
                expected="at least one round, and round 0 or a later one to begin with",
                mend="write window(30, 10) for ten rounds after the first thirty",
            )

    @property
    def mixes(self) -> bool:
        return self.inside.mixes or self.outside.mixes

    def route(self, rank: int, members: tuple[int, ...], key: int, number: int = 0) -> Route:
        within = self.first <= number < self.first + self.rounds
        return (self.inside if within else self.outside).route(rank, members, key, number)


#: Every topology by the name used in expressions: "islands(4)", "islands(2, between=pairs)", "pairs(0.2)", "ring".
TOPOLOGIES: Mapping[str, Callable[..., Topology]] = {
    "everyone": Everyone,
    "pairs": RandomPairs,
    "islands": Islands,
    "window": Window,
    **GRAPHS,
}
