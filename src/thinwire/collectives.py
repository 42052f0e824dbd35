"""Rounds of packets over any link: how contributions are combined and how members make sure of the result.

A round follows its route: a group combines directly (ways.py), a tree of islands group by group. What feedback and
stages remember goes in and comes out, and takes effect only if the verdict at the end finds that all members hold the
same result. In a graph each member ends with a result of its own: it hears its neighbours, and waits for nobody else.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from thinwire.aggregators import WeightedMean
from thinwire.codecs import Feedback
from thinwire.codecs.base import Codec
from thinwire.codecs.feedback import Place
from thinwire.codecs.stages import Exchanged, Result, Stage, Staged, Tensors
from thinwire.errors import PacketError, StateMismatch
from thinwire.fragments import digest
from thinwire.links.base import Channel
from thinwire.packet import Flag, Kind, Layout, Packet, check, read, wire_bytes
from thinwire.randomness import mix
from thinwire.routes import Group, Neighbours, Route, Tree
from thinwire.ways import Exchange, Leg, Outcome, Work, carry, decode_all, merge, mingle, others_of, rows_of

_log = logging.getLogger("thinwire")

#: Why a round that was carried out to its end changes nothing.
NOBODY_FINITE = "no member had finite values to contribute"
OVERFLOW = "each member's values are finite, but not what they combine to"
NO_SAMPLES = "no member has counted a sample since its last round"

_ATTEMPTS = 3  # a round with a damaged packet is sent again this often before it is given up


@dataclass(frozen=True)
class Carried:
    """What feedback and stages remember from round to round.

    own      this member's: what feedback still owes
    dropped  this member's: what the second encoding dropped of the shard that it combines, by number of the stage
    shared   alike on all members: feedback's
    stages   alike on all members: a staged codec's
    """

    own: Tensors = field(default_factory=dict)
    dropped: Tensors = field(default_factory=dict)
    shared: Tensors = field(default_factory=dict)
    stages: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Combined:
    """The end of a round on one member.

    update      [n], or None if the round is not to be committed
    carried     to be remembered if it is
    ranks       members that took part with finite values
    counted     [n] what was counted as this member's, as others read it; None if nothing, or if nobody asked
    reason      why it is not to be committed
    damaged     a graph's neighbours that were left out because their packets were damaged
    digest      64 bits of what the verdict compared; empty in a graph
    encode_s, job_s  seconds spent encoding, decoding and merging; from first to last
    """

    update: Tensor | None
    carried: Carried
    ranks: tuple[int, ...] = ()
    reason: str = ""
    counted: Tensor | None = None
    encode_s: float = 0.0
    job_s: float = 0.0
    damaged: tuple[int, ...] = ()
    digest: bytes = b""


@dataclass
class Doubt:
    """A round whose verdict did not come through: others may have committed it, if they have heard everybody.

    A box that `combine` leaves what it holds in while it waits for the verdict.

    digest  of what this member holds; empty: nobody can have committed
    end     ranks that were present, as those know who committed -> this member's end of the same round
    """

    digest: bytes = b""
    end: Callable[[tuple[int, ...]], Combined] | None = None


def combine(
    ex: Exchange, x: Tensor, weight: float, carried: Carried, shared: Tensor | None, doubt: Doubt | None = None
) -> Combined:
    """A member's whole round, from its vector to a result that all witnesses hold, or its own. Runs beside the compute.

    x        [n] what this member sends; if it is not finite the member abstains, and takes part without it
    weight   of the contribution; with 0 it is left out, though the member takes part
    carried  from the last round
    shared   [n] state that all witnesses should hold alike, compared with the result; None compares the result alone
    doubt    where to leave the result while the verdict is under way; for groups that outlive a member
    raises   PeerLost, StateMismatch; a round that failed without a loss of members comes back with `update=None`
    """
    start, doubt = ex.now(), doubt or Doubt()
    abstains = not finite(x)
    weight = weight if ex.aggregator.weighs else 1.0
    if abstains:
        x = torch.zeros_like(x)
    if isinstance(ex.route, Neighbours):
        return replace(_in_graph(ex, ex.route, x, abstains, carried), job_s=ex.now() - start)
    reasons: list[str] = []
    coding_s = 0.0
    for _ in range(_ATTEMPTS):
        work = Work(ex)
        began = ex.now()
        update, counted, after = _along(work, ex.route, x, weight, abstains, carried)
        work.coding_s += ex.now() - began
        coding_s += work.coding_s
        own = digest(*(tensor for tensor in (update, shared) if tensor is not None)) if len(ex.witnesses) > 1 else b""
        end = partial(_ended, ex, update, counted, own, carried, after)
        doubt.digest, doubt.end = (b"", None) if work.faults else (own, end)
        present = _verdict(work, own, abstains)
        if present is not None:
            return replace(end(present), encode_s=coding_s, job_s=ex.now() - start)
        doubt.digest, doubt.end = b"", None
        reasons = work.faults or ["another member received a damaged packet"]
        _log.warning("%s: sent again, because of %s", ex.what, "; ".join(reasons))
    reason = f"given up after {_ATTEMPTS} attempts: " + "; ".join(reasons)
    return Combined(None, carried, reason=reason, encode_s=coding_s, job_s=ex.now() - start)


def _in_graph(ex: Exchange, route: Neighbours, x: Tensor, abstains: bool, carried: Carried) -> Combined:
    """A round among neighbours. A damaged packet is not sent again: nobody but its receiver knows, or waits."""
    assert isinstance(ex.how, Codec), "what else there is is refused when it is composed"
    work, began = Work(ex), ex.now()
    found = mingle(work, route, Leg(ex.how, ex.aggregator, x, 1.0, abstains, ex.key))
    coding_s = work.coding_s + ex.now() - began
    if work.faults:
        _log.warning("%s: left out, its weight going to this member: %s", ex.what, "; ".join(work.faults))
    if found.combined is None:
        return Combined(None, carried, reason=NOBODY_FINITE, encode_s=coding_s, damaged=found.damaged)
    return Combined(found.combined, carried, found.present, encode_s=coding_s, damaged=found.damaged)


def _ended(
    ex: Exchange, update: Tensor | None, counted: Tensor | None, own: bytes, before: Carried, after: Carried,
    present: tuple[int, ...],
) -> Combined:  # fmt: skip
    """A round in which nothing was damaged: what it comes to, the same on all members."""
    held = Combined(None, before, counted=counted, digest=own)
    if not present:
        return replace(held, reason=NOBODY_FINITE)
    if update is None:  # nobody failed, not all abstained, nothing came: weights of 0
        return replace(held, ranks=present, reason=NO_SAMPLES)
    shared = before.shared
    if isinstance(ex.how, Feedback):
        update, shared = ex.how.receive(update, shared, ex.how.share(present, ex.witnesses))
    if len(present) > 1 and not finite(update):
        return replace(held, reason=OVERFLOW)
    return replace(held, update=update, carried=replace(after, shared=shared), ranks=present)


def _along(
    work: Work, route: Route, x: Tensor, weight: float, abstains: bool, carried: Carried
) -> tuple[Tensor | None, Tensor | None, Carried]:
    """Follow a route.

    returns  what came of it, None if a packet was damaged or nobody contributed; what was counted as this member's;
             what is carried on
    """
    if isinstance(route, Tree):
        update, after = _tree(work, route, x, weight, abstains, carried)
        return update, None, after
    assert isinstance(route, Group)
    how = work.ex.how
    nothing = abstains or weight == 0  # of this member's is counted
    if not isinstance(how, Feedback):
        update, sent, after = _through(work, route, how, x, weight, abstains, carried, keeps=0.0)
        return update, None if nothing else sent, after
    place = Place(work.ex.rank, route.ranks)
    target, held = how.prepare(x, carried.own, carried.shared, place)
    given = how.weight(place)
    weight = weight if given is None else given
    update, sent, after = _through(work, route, how.codec, target, weight, abstains, carried, keeps=how.keeps)
    if update is None or sent is None or nothing:
        return update, None, after
    return update, sent, replace(after, own=how.commit(target, held, sent))


def _through(
    work: Work, route: Group, how: Codec | Staged, x: Tensor, weight: float, abstains: bool, carried: Carried, *,
    keeps: float | None,
) -> tuple[Tensor | None, Tensor | None, Carried]:  # fmt: skip
    """Take a vector through a group: in one exchange, or in as many as a staged codec asks for.

    A stage of which nothing comes, here or everywhere, is answered with zeros, so that all go through all of them.
    What a second encoding drops is remembered of stages that are `whole`. Where members add up what was sent, other
    stages of the mean are not encoded a second time.

    returns  what came of it, what was sent (if feedback or the outer step ask), and what is carried on but for `own`
    """
    ex, dropped = work.ex, dict(carried.dropped)
    tracks = isinstance(ex.how, Feedback) and ex.how.tracks

    def exchange(number: int, stage: Stage) -> Outcome:
        rule, key = stage.rule or ex.aggregator, mix(ex.key, 5, number) if number else ex.key
        weighs = weight if rule.weighs else 1.0
        leg = Leg(
            stage.codec, rule, stage.vector, weighs, abstains, key,
            tells=ex.recalls or isinstance(ex.how, Feedback | Staged),
            keeps=keeps if stage.whole else None if tracks and stage.rule is None else 0.0,
            dropped=dropped.get(str(number)) if stage.whole else None, tracks=tracks,
        )  # fmt: skip
        outcome = carry(work, route, leg)
        if outcome.dropped is not None:
            dropped[str(number)] = outcome.dropped
        return outcome

    if isinstance(how, Codec):
        outcome = exchange(0, Stage(x, how, whole=True))
        return outcome.combined, outcome.sent, replace(carried, dropped=dropped)
    run, came = how.run(x, carried.stages, mix(ex.key, 6)), True
    stage = next(run)
    for number in itertools.count():
        outcome = exchange(number, stage)
        came &= outcome.combined is not None
        blank = torch.zeros_like(stage.vector)
        combined, sent = (blank if value is None else value for value in (outcome.combined, outcome.sent))
        try:
            stage = run.send(Exchanged(combined, sent))
        except StopIteration as end:
            result: Result = end.value
            break
    after = replace(carried, dropped=dropped, stages=result.shared)
    return (result.update if came else None), result.sent, after


def _tree(
    work: Work, tree: Tree, x: Tensor, weight: float, abstains: bool, carried: Carried
) -> tuple[Tensor | None, Carried]:
    """Islands combine at their leaders, leaders combine among themselves, and pass the result on.

    A mean of means is the members' mean only in proportion to what is behind each: hence WeightedMean at every level.
    """
    ex, n, codec, rule = work.ex, x.numel(), tree.inside, WeightedMean()
    weight = weight if ex.aggregator.weighs else 1.0
    work.ex = replace(ex, aggregator=rule)
    island = next(island for island in tree.islands if ex.rank in island)
    leader, followers = island[0], island[1:]
    header = replace(ex.header, sender=ex.rank, weight=weight, flags=Flag.ABSTAINS if abstains else 0)
    packet = Packet(codec.spec, n, codec.encode(x, mix(ex.key, 3, ex.rank)), header)
    if ex.rank != leader:
        work.swap({leader: packet}, {}, codec.spec, {}, {})
        due = {leader: replace(ex.header, kind=Kind.RESULT, sender=leader)}
        got = work.swap({}, due, codec.spec, {leader: codec.layout(n)}, {leader: n})[leader]
        if got is None or got.header.flags:
            return None, carried
        return work.decode(got, codec, n, mix(ex.key, 4, leader), x.device), carried
    arrived = work.swap(
        {},
        {rank: replace(ex.header, sender=rank) for rank in followers},
        codec.spec,
        dict.fromkeys(followers, codec.layout(n)),
        dict.fromkeys(followers, n),
    )
    keys = {sender: mix(ex.key, 3, sender) for sender in island}
    read_of = decode_all(work, {**arrived, leader: packet}, codec, n, keys, x.device)
    failed = read_of is None
    merged, total = None, weight
    if read_of is not None:
        rows, weights = rows_of(read_of.values(), x)
        merged, total = merge(rule, rows, weights), float(weights.sum()) if len(weights) else weight
    update, _, after = _along(
        work, tree.between, torch.zeros_like(x) if merged is None else merged, total, merged is None, carried
    )
    flags = Flag.FAILED if failed or update is None else 0
    vector = torch.zeros_like(x) if update is None else update
    key = mix(ex.key, 4, leader)
    fields = codec.encode(vector, key)
    result = Packet(codec.spec, n, fields, replace(ex.header, kind=Kind.RESULT, sender=leader, flags=flags))
    work.swap(dict.fromkeys(followers, result), {}, codec.spec, {}, {})
    return (None if flags else codec.decode(fields, n, key)), after


def _verdict(work: Work, own: bytes, abstains: bool) -> tuple[int, ...] | None:
    """Compare what all witnesses hold, before anybody commits.

    own      digest of what this member holds
    returns  ranks whose values were finite; None if somebody's packet was damaged, so that nobody commits
    raises   StateMismatch naming the members in the minority; PacketError if a verdict itself is damaged
    """
    ex = work.ex
    others = others_of(ex.witnesses, ex.rank)
    if not others:
        return () if abstains else (ex.rank,)
    failed = bool(work.faults)
    flags = (Flag.ABSTAINS if abstains else 0) | (Flag.FAILED if failed else 0)
    header = replace(ex.header, kind=Kind.VERDICT, sender=ex.rank, flags=flags)
    packet = Packet("verdict", 0, {"digest": torch.frombuffer(bytearray(own), dtype=torch.uint8)}, header)
    layout: Layout = {"digest": (torch.uint8, 8)}
    before = len(work.faults)
    arrived = work.swap(
        dict.fromkeys(others, packet),
        {rank: replace(header, sender=rank) for rank in others},
        "verdict",
        dict.fromkeys(others, layout),
        dict.fromkeys(others, 0),
    )
    verdicts = {rank: found for rank, found in sorted({**arrived, ex.rank: packet}.items()) if found is not None}
    if len(work.faults) > before:
        raise PacketError(f"{ex.what}: " + "; ".join(work.faults[before:]), expected="every member's verdict")
    if any(verdict.header.flags & Flag.FAILED for verdict in verdicts.values()):
        return None
    present = tuple(rank for rank, verdict in verdicts.items() if not verdict.header.flags & Flag.ABSTAINS)
    if present:
        _same({rank: bytes(verdict.fields["digest"].numpy()) for rank, verdict in verdicts.items()}, ex.what)
    return present


def _same(digests: Mapping[int, bytes], what: str) -> None:
    if len(set(digests.values())) == 1:
        return
    most, count = Counter(digests.values()).most_common(1)[0]
    odd = [str(rank) for rank, found in digests.items() if found != most]
    if 2 * count <= len(digests):  # no majority to be right
        told = f"members {', '.join(map(str, digests))} do not hold the same result"
    else:
        told = f"member{'s' * (len(odd) > 1)} {', '.join(odd)} and the rest do not hold the same result"
    raise StateMismatch(
        f"{what}: {told}",
        expected="the same bits on every member",
        mend="do not write to parameters outside the optimizer; look for broken memory or other library versions there",
    )


def gather_packets(
    channel: Channel, rank: int, ranks: Iterable[int], packet: Packet, layout: Layout, what: str, *,
    to: Iterable[int] | None = None,
) -> dict[int, Packet]:  # fmt: skip
    """Every rank's packet of one kind and codec, by rank.

    layout  an upper bound of the fields' sizes
    to      ranks that are sent this member's, if they are not the same
    raises  PacketError, PeerLost
    """
    others = others_of(tuple(ranks), rank)
    told = others if to is None else others_of(tuple(sorted({*to, rank})), rank)
    most = wire_bytes(packet.codec, layout)
    arrived = channel.exchange(dict.fromkeys(told, packet.to_bytes()), dict.fromkeys(others, most), what)
    found = {rank: packet}
    for sender, buffer in arrived.items():
        due = replace(packet.header, sender=sender)
        found[sender] = check(read(buffer), header=due, codec=packet.codec, n=packet.n)
    return dict(sorted(found.items()))


def finite(x: Tensor) -> bool:
    """Whether all elements are. A finite sum proves it in one pass; only a sum that is not asks for a closer look."""
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())
