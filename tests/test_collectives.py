"""Rounds of packets against a plain reference: what the declared way must give, to the bit, and its bytes."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from thinwire.aggregators import Aggregator, Mean, Median, TrimmedMean, WeightedMean
from thinwire.aggregators.base import Needs
from thinwire.codecs import ErrorFeedback, bf16, e3m0, fp32, int4, int8, topk, zstd
from thinwire.codecs.base import Codec, Traits, require
from thinwire.collectives import NO_SAMPLES, NOBODY_FINITE, OVERFLOW, Carried, Combined, combine
from thinwire.errors import PacketError, StateMismatch
from thinwire.links.faulty import Tampered
from thinwire.links.local import run
from thinwire.packet import Fields, Header, Kind, Layout, read, wire_bytes
from thinwire.randomness import random_bytes
from thinwire.topologies import Everyone, Group, Islands, RandomPairs, Route, members_of
from thinwire.ways import Exchange, shards

VERDICT_BYTES = wire_bytes("verdict", {"digest": (torch.uint8, 8)})


@dataclass(frozen=True)
class PairSums(Codec):
    """Linear but lossy: half the sum of two neighbours stands for both."""

    @property
    def spec(self) -> str:
        return "pair_sums"

    @property
    def traits(self) -> Traits:
        return Traits(linear=True)

    def layout(self, n: int) -> Layout:
        return {"value": (torch.float32, (n + 1) // 2)}

    def encode(self, x: Tensor, key: int) -> Fields:
        return {"value": torch.nn.functional.pad(x, (0, len(x) % 2)).view(-1, 2).mean(dim=1)}

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        require(fields, self.layout(n))
        return fields["value"].repeat_interleave(2)[:n]

    def contraction(self, n: int) -> float | None:
        return 0.1  # a projection; not true of vectors that alternate in sign, which these tests have none of


@dataclass(frozen=True)
class Longest:
    """A rule that must see whole rows: the one of largest norm."""

    needs: Needs = field(default="rows", init=False, repr=False)
    weighs: bool = field(default=False, init=False, repr=False)

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        return rows[rows.norm(dim=1).argmax()].clone()


CODECS = {
    "fp32": fp32,
    "bf16": bf16,
    "int8": int8,
    "int4": int4,
    "e3m0": e3m0,
    "zstd": zstd,
    "int8 zstd": int8 | zstd,
    "pair sums": PairSums(),
    "topk": topk(1 / 8),
    "topk int8": topk(1 / 8) | int8,
    "feedback int4": ErrorFeedback(int4),
    "feedback int4 decay": ErrorFeedback(int4, decay=0.5),
    "feedback topk": ErrorFeedback(topk(1 / 8)),
    "feedback pair sums": ErrorFeedback(PairSums()),
}
RULES = {"mean": Mean(), "weighted": WeightedMean(), "median": Median(), "trimmed": TrimmedMean(0.3), "rows": Longest()}
#: A median of codes that were added is refused when it is composed.
COMBINATIONS = [(c, a) for c in CODECS for a in RULES if "pair sums" not in c or a in ("mean", "weighted")]


def data(members: int, n: int, number: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 * n + number)
    return list(torch.randn(members, n, generator=generator))


def weight_of(rank: int) -> float:
    return float(3 * rank + 2)


def exchange(link, codec, rule, *, number: int = 0, route: Route | None = None, witnesses=None) -> Exchange:
    route = route or Group(link.members)
    return Exchange(
        channel=link.open("rounds"),
        rank=link.rank,
        route=route,
        witnesses=witnesses or link.members,
        how=codec,
        aggregator=rule,
        header=Header(round=number, fragment=1, context=77),
        key=number,
        now=link.now,
    )


# --- the reference ----------------------------------------------------------------------------------------------


def again(codec: Codec, x: Tensor) -> Tensor:
    """What others read of x."""
    return codec.decode(codec.encode(x, 0), len(x), 0).clone()


@dataclass
class Reference:
    """A group's rounds, all members at once: no packets, no links, no keys (the codecs here round to nearest)."""

    codec: Codec | ErrorFeedback
    rule: Aggregator
    own: list[Tensor] | None = None
    shard: dict[int, Tensor] = field(default_factory=dict)

    def round(self, x: list[Tensor], weights: list[float]) -> Tensor:
        bare = self.codec.codec if isinstance(self.codec, ErrorFeedback) else self.codec
        decay = self.codec.decay if isinstance(self.codec, ErrorFeedback) else 0.0
        target = [v + decay * e for v, e in zip(x, self.own, strict=True)] if decay and self.own else x
        if len(x) > 2 and bare.traits.linear and self.rule.needs == "sum":
            seen = [again(bare, v) for v in target]
            codes = torch.stack([bare.encode(v, 0)["value"] for v in target])
            result = bare.decode({"value": self.merged(codes, weights)}, len(x[0]), 0)
        elif len(x) > 2 and bare.traits.reencodes and self.rule.needs != "rows":
            bounds = shards(len(x[0]), len(x))
            seen = [torch.cat([again(bare, v[a:b]) for a, b in bounds]) for v in target]
            parts = []
            for owner, (a, b) in enumerate(bounds):
                total = self.merged(torch.stack([v[a:b] for v in seen]), weights) if b > a else torch.zeros(0)
                total = total + decay * self.shard[owner] if decay and owner in self.shard else total
                parts.append(again(bare, total))
                self.shard[owner] = total - parts[-1]
            result = torch.cat(parts)
        else:
            seen = [again(bare, v) for v in target]
            result = self.merged(torch.stack(seen), weights)
        self.own = [v - s for v, s in zip(target, seen, strict=True)]
        return result

    def merged(self, rows: Tensor, weights: list[float]) -> Tensor:
        return self.rule.combine(rows, torch.tensor(weights, dtype=torch.float64))


