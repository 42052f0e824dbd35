"""The frame of a round within an island, over the local link: parts of a model take effect together or not at all."""

from __future__ import annotations

import pytest
import torch

import thinwire
from thinwire.aggregators import Mean
from thinwire.collectives import NO_SAMPLES, OVERFLOW, Carried, Combined
from thinwire.errors import ConfigError, LinkError, PeerLost, StateMismatch
from thinwire.island import Island
from thinwire.links.islands import IslandLink, within
from thinwire.pace import Told

BEFORE, AFTER = Carried(own={"r": torch.zeros(1)}), Carried(own={"r": torch.ones(1)})
DONE = Combined(torch.ones(2), AFTER, (0, 1))


def framed(what_happens, x=None, weights=(1.0, 2.0, 4.0)):
    """Three members of an island; `what_happens(rank, x, weight)` is their round. What each gets, or the error."""

    def member(link):
        frame = Island(link).frame("round 3, fragment 0")
        vector = torch.zeros(2) if x is None else x[link.rank]
        try:
            return frame(lambda x, weight: what_happens(link.rank, x, weight), vector, weights[link.rank], BEFORE)
        except thinwire.ThinwireError as error:
            return error

    return thinwire.run(3, member)


def test_a_round_that_all_parts_commit_is_each_parts_own():
    assert framed(lambda *_: DONE) == [DONE] * 3


def test_the_weight_of_an_island_is_its_members_together():
    seen = []
    framed(lambda rank, x, weight: seen.append(weight) or DONE)
    assert seen == [7.0] * 3


def test_one_part_that_is_not_finite_makes_all_abstain():
    seen = []
    framed(
        lambda rank, x, weight: seen.append(bool(x.isnan().all())) or DONE,
        [torch.zeros(2), torch.zeros(0), torch.tensor([1.0, torch.inf])],
    )
    assert seen == [True] * 3  # of no elements all are


@pytest.mark.parametrize("reason", [OVERFLOW, "given up after 3 attempts: member 1: checksum"])
def test_one_part_that_was_skipped_skips_all_for_its_reason(reason):
    found = framed(lambda rank, *_: Combined(None, BEFORE, reason=reason) if rank == 1 else DONE)
    for combined in found:
        assert (combined.update, combined.ranks, combined.reason) == (None, (), reason)
        assert combined.carried is BEFORE


def test_who_took_part_is_kept_where_all_parts_were_skipped_alike():
    skipped = Combined(None, BEFORE, (0, 1), NO_SAMPLES)
    assert framed(lambda *_: skipped) == [skipped] * 3


def test_all_parts_lose_whom_one_has_lost():
    def cut(rank, *_):
        if rank == 2:
            raise PeerLost([1, 3], during="round 3, fragment 0", why="no answer within 60 s")
        return DONE

    first, second, third = framed(cut)
    assert third.wrong == "lost members 1, 3 during round 3, fragment 0: no answer within 60 s"
    for error in (first, second):
        assert isinstance(error, PeerLost)
        assert error.ranks == (1, 3)
        assert error.wrong.endswith("round 3, fragment 0: part 2 of this island's model cannot reach it")


def test_all_parts_fail_where_one_does_and_say_why():
    def odd(rank, *_):
        if rank == 0:
            raise StateMismatch("members 0, 1 do not hold the same result", expected="the same", mend="look")
        return DONE

    first, *others = framed(odd)
    assert isinstance(first, StateMismatch)
    for error in others:
        assert isinstance(error, LinkError)
        assert "round 3, fragment 0 failed on part 0 of this island's model: members 0, 1 do not hold" in error.wrong


def test_an_island_is_as_slow_as_its_slowest_member_and_adds_up_the_rest():
    def member(link):
        mine = {0: Told(1.0 + link.rank, 2.0, 0.1, 5.0 - link.rank, 1.5, 2.0), 1: Told(1.0, 1.0, 0.1)}
        if link.rank == 1:
            mine[1] = Told(1.0, 1.0, 0.1, size2=-1.0)
        return Island(link).told(mine), Island(link).all_of(True), Island(link).all_of(link.rank > 0)

    for told in thinwire.run(3, member):
        assert told == ({0: Told(3.0, 6.0, 0.1, 5.0, 4.5, 6.0), 1: Told(1.0, 3.0, 0.1, size2=-1.0)}, True, False)


def test_shares_are_gathered_in_order_whatever_their_sizes():
    def member(link):
        return Island(link).gather(torch.full((link.rank,), float(link.rank)), [0, 1, 2])

    for rows in thinwire.run(3, member):
        assert [row.tolist() for row in rows] == [[], [1.0], [2.0, 2.0]]


def test_a_rule_that_looks_at_whole_vectors_is_refused_within_an_island():
    def member(link):
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        rule = Mean()
        object.__setattr__(rule, "needs", "rows")
        method = thinwire.diloco().but(aggregator=rule)
        with pytest.raises(ConfigError, match="each part of the model would choose for itself"):
            thinwire.synchronize(model, optimizer, method, IslandLink(link, link))

    thinwire.run(2, member)


def test_a_link_across_islands_is_the_one_across():
    def member(link):
        both = IslandLink(link, link)
        assert within(both) is link
        assert within(link) is None
        assert (both.rank, both.members, both.meter) == (link.rank, link.members, link.meter)
        both.local_step()
        assert both.now() == link.now()

    thinwire.run(2, member)
