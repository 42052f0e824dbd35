"""One round as two halves and a value between them.

    begin (method, vectors, state) -> what is under way
    finish(under way, live vector, state) -> new anchor, new live vector, new state, outcome

State is a value: a round that fails leaves the old one in force, an overlapped round is one more value to keep, and a
checkpoint is all values written down.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, field, fields, replace

import torch
from torch import Tensor

from thinwire.codecs import How
from thinwire.collectives import NOBODY_FINITE, OVERFLOW, Carried, Combined, Doubt, combine, gather_packets
from thinwire.island import Island
from thinwire.links.base import Handle, Link
from thinwire.method import Method
from thinwire.outer import Memory, Now, Outer
from thinwire.pace import Told
from thinwire.packet import Header, Layout, Packet
from thinwire.randomness import mix
from thinwire.routes import Route, members_of
from thinwire.ways import Exchange


@dataclass(frozen=True)
class FragmentState:
    """What a method remembers of one fragment.

    anchor     [n] the model all members agree on; empty if gradients are sent
    memory     the outer step's, alike on all members
    own        the outer step's, of this member alone
    owed       [n] what rounds without effect were to send and parameters no longer hold; empty: nothing
    carried    what feedback and stages remember
    begun      rounds begun, the same on all members
    committed  rounds that changed the state
    idle       rounds in a row that each member was not in, though it should have been, by rank
    """

    anchor: Tensor
    memory: Memory = field(default_factory=dict)
    own: Memory = field(default_factory=dict)
    owed: Tensor = field(default_factory=lambda: torch.zeros(0))
    carried: Carried = field(default_factory=Carried)
    begun: int = 0
    committed: int = 0
    idle: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class UnderWay:
    """A round between its halves.

    live     [n] the parameters or gradients when it began
    x        [n] what was to be sent
    due      local step after which it is applied
    counted  local steps and samples up to its beginning
    doubt    what this member holds while the verdict of all is under way
    said     numbers that members tell with the round, by rank, as far as they have been heard
    """

    fragment: int
    round: int
    due: int
    counted: tuple[int, int]
    live: Tensor
    x: Tensor
    result: Handle[Combined]
    doubt: Doubt = field(default_factory=Doubt)
    said: dict[int, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Committed:
    """The round took effect on every member; `ranks` took part with finite values."""

    step: int
    fragment: int
    round: int
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Skipped:
    """The round took effect on no member; what was to be sent is still in the parameters and goes with the next."""

    step: int
    fragment: int
    round: int
    reason: str


Outcome = Committed | Skipped


@dataclass(frozen=True)
class Terms:
    """What holds for all rounds of a run: the agreed context and the seed of shared randomness."""

    context: int
    seed: int

    def key(self, number: int, fragment: int) -> int:
        """The shared randomness of a round."""
        return mix(self.seed, number, fragment)


def begin(
    method: Method, terms: Terms, link: Link, fragment: int, step: int, live: Tensor, x: Tensor, weight: float,
    state: FragmentState, *, how: How, shared: Tensor | None, counted: tuple[int, int],
    island: Island | None = None, says: tuple[int, ...] | None = None,
) -> tuple[UnderWay, FragmentState]:  # fmt: skip
    """Start a round beside the compute.

    live    [n] gradients or parameters of the fragment, a copy
    x       [n] what is to be sent: the payload's selection
    how     the method's codec, fitted to the fragment
    shared  [n] what all members should hold alike at this point, to be compared; None leaves it out
    counted  local steps and samples up to here
    island  those who hold the other parts of the model, if it has parts: they decide together
    says    numbers to tell all members with it, which all hear if and only if anybody commits it
    """
    number = state.begun
    doubt, said = Doubt(), dict[int, tuple[int, ...]]()
    hears = None if says is None else _numbers(link, says, Header(fragment=fragment, round=number))
    exchange = opened(method, terms, link, fragment, number, how)

    def run(x: Tensor, weight: float) -> Combined:
        if hears is not None:
            said.update(hears())
        return combine(exchange, x, weight, state.carried, shared, doubt)

    framed = None if island is None else island.frame(exchange.what)

    def job() -> Combined:
        return run(x, weight) if framed is None else framed(run, x, weight, state.carried)

    handle = link.spawn(job, exchange.what)
    due = step + method.schedule.overlap
    return UnderWay(fragment, number, due, counted, live, x, handle, doubt, said), replace(state, begun=number + 1)


def opened(method: Method, terms: Terms, link: Link, fragment: int, number: int, how: How) -> Exchange:
    """Everything a round needs beside the vectors, on a channel of its own."""
    route = route_of(method, terms, link, fragment, number)
    return Exchange(
        channel=link.open("rounds"),
        rank=link.rank,
        route=route,
        witnesses=witnesses(method, link, route),
        how=how,
        aggregator=method.aggregator,
        header=Header(fragment=fragment, round=number, context=terms.context),
        recalls=method.outer.recalls,
        key=terms.key(number, fragment),
        now=link.now,
    )


def finish(
    outer: Outer, under_way: UnderWay, combined: Combined, step: int, state: FragmentState, due: tuple[int, ...],
    lr: float,
) -> tuple[FragmentState, Outcome]:  # fmt: skip
    """Take the result in, or leave everything as it was (but for the count of who had nothing).

    outer  the method's outer step, fitted to the fragment
    due    members that should have been in it; in gossip these are not all
    lr     the inner learning rate
    """
    where = (step, under_way.fragment, under_way.round)
    now = {rank: 0 if rank in combined.ranks else state.idle.get(rank, 0) + 1 for rank in due}
    idle = {**state.idle, **now}
    if combined.update is None:
        kept = replace(state, idle=idle) if combined.reason in (NOBODY_FINITE, OVERFLOW) else state
        return kept, Skipped(*where, combined.reason)
    anchor, memory = outer.step(state.anchor, combined.update, state.memory, Now(state.committed, lr))
    after = replace(
        state, anchor=anchor, memory=memory, carried=combined.carried, committed=state.committed + 1, idle=idle
    )
    return after, Committed(*where, combined.ranks)


def route_of(method: Method, terms: Terms, link: Link, fragment: int, number: int) -> Route:
    """This member's route in a round."""
    return method.topology.route(link.rank, link.members, terms.key(number, fragment), number)