def rounds_of(members: int, n: int, codec, rule, count: int) -> list[list[Combined]]:
    def member(link):
        carried, done = Carried(), []
        for number in range(count):
            ex = exchange(link, codec, rule, number=number)
            done.append(combine(ex, data(members, n, number)[link.rank], weight_of(link.rank), carried, None))
            carried = done[-1].carried
        return done

    return run(members, member)


@pytest.mark.parametrize(("codec", "rule"), COMBINATIONS)
def test_the_declared_way_to_the_bit(codec, rule):
    """Groups of 1 to 5, three rounds where there is a memory, lengths with and without empty shards."""
    count = 3 if "feedback" in codec or "topk" in codec else 1
    for members in range(1, 6):
        for n in (1, 300, 1500):
            reference = Reference(CODECS[codec], RULES[rule])
            weights = [weight_of(rank) for rank in range(members)]
            expected = [reference.round(data(members, n, number), weights) for number in range(count)]
            for rank, done in enumerate(rounds_of(members, n, CODECS[codec], RULES[rule], count)):
                for number, (combined, due) in enumerate(zip(done, expected, strict=True)):
                    assert combined.ranks == tuple(range(members))
                    assert combined.update is not None
                    assert torch.equal(combined.update, due), f"{members} members, n={n}, round {number}, rank {rank}"
                if "feedback" in codec:
                    assert torch.equal(done[-1].carried.own["residual"], reference.own[rank])


def test_each_combination_takes_a_way_of_its_own():
    """Otherwise the test above compares nothing: with five members the three ways give three results."""
    results = [rounds_of(5, 1500, int4, rule, 1)[0][0].update for rule in (Median(), Longest(), Mean())]
    assert not torch.equal(results[0], results[1])
    lossless = rounds_of(5, 1500, fp32, Mean(), 1)[0][0].update
    assert not torch.equal(results[2], lossless)
    assert torch.equal(lossless, Mean().combine(torch.stack(data(5, 1500, 0)), torch.ones(5)))


def test_nothing_given_is_changed():
    def member(link):
        x = data(3, 600, 0)[link.rank]
        own, shard, shared = data(3, 600, 5)
        shard = shard[: [b - a for a, b in shards(600, 3)][link.rank]]
        given = [x, own, shard, shared]
        before = [value.clone() for value in given]
        combine(exchange(link, ErrorFeedback(int4), Mean()), x, 1.0, Carried({"residual": own}, {"0": shard}), shared)
        return all(torch.equal(value, copy) for value, copy in zip(given, before, strict=True))

    assert all(run(3, member))


