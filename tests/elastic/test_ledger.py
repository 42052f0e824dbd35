"""The sample ledger: exactly once, whatever comes and goes, and a crash costs what was in hand."""

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinwire.elastic.ledger import Book, Ledger, each, first_units, gaps, size, united, without_first
from thinwire.errors import ConfigError, StateMismatch


def row(ledger: Ledger, name: str, count: int) -> list[int]:
    return list(islice(each(ledger.lease(name)), count))


def test_the_lowest_free_units_in_blocks_by_rank():
    ledger = Ledger(100, block=2, done=((0, 3), (5, 1))).dealt(["a", "b"])
    assert row(ledger, "a", 5) == [3, 4, 8, 9, 12]
    assert row(ledger, "b", 5) == [6, 7, 10, 11, 14]
    assert row(ledger, "c", 5) == []


def test_a_lease_is_dealt_once():
    ledger = Ledger(10).dealt(["a", "b"])
    assert ledger.dealt(["a", "c"]) is ledger


def test_what_is_not_used_is_free_again():
    ledger = Ledger(100, block=4).dealt(["a", "b"])
    after, done = ledger.committed({"a": 3, "b": 5})
    assert done == {"a": ((0, 3),), "b": ((4, 4), (12, 1))}
    assert after.done == ((0, 3), (4, 4), (12, 1))
    assert row(after.dealt(["b"]), "b", 6) == [3, 8, 9, 10, 11, 13]


def test_the_last_units_are_everybodys():
    ledger = Ledger(100, block=50, end=104, done=((0, 100),)).dealt(["a", "b"])
    assert (row(ledger, "a", 9), row(ledger, "b", 9)) == ([100, 101], [102, 103])
    full, _ = ledger.committed({"a": 2, "b": 2})
    assert (full.is_full, full.epochs, full.units_done) == (True, 1, 104)


def test_units_in_hand_beside_a_round_stay_ones_own():
    books = [Book(Ledger(100, block=4, reserve=2), name) for name in "ab"]
    assert [books[0].take("ab") for _ in range(3)] == [0, 1, 2]
    assert [books[1].take("ab") for _ in range(2)] == [4, 5]
    told = {rank: book.tell("ab") for rank, book in enumerate(books)}
    assert told == {0: (0, 3), 1: (0, 2)}
    assert [books[0].take("ab") for _ in range(3)] == [3, 8, None], "no more than was said"
    assert books[1].take("ab") == 6
    for book in books:
        assert book.hear("ab", told, (0, 1)) == {"a": ((0, 3),), "b": ((4, 2),)}
    assert books[0].ledger == books[1].ledger
    assert [book.taken for book in books] == [2, 1]
    assert [books[1].take("ab") for _ in range(2)] == [7, 13]
    assert books[0].take("ab") == 9


def test_a_skipped_round_frees_the_hand():
    book = Book(Ledger(100, block=4, reserve=1), "a")
    book.take("a")
    book.tell("a")
    assert [book.take("a"), book.take("a")] == [1, None]
    book.skipped()
    assert book.take("a") == 2
    assert book.tell("a") == (0, 3)


def test_who_abstains_has_done_nothing():
    books = [Book(Ledger(100, block=2), name) for name in "ab"]
    for book in books:
        book.take("ab"), book.take("ab")
    told = {rank: book.tell("ab") for rank, book in enumerate(books)}
    for book in books:
        assert book.hear("ab", told, [1]) == {"b": ((2, 2),)}
    assert books[0].take("ab") == 0


def test_one_who_came_after_the_lease_has_nothing_until_a_round_commits():
    old = Book(Ledger(100, block=2), "a")
    old.take("a")
    new = Book(Ledger(100), "b")
    new.load_state_dict(old.state_dict())
    assert new.take("ab") is None
    told = {0: old.tell("ab"), 1: new.tell("ab")}
    assert old.hear("ab", told, (0, 1)) == new.hear("ab", told, (0, 1)) == {"a": ((0, 1),), "b": ()}
    assert (old.take("ab"), new.take("ab")) == (1, 3)


def test_the_state_goes_there_and_back():
    ledger = Ledger(7, 3, 90, 1, 2, ((0, 4), (9, 1)), ("a",), {"a": ((20, 2),)}, "c0ffee")
    assert Ledger.from_state(ledger.state_dict()) == ledger
    assert ledger.state_dict()["done"] == [[0, 4], [9, 1]], "plain values"


def test_a_claim_beyond_the_lease_is_refused():
    with pytest.raises(StateMismatch, match="member a has worked on 3 units, lease 0 holds 2 for it"):
        Ledger(5, end=2).dealt(["a"]).committed({"a": 3})


def test_units_of_another_lease_are_refused():
    book = Book(Ledger(5), "a")
    with pytest.raises(StateMismatch, match="member b has units of lease 3, and lease 0 is in force"):
        book.hear("ab", {0: (0, 0), 1: (3, 1)}, (0, 1))