def witnesses(method: Method, link: Link, route: Route) -> tuple[int, ...]:
    """Who must hold the same at the end of a round: all members if they end with one result, else the combined ones.

    In a graph the combined ones have results of their own; they are those whom this member hears.
    """
    return link.members if method.topology.consensus else members_of(route)


MOST_SAID = 8  # numbers with a round
_NUMBERS: Layout = {"numbers": (torch.float64, len(fields(Told)))}


def _numbers(link: Link, says: tuple[int, ...], header: Header) -> Callable[[], dict[int, tuple[int, ...]]]:
    """A job that tells all members numbers of one's own, and hears theirs."""
    packet = Packet("said", 0, {"numbers": torch.tensor(says, dtype=torch.int64)}, replace(header, sender=link.rank))
    layout: Layout = {"numbers": (torch.int64, MOST_SAID)}
    channel, what = link.open("said with rounds"), f"what is said with round {header.round}"

    def job() -> dict[int, tuple[int, ...]]:
        found = gather_packets(channel, link.rank, link.members, packet, layout, what)
        return {rank: tuple(map(int, each.fields["numbers"].tolist())) for rank, each in found.items()}

    return job


def tell(link: Link, mine: Told, header: Header) -> Handle[dict[int, Told]]:
    """Tell all, and hear all, beside the compute; in ascending order of rank."""
    packet = Packet("pace", 0, {"numbers": torch.tensor(astuple(mine), dtype=torch.float64)}, header)
    channel, what = link.open("pace"), f"the pace of round {header.round}"

    def job() -> dict[int, Told]:
        found = gather_packets(channel, link.rank, link.members, packet, _NUMBERS, what)
        return {rank: Told(*each.fields["numbers"].tolist()) for rank, each in found.items()}

    return link.spawn(job, what)