# --- who takes part ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["fp32", "int8", "topk", "feedback int4"])
@pytest.mark.parametrize("members", [2, 3, 4])
def test_a_member_without_finite_values_is_left_out_and_told(codec, members):
    def member(link):
        x = data(members, 600, 0)[link.rank]
        if link.rank == 1:
            x[17] = float("nan") if members == 3 else float("inf")
        return combine(exchange(link, CODECS[codec], Mean()), x, 1.0, Carried(), None)

    results = run(members, member)
    others = [rank for rank in range(members) if rank != 1]
    assert all(result.ranks == tuple(others) for result in results)
    assert all(torch.equal(result.update, results[0].update) for result in results)
    assert bool(torch.isfinite(results[0].update).all())
    assert results[1].carried.own == {}, "what it had kept it keeps"
    if codec == "fp32":
        rows = torch.stack([data(members, 600, 0)[rank] for rank in others])
        assert torch.equal(results[0].update, Mean().combine(rows, torch.ones(len(rows))))


@pytest.mark.parametrize("members", [1, 2, 3, 5])
@pytest.mark.parametrize("route", [Everyone(), Islands(2)], ids=repr)
def test_nobody_with_finite_values_is_an_outcome_and_no_error(members, route):
    def member(link):
        ex = exchange(link, int8, WeightedMean(), route=route.route(link.rank, link.members, 0))
        return combine(ex, torch.full((300,), torch.nan), 1.0, Carried(), None)

    for result in run(members, member):
        assert (result.update, result.ranks, result.reason) == (None, (), NOBODY_FINITE)


@pytest.mark.parametrize("members", [2, 3, 4])
@pytest.mark.parametrize("route", [Everyone(), Islands(2)], ids=repr)
def test_a_member_that_has_counted_nothing_is_left_out_but_is_there(members, route):
    """Its values are fine, so that nobody warns of them; its memory is kept."""

    def member(link):
        ex = exchange(link, fp32, WeightedMean(), route=route.route(link.rank, link.members, 0))
        return combine(ex, data(members, 300, 0)[link.rank], float(link.rank), Carried(), None)

    rows = torch.stack(data(members, 300, 0)[1:])
    expected = WeightedMean().combine(rows, torch.arange(1, members, dtype=torch.float64))
    for result in run(members, member):
        assert result.ranks == tuple(range(members))
        assert torch.allclose(result.update, expected, atol=1e-6), "islands round once more"
        if route == Everyone():
            assert torch.equal(result.update, expected)


@pytest.mark.parametrize("members", [1, 2, 3, 5])
@pytest.mark.parametrize("topology", [Everyone(), Islands(2)], ids=repr)
def test_nobody_who_has_counted_anything_is_an_outcome(members, topology):
    def member(link):
        ex = exchange(link, fp32, WeightedMean(), route=topology.route(link.rank, link.members, 0))
        return combine(ex, torch.ones(300), 0.0, Carried(), None)

    for result in run(members, member):
        assert (result.update, result.ranks, result.reason) == (None, tuple(range(members)), NO_SAMPLES)


def test_a_plain_mean_does_not_ask_for_weights():
    def member(link):
        return combine(exchange(link, fp32, Mean()), data(3, 300, 0)[link.rank], 0.0, Carried(), None).update

    assert torch.equal(run(3, member)[0], Mean().combine(torch.stack(data(3, 300, 0)), torch.ones(3)))


