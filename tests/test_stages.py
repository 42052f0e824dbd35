"""Rounds of several exchanges, packets that add up, and what is remembered of a round, on small parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from doubles import Counted, Halves
from test_collectives import data, exchange
from thinwire.aggregators import Mean, Median, WeightedMean
from thinwire.codecs import ErrorFeedback, int4, int8, topk
from thinwire.codecs.base import Codec, Traits, require
from thinwire.collectives import NOBODY_FINITE, Carried, combine
from thinwire.errors import ConfigError, PacketError
from thinwire.links.faulty import Tampered, flip
from thinwire.links.local import run
from thinwire.method import Method
from thinwire.packet import Fields, Layout
from thinwire.topologies import Everyone, Islands


def cents(members: int, ranks: Sequence[int], n: int = 700) -> Tensor:
    """What the members' sum of whole hundredths divided by their number is."""
    x = data(members, n, 0)
    total = torch.stack([(x[rank] * 100).round().int() for rank in ranks]).sum(dim=0)
    return total.float() / 100 / len(ranks)


# --- packets that add up ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("members", [1, 2, 3, 5])
def test_summed_packets_decode_to_the_sum(members):
    def member(link):
        return combine(exchange(link, Counted(100), Mean()), data(members, 700, 0)[link.rank], 1.0, Carried(), None)

    for combined in run(members, member):
        assert combined.ranks == tuple(range(members))
        assert torch.equal(combined.update, cents(members, range(members)))


def test_who_abstains_is_not_in_the_sum():
    def member(link):
        x = data(4, 700, 0)[link.rank]
        x[3] = torch.nan if link.rank == 2 else x[3]
        return combine(exchange(link, Counted(100), Mean()), x, 1.0, Carried(), None)

    for combined in run(4, member):
        assert combined.ranks == (0, 1, 3)
        assert torch.equal(combined.update, cents(4, (0, 1, 3)))


def test_nobody_to_add_up():
    def member(link):
        return combine(exchange(link, Counted(100), Mean()), torch.full((700,), torch.inf), 1.0, Carried(), None)

    assert all((c.update, c.reason) == (None, NOBODY_FINITE) for c in run(3, member))


