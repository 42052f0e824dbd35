"""Who may go on as the group, and how those who are there connect."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import combinations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from thinwire import PeerLost
from thinwire.elastic.rendezvous import Card, NotFormed, base_after, connected, form, refusal
from thinwire.links.torch import TorchLink

NAMES = ("a", "b", "c", "d", "e", "f")


def card(name, number=0, last=(), *, here=False, at_least=1, founds=True, standby="127.0.0.1:1", base=None):
    return Card(name, standby, number, tuple(last), here, at_least, founds, tuple(last if base is None else base))


def test_a_card_comes_back_as_it_was():
    mine = card("a", 3, ("a", "b"), here=True, at_least=2, founds=False)
    assert Card.decode(mine.encode()) == mine


def test_newcomers_begin_if_one_of_them_may():
    assert refusal([card("a", founds=False), card("b")]) is None
    assert refusal([card("a", founds=False)]) == "nobody is here who was in the run"


def test_a_newcomer_that_may_not_begin_is_taken_up():
    assert refusal([card("a", 1, "a", here=True), card("b", founds=False)]) is None


def test_the_largest_wish_for_members_counts():
    assert refusal([card("a"), card("b", at_least=3)]) == "2 of the 3 members that it takes are here"
    assert refusal([card("a"), card("b", at_least=2)]) is None


def test_more_than_half_of_the_last_gathering_goes_on_anywhere():
    last = ("a", "b", "c")
    assert refusal([card("a", 4, last), card("b", 4, last)]) is None
    assert refusal([card("a", 4, last, here=True)]) == "1 of the 3 members of the last gathering are here"


def test_newcomers_do_not_make_a_minority_more():
    last = ("a", "b", "c")
    assert refusal([card("a", 4, last), *map(card, "xyz")]) == "1 of the 3 members of the last gathering are here"


def test_half_goes_on_where_the_last_gathering_met():
    last = ("a", "b")
    assert refusal([card("a", 4, last, here=True)]) is None
    assert refusal([card("a", 4, last)]) == "1 of the 2 members of the last gathering are here"


def test_whoever_went_on_with_half_alone_is_bound_to_the_place():
    """a and b met at a lighthouse; b drops out, a goes on there, then loses it: b may come back to it any time."""
    pair = ("a", "b")
    alone = base_after([card("a", 4, pair, here=True)])
    assert alone == pair
    assert refusal([card("a", 5, "a", here=True, base=alone)]) is None
    assert refusal([card("a", 5, "a", base=alone)]) == "1 of the 2 members of the last gathering are here"
    assert refusal([card("b", 4, pair, here=True)]) is None


def test_more_than_half_is_a_base_of_its_own():
    last = ("a", "b", "c")
    assert base_after([card("a", 4, last), card("c", 4, last), card("d")]) == ("a", "c", "d")
    assert base_after([card("a"), card("b")]) == ("a", "b")
    assert base_after([card("b", 5, "b", base="ab"), card("a", 4, "ab")]) == ("b", "a"), "both are back"


def test_the_newest_gathering_that_anybody_knows_counts():
    old, new = ("a", "b", "c"), ("b", "c", "d", "e")
    assert "1 of the 4" in refusal([card("a", 4, old), card("b", 5, new)])
    assert refusal([card("a", 4, old), card("b", 5, new), card("c", 5, new), card("d", 5, new)]) is None


@given(st.integers(1, 6), st.data())
def test_of_two_parts_at_two_places_one_goes_on_at_most(members, data):
    last = NAMES[:members]
    sides = data.draw(st.lists(st.sampled_from("lsx"), min_size=members, max_size=members))
    at_lighthouse = [card(n, 1, last, here=True) for n, side in zip(last, sides, strict=True) if side == "l"]
    at_standby = [card(n, 1, last) for n, side in zip(last, sides, strict=True) if side == "s"]
    goes_on = [bool(part) and refusal(part) is None for part in (at_lighthouse, at_standby)]
    assert sum(goes_on) <= 1


def test_all_who_reach_each_other_stay():
    assert connected("abc", {}) == ("a", "b", "c")
    assert connected("abc", {"a": "b"}) == ("a", "c"), "one's word is enough; the lowest ranks stay"
    assert connected("abcd", {"b": "acd"}) == ("a", "c", "d")


@given(st.sets(st.sampled_from(list(combinations("abcdef", 2)))))
def test_nobody_could_be_added(apart):
    """Largest: no other set that is connected is larger."""
    lost = {name: [other for first, other in apart if first == name] for name, _ in apart}
    kept = connected("abcdef", lost)
    whole = [
        some
        for size in range(7)
        for some in combinations("abcdef", size)
        if not any(pair in apart for pair in combinations(some, 2))
    ]
    assert kept in whole
    assert len(kept) == max(map(len, whole))


def test_many_members_are_left_out_one_by_one():
    names = [f"{number:02}" for number in range(20)]
    assert connected(names, {"07": names[:7]}) == tuple(name for name in names if name != "07")


class Place:
    """A store, and members in threads that form a group there."""

    def __init__(self):
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.address = f"127.0.0.1:{self.store.port}/torchft/1/1"

    def form(self, cards, names, hosts=None, limit_s=20.0):
        def one(rank):
            try:
                return form(self.address, rank, names, cards[rank], (hosts or {}).get(rank, "127.0.0.1"), limit_s)
            except NotFormed as failure:
                return failure

        with ThreadPoolExecutor(len(cards)) as threads:
            return list(threads.map(one, range(len(cards))))


def test_a_group_of_all_who_are_there():
    formed = Place().form([card("a"), card("b")], ("a", "b"))
    assert [[each.name for each in cards] for cards, _ in formed] == [["a", "b"]] * 2
    links = [TorchLink(group, "gloo", 10.0) for _, group in formed]
    assert [(link.rank, link.members) for link in links] == [(0, (0, 1)), (1, (0, 1))]
    words = [torch.tensor([rank], dtype=torch.uint8) for rank in (7, 8)]
    with ThreadPoolExecutor(2) as threads:
        heard = list(threads.map(
            lambda rank: links[rank].open("test").exchange({1 - rank: words[rank]}, {1 - rank: 1}, "words"), (0, 1)
        ))  # fmt: skip
    assert [int(heard[rank][1 - rank]) for rank in (0, 1)] == [8, 7]
    for link in links:
        link.close()


def test_a_link_that_is_cut_ends_what_is_under_way_on_both_sides():
    formed = Place().form([card("a"), card("b")], ("a", "b"))
    links = [TorchLink(group, "gloo", 30.0) for _, group in formed]
    jobs = [
        link.spawn(partial(link.open("test").exchange, {}, {1 - link.rank: 1}, "a word that is never said"), "job")
        for link in links
    ]
    assert not any(job.done() for job in jobs)
    links[0].cut("somebody left")
    for job in jobs:
        with pytest.raises(
            PeerLost, match=r"lost member \d during a (word that is never said|gathering that has ended): "
        ):
            job.wait()
    with pytest.raises(PeerLost, match="lost member 1 during a gathering that has ended: somebody left"):
        links[0].open("test").exchange({}, {1: 1}, "another")
    for link in links:
        link.cut("twice does no harm")
        link.close()


def test_a_refusal_is_the_same_on_all():
    cards = [card("a", 3, ("a", "x", "y")), card("b")]
    failures = Place().form(cards, ("a", "b"))
    assert [(str(f), f.refused) for f in failures] == [("1 of the 3 members of the last gathering are here", True)] * 2


def test_whoever_does_not_come_is_named():
    [failure] = Place().form([card("a")], ("a", "b"), limit_s=0.5)
    assert "b was there and does not answer: nothing within 0.5 s" in str(failure)
    assert not failure.refused


def test_one_that_cannot_connect_is_everybodys_failure_and_all_hear_who_reaches_whom():
    """An address of no interface of ours fails at once; nobody listens at port 1, so nobody is reached either."""
    failures = Place().form([card("a"), card("b")], ("a", "b"), hosts={1: "192.0.2.1"}, limit_s=2.0)
    assert len({str(failure) for failure in failures}) == 1
    assert failures[0].unreachable == {"a": ("b",), "b": ("a",)}


def test_a_store_that_is_gone():
    place = Place()
    place.address = "127.0.0.1:1/x"
    [failure] = place.form([card("a")], ("a",), limit_s=1.0)
    assert str(failure).startswith("the store of this gathering does not answer")