# --- routes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["fp32", "int8", "topk", "feedback int4"])
@pytest.mark.parametrize("members", [1, 2, 3, 4, 5, 6, 7])
def test_islands_combine_inside_then_between(codec, members):
    """One level, with an inner codec that loses: leaders' means in proportion to the weight behind them."""

    def member(link):
        route = Islands(2, inside=bf16).route(link.rank, link.members, 0)
        return combine(exchange(link, CODECS[codec], WeightedMean(), route=route), data(members, 700, 0)[link.rank],
                       weight_of(link.rank), Carried(), None)  # fmt: skip

    x = data(members, 700, 0)
    islands = [range(at, min(at + 2, members)) for at in range(0, members, 2)]
    means = [
        WeightedMean().combine(
            torch.stack([again(bf16, x[rank]) for rank in island]),
            torch.tensor([weight_of(rank) for rank in island], dtype=torch.float64),
        )
        for island in islands
    ]
    between = Reference(CODECS[codec], WeightedMean())
    result = again(bf16, between.round(means, [sum(weight_of(rank) for rank in island) for island in islands]))
    for combined in run(members, member):
        assert combined.ranks == tuple(range(members))
        assert torch.equal(combined.update, result)


def test_pairs_do_not_hear_of_each_other():
    """Five members: two pairs and one alone, each with a result of its own."""

    def member(link):
        route = RandomPairs().route(link.rank, link.members, 3)
        ex = exchange(link, fp32, Mean(), route=route, witnesses=members_of(route))
        return route.ranks, combine(ex, data(5, 300, 0)[link.rank], 1.0, Carried(), None)

    results = run(5, member)
    assert sorted(len(ranks) for ranks, _ in results) == [1, 2, 2, 2, 2]
    for ranks, combined in results:
        assert combined.ranks == ranks
        rows = torch.stack([data(5, 300, 0)[rank] for rank in ranks])
        assert torch.equal(combined.update, Mean().combine(rows, torch.ones(len(ranks))))


# --- bytes ------------------------------------------------------------------------------------------------------


def sent_bytes(members: int, n: int, codec, rule, topology=None) -> list[int]:
    def member(link):
        route = (topology or Everyone()).route(link.rank, link.members, 0)
        combine(exchange(link, codec, rule, route=route), data(members, n, 0)[link.rank], 1.0, Carried(), None)
        return link.meter.total().sent_bytes

    return [sent - (members - 1) * VERDICT_BYTES for sent in run(members, member)]


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "int4", "e3m0"])
@pytest.mark.parametrize("members", [3, 4, 5])
def test_scatter_gather_sends_two_times_all_but_one_shard(codec, members):
    n = 8192 * members
    size = wire_bytes(CODECS[codec].spec, CODECS[codec].layout(8192))
    sent = sent_bytes(members, n, CODECS[codec], Mean())
    assert sent == [2 * (members - 1) * size] * members
    dense = {"fp32": 32, "bf16": 16, "int8": 8.2, "int4": 4.6, "e3m0": 4.3}[codec] / 8 * n
    assert sent[0] == pytest.approx(2 * (members - 1) / members * dense, rel=0.05), "beside headers of about 130 bytes"


@pytest.mark.parametrize("members", [2, 3, 5])
def test_gather_sends_everything_to_everybody(members):
    codec = topk(1 / 8) | int8
    expected = (members - 1) * wire_bytes(codec.spec, codec.layout(2000))
    assert sent_bytes(members, 2000, codec, Mean()) == [expected] * members
    expected = (members - 1) * wire_bytes("fp32", fp32.layout(2000))
    assert sent_bytes(members, 2000, fp32, Longest()) == [expected] * members