def test_the_chain_is_of_all_that_was_done():
    ledger = Ledger(9, block=2)
    ways = [{"a": 1, "b": 1}, {"a": 2, "b": 1}, {"a": 1}]
    chains = {ledger.dealt(["a", "b"]).committed(told)[0].chain for told in ways}
    assert len(chains) == 3
    again, _ = ledger.dealt(["a", "b"]).committed({"b": 1, "a": 1})
    assert again.chain in chains
    assert again.dealt(["a"]).committed({"a": 0})[0].chain not in chains


def test_nothing_is_done_twice():
    with pytest.raises(StateMismatch, match="unit 4 would be done twice"):
        united(((0, 5),), ((4, 2),))


@pytest.mark.parametrize("name", ["units_per_epoch", "block"])
def test_sizes_are_checked(name):
    with pytest.raises(ConfigError, match=f"Ledger: {name} = 0"):
        Ledger(**{"units_per_epoch": 1, name: 0})


runs = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), max_size=5)


@given(runs, st.integers(0, 40), st.integers(0, 20))
def test_runs_are_sets_of_units(spaces, end, count):
    at, taken = 0, []
    for space, length in spaces:
        taken.append((at + space + 1, length))
        at += space + 1 + length
    taken = tuple(taken)
    units = list(each(taken))
    assert list(each(united(taken))) == units
    assert list(each(gaps(taken, end))) == sorted(set(range(end)) - set(units))
    assert list(each(first_units(iter(taken), count))) == units[:count]
    assert list(each(without_first(taken, count))) == units[count:]
    assert size(taken) == len(units)


class World:
    """Members with books, and what a schedule of faults does to them; nobody else keeps count of units."""

    def __init__(self, reserve: int, end: int) -> None:
        self.names = ["m0", "m1"]
        self.reserve, self.made, self.end = reserve, 2, end
        self.books = {name: Book(Ledger(10, 3, end, reserve), name) for name in self.names}
        self.done: dict[int, str] = {}
        self.lost = self.worked = 0
        self.hands: dict[str, list[int]] = {name: [] for name in self.names}

    def work(self, name: str, count: int) -> None:
        for _ in range(count):
            unit = self.books[name].take(self.names)
            if unit is not None:
                self.worked += 1
                self.hands[name].append(unit)

    def meet(self) -> None:
        """Members meet after a commit, or as a round fails that all of them have begun."""
        if any(book.ledger.leased for book in self.books.values()):
            for name in self.names:
                self.books[name].tell(self.names)
                self.books[name].skipped()

    def join(self) -> None:
        """The newcomer is given a member's ledger."""
        self.meet()
        name, self.made = f"m{self.made}", self.made + 1
        book = Book(Ledger(10), name)
        book.load_state_dict(self.books[self.names[0]].state_dict())
        self.names.insert(self.made % (len(self.names) + 1), name)
        self.books[name], self.hands[name] = book, []

    def crash(self, index: int) -> None:
        if len(self.names) > 1:
            self.meet()
            name = self.names.pop(index % len(self.names))
            del self.books[name]
            self.lost += len(self.hands.pop(name))

    def round(self, silent: int | None, during: list[int]) -> None:
        told = {rank: self.books[name].tell(self.names) for rank, name in enumerate(self.names)}
        sizes = {name: len(self.hands[name]) for name in self.names}
        for name, count in zip(self.names, during, strict=False):
            self.work(name, count if self.reserve else 0)
        ranks = [r for r in range(len(self.names)) if silent is None or r != silent % len(self.names)]
        heard = [self.books[name].hear(self.names, told, ranks) for name in self.names]
        assert all(one == heard[0] for one in heard)
        assert len({str(book.state_dict()) for book in self.books.values()}) == 1
        for rank, name in enumerate(self.names):
            if rank not in ranks:
                self.lost += len(self.hands[name])
                self.hands[name] = []
                continue
            carried, self.hands[name] = self.hands[name][: sizes[name]], self.hands[name][sizes[name] :]
            assert sorted(carried) == list(each(heard[0][name]))
            for unit in carried:
                assert unit not in self.done
                self.done[unit] = name


events = st.lists(
    st.one_of(
        st.tuples(st.just("work"), st.lists(st.integers(0, 9), min_size=1, max_size=6)),
        st.tuples(st.just("round"), st.one_of(st.none(), st.integers(0, 5)), st.lists(st.integers(0, 4), max_size=6)),
        st.tuples(st.just("crash"), st.integers(0, 5)),
        st.tuples(st.just("join")),
    ),
    max_size=40,
)


@given(events, st.sampled_from([0, 2]))
def test_each_unit_once_whatever_comes_and_goes(events, reserve):
    world = World(reserve, end=50)
    for what, *details in events:
        if what == "work":
            for name, count in zip(list(world.names), details[0], strict=False):
                world.work(name, count)
        else:
            getattr(world, what)(*details)
    while not world.books[world.names[0]].ledger.is_full:
        for name in world.names:
            world.work(name, 3)
        world.round(None, [])
    in_hand = sum(map(len, world.hands.values()))
    assert sorted(world.done) == list(range(50))
    assert world.worked == 50 + world.lost + in_hand, "a crash costs what the crashed had in hand, and nothing else"
    assert world.books[world.names[0]].ledger.epochs == 5
