"""Who holds which shard: evenly, never two with one, and recoverable after every loss that the code bears."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from thinwire.errors import ConfigError
from thinwire.snapshots.erasure import Code, encode, recover
from thinwire.snapshots.placement import bearable, code_for, held_by, holders, rounds_between


@pytest.mark.parametrize("members", [6, 7, 8, 13])
def test_shares_are_even_and_no_member_has_two_of_one_snapshot(members):
    dealt = holders(range(members), Code(6, 4))
    assert all(len(set(of)) == 6 and of[0] == owner for owner, of in dealt.items())
    assert Counter(itertools.chain(*dealt.values())) == dict.fromkeys(range(members), 6)


def test_all_members_deal_alike_and_ranks_may_have_gaps():
    assert holders([9, 2, 4], Code(3, 2)) == {2: (2, 4, 9), 4: (4, 9, 2), 9: (9, 2, 4)}
    assert held_by(4, holders([2, 4, 9], Code(3, 2))) == {2: 1, 4: 0, 9: 2}
    assert held_by(0, holders(range(4), Code(2, 1))) == {0: 0, 3: 1}


def test_every_owner_is_recovered_after_every_pair_of_losses():
    code, members = Code(6, 4), range(7)
    dealt = holders(members, code)
    states = {owner: np.random.default_rng(owner).integers(0, 256, 101, dtype=np.uint8) for owner in members}
    coded = {owner: encode(state, code, 0) for owner, state in states.items()}
    for lost in itertools.combinations(members, 2):
        present = set(members) - set(lost)
        for owner, (manifest, shards) in coded.items():
            kept = {held_by(m, dealt)[owner]: shards[held_by(m, dealt)[owner]] for m in present if m in dealt[owner]}
            assert bearable(dealt[owner], present, code) == len(kept) - 4 >= 0
            assert np.array_equal(recover(manifest, kept), states[owner])


def test_a_snapshot_that_lost_more_than_it_bears_says_so():
    assert bearable((0, 1, 2), {1, 2, 5}, Code(3, 2)) == 0
    assert bearable((0, 1, 2), {2, 5}, Code(3, 2)) == -1


def test_codes_by_the_number_of_members():
    assert [code_for(members) for members in (1, 2, 3, 5, 6, 100)] == [
        None, Code(2, 1), Code(3, 2), Code(5, 4), Code(6, 4), Code(6, 4),
    ]  # fmt: skip


def test_more_shards_than_members_are_refused():
    with pytest.raises(ConfigError, match="6 shards for 4 members") as caught:
        holders([3, 2, 1, 0, 0], Code(6, 4))
    assert caught.value.mend == "take code_for(4)"


def test_how_often():
    assert rounds_between(2.0, 3600.0, 12.0) == 10, "sqrt(2 * 2 * 3600) = 120"
    assert rounds_between(0.0, 3600.0, 12.0) == 1
    with pytest.raises(ConfigError, match="rounds of 0 s"):
        rounds_between(1.0, 1.0, 0)