def test_a_linear_codec_is_added_in_its_own_domain():
    """Half the elements, hence half the bytes of fp32, by the all-reduce way."""
    members, n = 4, 8192
    code = wire_bytes("fp32", fp32.layout(n // 2 // members))
    assert sent_bytes(members, n, PairSums(), Mean()) == [2 * (members - 1) * code] * members
    full = sent_bytes(members, n, fp32, Mean())[0]
    assert sent_bytes(members, n, PairSums(), Mean())[0] < 0.53 * full


@dataclass(frozen=True)
class Subset(Codec):
    """A linear codec that sends a random half of the elements, chosen by the key alone: no index crosses."""

    @property
    def spec(self) -> str:
        return "subset"

    @property
    def traits(self) -> Traits:
        return Traits(linear=True)

    def layout(self, n: int) -> Layout:
        return {"value": (torch.float32, n // 2)}

    def encode(self, x: Tensor, key: int) -> Fields:
        return {"value": x[self.chosen(len(x), key)]}

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        require(fields, self.layout(n))
        return torch.zeros(n).index_copy(0, self.chosen(n, key), fields["value"])

    @staticmethod
    def chosen(n: int, key: int) -> Tensor:
        return random_bytes(key, 4 * n).view(torch.int32).argsort(stable=True)[: n // 2]


@pytest.mark.parametrize("members", [1, 2, 4])
def test_a_codec_may_know_from_the_key_what_others_would_have_to_send(members):
    """Alone, in pairs and in an all-reduce: all choose with one key, so the kept are the exact mean."""
    n = 4096
    given = data(members, n, 0)

    def member(link):
        return combine(exchange(link, Subset(), Mean()), given[link.rank], 1.0, Carried(), None).update

    results = run(members, member)
    assert all(torch.equal(result, results[0]) for result in results)
    kept = results[0] != 0
    assert int(kept.sum()) == n // 2
    mean = sum(given[1:], given[0].clone()) / members
    assert torch.equal(results[0][kept], mean[kept])


def test_values_that_overflow_when_combined_change_nothing():
    def member(link):
        x = torch.full((600,), 3e38)
        return combine(exchange(link, fp32, Mean()), x, 1.0, Carried(), None)

    assert {(each.update, each.reason) for each in run(3, member)} == {(None, OVERFLOW)}


def test_only_leaders_send_between_islands():
    inside, between = wire_bytes("fp32", fp32.layout(2000)), wire_bytes("int8", int8.layout(2000))
    sent = sent_bytes(4, 2000, int8, Mean(), Islands(2))
    assert sent == [inside + between, inside, inside + between, inside]


def test_empty_shards_are_not_sent():
    """300 elements are two blocks: with five members three shards are empty."""
    assert [b - a for a, b in shards(300, 5)] == [0, 0, 256, 0, 44]
    first, second = (wire_bytes("int8", int8.layout(size)) for size in (256, 44))
    sent = sent_bytes(5, 300, int8, Mean())
    assert sent[0] == first + second
    assert sent[2] == second + 4 * first
    assert sent[4] == first + 4 * second


@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 10_000, 256 * 7])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shards_cover_everything_once_and_evenly(n, count):
    cut = shards(n, count)
    assert len(cut) == count
    assert [at for begin, end in cut for at in range(begin, end)] == list(range(n))
    sizes = [end - begin for begin, end in cut]
    assert max(sizes) - min(sizes) <= 256 + 255
    assert all(begin % 256 == 0 or begin == n for begin, _ in cut)


# --- verdicts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "odd", "text"),
    [
        (3, 1, "round 0, fragment 1: member 1 and the rest do not hold the same result"),
        (5, 4, "round 0, fragment 1: member 4 and the rest do not hold the same result"),
        (2, 1, "round 0, fragment 1: members 0, 1 do not hold the same result"),
    ],
)
def test_members_that_hold_another_state_are_named_on_all(members, odd, text):
    def member(link):
        shared = torch.zeros(300)
        shared[0] = -0.0 if link.rank == odd else 0.0  # a bit is enough
        with pytest.raises(StateMismatch) as error:
            combine(exchange(link, fp32, Mean()), torch.ones(300), 1.0, Carried(), shared)
        return str(error.value)

    for told in run(members, member):
        assert text in told
        assert "the same bits on every member" in told
        assert "do not write to parameters outside the optimizer" in told


def test_a_damaged_verdict_is_an_error_for_who_got_it():
    def change(purpose, sender, count, buffer):
        if len(buffer) >= VERDICT_BYTES and read(buffer.clone()).header.kind == Kind.VERDICT and sender == 2:
            buffer[40] ^= 1
        return buffer

    def member(bare):
        link = Tampered(bare, change) if bare.rank == 0 else bare
        ex = exchange(link, fp32, Mean())
        if bare.rank:
            return combine(ex, torch.ones(300), 1.0, Carried(), None).ranks
        with pytest.raises(
            PacketError, match=r"round 0, fragment 1: member 2: the checksum .*\n.*every member's verdict"
        ):
            combine(ex, torch.ones(300), 1.0, Carried(), None)
        return None

    assert run(3, member) == [None, (0, 1, 2), (0, 1, 2)]