def test_a_weighted_mean_of_them_is_decoded_first():
    """Counts cannot be weighed: every member decodes all, and weighs."""

    def member(link):
        ex = exchange(link, Counted(100), WeightedMean())
        return combine(ex, data(3, 700, 0)[link.rank], link.rank + 1.0, Carried(), None).update

    rows = torch.stack([(x * 100).round() / 100 for x in data(3, 700, 0)])
    expected = WeightedMean().combine(rows, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    assert all(torch.allclose(update, expected, atol=1e-2) for update in run(3, member))


def test_feedback_knows_what_was_sent_of_a_sum():
    def member(link):
        x = data(3, 700, 0)[link.rank]
        ex = exchange(link, _made_contractive(Counted(100)), Mean())
        return x, combine(ex, x, 1.0, Carried(), None).carried

    for x, carried in run(3, member):
        assert torch.equal(carried.own["residual"], x - (x * 100).round() / 100)
        assert carried.dropped == {}, "nothing is encoded twice"


def _made_contractive(codec: Codec) -> ErrorFeedback:
    memory = ErrorFeedback(int8)
    object.__setattr__(memory, "codec", codec)  # whole hundredths claim nothing of small numbers
    return memory


@pytest.mark.parametrize("codec", [Counted(100), Halves(int8)], ids=lambda codec: codec.spec)
def test_a_median_of_what_is_added_on_the_way_is_refused(codec):
    with pytest.raises(ConfigError, match=r"aggregator Median\(\) with linear codec .*: values are added as codes"):
        Method(codec=codec, aggregator=Median())


# --- stages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [int8, topk(1 / 8), Counted(100)], ids=lambda codec: codec.spec)
@pytest.mark.parametrize("members", [1, 2, 3, 5])
def test_stages_are_rounds_of_their_own(codec, members):
    """Each half comes out as if it had been a round alone."""

    def member(link, how, part):
        return combine(exchange(link, how, Mean()), part(data(members, 600, 0)[link.rank]), 1.0, Carried(), None)

    whole = run(members, lambda link: member(link, Halves(codec), lambda x: x))
    first = run(members, lambda link: member(link, codec, lambda x: x[:300]))
    second = run(members, lambda link: member(link, codec, lambda x: x[300:]))
    for staged, a, b in zip(whole, first, second, strict=True):
        assert torch.equal(staged.update, torch.cat([a.update, b.update]))
        assert staged.carried.stages == {"count": torch.tensor(1)}


def test_feedback_goes_around_stages():
    """Each half keeps what its second encoding dropped, under its own number."""

    def member(link):
        carried, applied, wanted = Carried(), torch.zeros(600), torch.zeros(600)
        for number in range(4):
            x = data(3, 600, number)[link.rank]
            ex = exchange(link, ErrorFeedback(Halves(int4)), Mean(), number=number)
            combined = combine(ex, x, 1.0, carried, None)
            carried, applied, wanted = combined.carried, applied + combined.update, wanted + x
        return wanted, applied, carried

    results = run(3, member)
    mean = torch.stack([wanted for wanted, _, _ in results]).mean(dim=0)
    owed = torch.stack([carried.own["residual"] for _, _, carried in results]).mean(dim=0)
    halves = [torch.cat([carried.dropped[half] for _, _, carried in results]) for half in ("0", "1")]
    assert torch.allclose(results[0][1] + owed + torch.cat(halves), mean, atol=1e-5)
    assert float(owed.norm()) > 0
    assert int(results[0][2].stages["count"]) == 4


@pytest.mark.parametrize("bad", range(4))
def test_a_damaged_packet_in_any_stage_is_sent_again(bad):
    """Of each half a member gets another's contribution to its shard, then that one's combined shard."""

    def member(link, change):
        damaged = Tampered(link, change)
        x = data(3, 1536, 0)[link.rank]
        return combine(exchange(damaged, Halves(int8), Mean()), x, 1.0, Carried(), None)

    clean = run(3, lambda link: member(link, lambda purpose, sender, count, b: b))
    hit = run(3, lambda link: member(link, lambda _, sender, count, b: flip(b) if (sender, count) == (1, bad) else b))
    for got, due in zip(hit, clean, strict=True):
        assert torch.equal(got.update, due.update)
        assert int(got.carried.stages["count"]) == 1


def test_what_stages_remember_is_kept_by_a_member_that_abstains():
    """It is alike on all members; only what a member owes is its own, and stays."""

    def member(link):
        carried = Carried(own={"residual": torch.full((600,), float(link.rank))}, stages={"count": torch.tensor(4)})
        x = data(3, 600, 0)[link.rank]
        x = x * torch.nan if link.rank == 1 else x
        return combine(exchange(link, ErrorFeedback(Halves(int8)), Mean()), x, 1.0, carried, None)

    results = run(3, member)
    assert all(int(result.carried.stages["count"]) == 5 for result in results)
    assert torch.equal(results[1].carried.own["residual"], torch.ones(600))
    assert not torch.equal(results[0].carried.own["residual"], torch.zeros(600))


@dataclass(frozen=True)
class Half(Codec):
    """Sends half of everything."""

    @property
    def spec(self) -> str:
        return "half"

    @property
    def traits(self) -> Traits:
        return Traits()

    def layout(self, n: int) -> Layout:
        return {"value": (torch.float32, n)}

    def encode(self, x: Tensor, key: int) -> Fields:
        return {"value": x / 2}

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        require(fields, self.layout(n))
        return fields["value"]

    def contraction(self, n: int) -> float | None:
        return 0.75


def test_the_owner_of_a_shard_that_abstains_has_sent_what_it_owed_of_it():
    """Its own vector was not counted, but the shard it combined went out with what was left of the round before."""

    def member(link):
        carried, updates = Carried(), []
        for number, value in enumerate((1.0, 2.0)):
            x = torch.full((768,), torch.nan if (link.rank, number) == (1, 1) else value)
            done = combine(exchange(link, ErrorFeedback(Half()), Mean(), number=number), x, 1.0, carried, None)
            carried, updates = done.carried, [*updates, float(done.update[0])]
        return updates, float(carried.own["residual"][0]), float(carried.dropped["0"][0])

    # Round 0: 1 is sent as 1/2, their mean 1/2 as 1/4. Round 1: 2 1/2 is sent as 1 1/4, with 1/4 of before as 3/4.
    assert run(3, member) == [([0.25, 0.75], owed, 0.75) for owed in (1.25, 0.5, 1.25)]


@pytest.mark.parametrize("members", [2, 3])
def test_what_waits_of_a_member_that_weighs_nothing_stays_as_it_was(members):
    def member(link):
        carried, owed = Carried(), []
        for number, weight in enumerate((1.0, 1.0 if link.rank else 0.0)):
            ex = exchange(link, ErrorFeedback(Half()), WeightedMean(), number=number)
            carried = combine(ex, torch.ones(768), weight, carried, None).carried
            owed.append(float(carried.own["residual"][0]))
        return owed

    assert run(members, member) == [[0.5, 0.5]] + [[0.5, 0.75]] * (members - 1)


@pytest.mark.parametrize("members", [3, 4])
def test_leaders_go_through_stages_and_an_abstaining_leader_speaks_for_its_island(members):
    def member(link):
        route = Islands(2).route(link.rank, link.members, 0)
        x = data(members, 600, 0)[link.rank]
        x = x * torch.nan if link.rank == 0 else x
        ex = exchange(link, ErrorFeedback(Halves(int8)), Mean(), route=route)
        return combine(ex, x, 1.0, Carried(), None)

    results = run(members, member)
    assert all(torch.equal(result.update, results[0].update) for result in results)
    assert results[0].ranks == tuple(range(1, members))
    assert "residual" in results[0].carried.own, "it sent the island's mean, and owes what the codec dropped of it"
    assert results[1].carried.own == {}, "a follower sends to its leader at full precision"


def test_what_a_scheme_asks_of_the_other_parts():
    tracking = replace_class_flags(tracks=True)
    with pytest.raises(ConfigError, match=r"with aggregator WeightedMean\(\): it keeps the mean of what all members"):
        Method(codec=tracking, aggregator=WeightedMean())
    with pytest.raises(ConfigError, match=r"over Islands\(.*: islands weigh what they pass on"):
        Method(codec=tracking, topology=Islands(2))
    with pytest.raises(ConfigError, match="its members' weights would be ignored\n  expected  a weighted mean"):
        Method(codec=replace_class_flags(weighs=True))
    with pytest.raises(ConfigError, match=r"it corrects the local steps of whole rounds\n  expected  Delta\(\) in one"):
        Method(codec=replace_class_flags(corrects=True))
    assert Method(codec=tracking, topology=Everyone()).feedback is tracking


def replace_class_flags(**flags: bool) -> ErrorFeedback:
    memory = replace(ErrorFeedback(int8))
    for name, value in flags.items():
        object.__setattr__(memory, name, value)
    return memory


def test_packets_that_cannot_be_added_fail_the_round():
    @dataclass(frozen=True)
    class Touchy(Codec):
        """Refuses to add."""

        @property
        def spec(self) -> str:
            return "touchy"

        @property
        def traits(self) -> Traits:
            return Traits(summable=True)

        def layout(self, n: int) -> Layout:
            return {"value": (torch.float32, n)}

        def encode(self, x: Tensor, key: int) -> Fields:
            return {"value": x}

        def decode(self, fields: Fields, n: int, key: int) -> Tensor:
            return fields["value"]

        def add(self, contributions: Sequence[Fields], n: int) -> Fields:
            raise PacketError("counts that cannot be")

    def member(link):
        return combine(exchange(link, Touchy(), Mean()), data(3, 700, 0)[link.rank], 1.0, Carried(), None)

    for combined in run(3, member):
        assert combined.update is None
        assert "counts that cannot be" in combined.reason
