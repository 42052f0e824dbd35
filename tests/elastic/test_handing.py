"""States handed over a link: to the bit, from several donors, only what is missing, through damage and after cuts."""

from __future__ import annotations

import pytest
import torch
from test_pieces import same

from thinwire.elastic import handing
from thinwire.elastic.handing import Shelf, hand_over
from thinwire.elastic.pieces import cut
from thinwire.errors import PacketError, PeerLost, StateMismatch
from thinwire.links import local
from thinwire.links.faulty import Tampered, flip
from thinwire.links.network import Network
from thinwire.packet import wire_bytes

COMMON = {"anchor": [torch.arange(1000) + 1000 * n for n in range(12)], "step": 7}
LENT = {"inner": {0: torch.ones(50)}}


def go(members, donors, takers, common=COMMON, lent=LENT, shelves=None, around=None, network=None):
    """Results and bytes of all members; `common` may be a function of the rank, `around` wraps a member's link."""
    shelves = shelves or {rank: Shelf() for rank in range(members)}
    received = {}

    def work(link):
        mine = common(link.rank) if callable(common) else common
        given = (mine, lent) if link.rank in donors else (None, None)
        try:
            return hand_over(around(link) if around else link, donors, takers, *given, shelves[link.rank])
        finally:
            received[link.rank] = link.meter.total()

    return local.run(members, work, network), received


def pieces_bytes(*states):
    return sum({digest: size for state in states for digest, size in cut(state).manifest.sizes.items()}.values())


@pytest.mark.parametrize(
    ("members", "donors", "takers"),
    [(2, (0,), (1,)), (2, (1,), (0,)), (3, (0, 2), (1,)), (5, (0, 2, 3), (1, 4)), (3, (1,), (0, 2)), (4, (1, 2), (0,))],
)
def test_takers_hold_what_donors_hold(members, donors, takers):
    results, _ = go(members, donors, takers)
    for rank, (common, lent) in enumerate(results):
        if rank in donors:
            assert common is COMMON
            assert lent is LENT
        elif rank in takers:
            same(common, COMMON)
            same(lent, LENT)
        else:
            assert (common, lent) == ({}, {})


def test_nothing_crosses_without_takers():
    results, received = go(3, (0, 1, 2), ())
    assert all(common is COMMON for common, _ in results)
    assert all(traffic.messages_sent == 0 for traffic in received.values())


def test_nothing_lent_is_an_empty_state():
    (_, (_, lent)), _ = go(2, (0,), (1,), lent=None)
    assert lent == {}


def test_a_piece_of_both_states_crosses_once():
    (_, (common, lent), _), received = go(3, (0, 2), (1,), lent={"again": COMMON["anchor"]})
    same(lent["again"], COMMON["anchor"])
    same(common, COMMON)
    assert received[1].received_bytes < pieces_bytes(COMMON) + 20_000
    assert received[2].sent_bytes > 0.3 * pieces_bytes(COMMON), "any donor of the common state gives it"


@pytest.mark.parametrize("known", [0, 1, 5, 12])
def test_only_what_is_not_on_the_shelf_crosses(known):
    """One donor: what crosses is a greeting, the manifest, the rest in one answer, and the end."""
    made = cut(COMMON)
    shelf = Shelf()
    for digest in list(made.views)[:known]:
        shelf.put(digest, made.views[digest])
    rest = sum(list(made.manifest.sizes.values())[known:])
    (_, (common, _)), received = go(2, (0,), (1,), lent=None, shelves={0: Shelf(), 1: shelf})
    same(common, COMMON)

    def answer(size):
        return wire_bytes("state pieces", {"pieces": (torch.uint8, size)})

    greeting = 3 * wire_bytes("state", {"digests": (torch.uint8, 64), "sizes": (torch.int64, 2)})
    due = greeting + answer(len(made.manifest.text)) + (answer(rest) if rest else 0) + answer(0)
    assert received[1].received_bytes == due
    assert shelf.nbytes == pieces_bytes(COMMON) + len(made.manifest.text)


def test_the_second_time_only_what_changed_crosses():
    shelves = {0: Shelf(), 1: Shelf()}
    go(2, (0,), (1,), shelves=shelves)
    newer = {**COMMON, "anchor": [*COMMON["anchor"][:-1], torch.zeros(1000, dtype=torch.int64)], "step": 8}
    (_, (common, _)), received = go(2, (0,), (1,), common=newer, shelves=shelves)
    same(common, newer)
    assert 8000 < received[1].received_bytes < 8000 + 4000


@pytest.mark.parametrize(("donors", "takers"), [((0, 1, 2), (3,)), ((0, 1, 2, 3), (4, 5)), ((0, 1), (2, 3, 4))])
def test_donors_give_equal_shares(donors, takers):
    """To within the size of one question, of which there are as many as takers."""
    state = {"a": [torch.full((1 << 18,), float(n)) for n in range(24)]}  # 24 MiB in pieces of 1
    members = len(donors) + len(takers)
    _, received = go(members, donors, takers, state, None, network=Network(1e8, 1e8))
    sent = [received[rank].sent_bytes for rank in donors]
    share = len(takers) * pieces_bytes(state) / len(donors)
    assert all(abs(each - share) < len(takers) * (4 << 20) for each in sent), sent
    assert sum(sent) < len(takers) * pieces_bytes(state) * 1.01


def test_messages_are_of_some_mebibytes_at_most(monkeypatch):
    most = []

    def seen(purpose, sender, count, buffer):
        most.append(buffer.numel())
        return buffer

    state = {"a": torch.arange(5_000_000)}  # 40 MB
    go(2, (0,), (1,), state, None, around=lambda link: Tampered(link, seen))
    assert 4 << 20 < max(most) < (4 << 20) + 200


def test_donors_that_differ_are_found_by_all():
    seen = {}

    def work(link):
        mine = None if link.rank == 1 else {"a": torch.full((3,), float(link.rank == 3))}
        try:
            hand_over(link, (0, 2, 3), (1,), mine, None, Shelf())
        except StateMismatch as error:
            seen[link.rank] = str(error)

    local.run(4, work)
    assert seen.keys() == {0, 1, 2, 3}
    assert len(set(seen.values())) == 1
    assert "on member 0" in seen[1]
    assert "hold different ones" in seen[1]


# --- damage ----------------------------------------------------------------------------------------------------------


def damaging(at, where):
    """A link of member `at` on which messages are damaged that `where(sender, count)` picks."""

    def change(purpose, sender, count, buffer):
        return flip(buffer, at=buffer.numel() // 2) if where(sender, count) else buffer

    return lambda link: Tampered(link, change) if link.rank == at else link


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_what_comes_damaged_is_asked_for_again(count):
    """Every message of a donor's, in turn: greeting, manifest, pieces, end."""
    results, _ = go(2, (0,), (1,), lent=None, around=damaging(1, lambda sender, n: n == count))
    same(results[1][0], COMMON)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_question_that_comes_damaged_is_asked_again(count):
    results, _ = go(2, (0,), (1,), lent=None, around=damaging(0, lambda sender, n: n == count))
    same(results[1][0], COMMON)


def test_what_one_donor_gives_damaged_another_gives_whole():
    """All that member 0 answers is damaged: member 2 gives everything."""
    results, received = go(3, (0, 2), (1,), lent=None, around=damaging(1, lambda sender, n: sender == 0 and n > 0))
    same(results[1][0], COMMON)
    assert received[2].sent_bytes > pieces_bytes(COMMON)


def test_what_comes_damaged_three_times_is_given_up_without_keeping_anybody_waiting():
    def work(link):
        wrapped = damaging(1, lambda sender, n: n > 1)(link)
        given = (COMMON, None) if link.rank == 0 else (None, None)
        try:
            hand_over(wrapped, (0,), (1,), *given, Shelf())
            return "done"
        except PacketError as error:
            return str(error)

    done, error = local.run(2, work)
    assert done == "done"
    assert "checksum" in error


def test_pieces_that_are_not_what_the_manifest_says_are_not_believed(monkeypatch):
    """A donor whose memory is bad: packets are intact, a piece is not."""
    real = handing.cut

    def bad(state):
        made = real(state)
        digest = next(iter(made.views))
        made.views[digest] = memoryview(bytearray(len(made.views[digest])))
        return made

    ranks = iter((True, False))  # the first of the two donors to cut
    monkeypatch.setattr(handing, "cut", lambda state: bad(state) if next(ranks) else real(state))
    results, _ = go(3, (0, 2), (1,), lent=None)
    same(results[1][0], COMMON)


# --- cuts ------------------------------------------------------------------------------------------------------------


def cut_after(messages):
    """A link whose member stops after so many answers."""

    def change(purpose, sender, count, buffer):
        if count == messages:
            raise KeyboardInterrupt
        return buffer

    return lambda link: Tampered(link, change) if link.rank == 0 else link


def test_after_a_cut_only_the_rest_crosses():
    """A donor of two vanishes in the middle; what had arrived is not asked for again."""
    state = {"a": [torch.full((1 << 20,), float(n)) for n in range(12)]}  # 48 MiB in pieces of 4
    shelves = {rank: Shelf() for rank in range(3)}
    lost = []

    def work(link):
        given = (None, None) if link.rank == 1 else (state, None)
        try:
            hand_over(cut_after(3)(link), (0, 2), (1,), *given, shelves[link.rank])
        except (PeerLost, KeyboardInterrupt) as error:
            lost.append((link.rank, type(error)))

    local.run(3, work, Network(1e8, 1e8))
    assert (0, KeyboardInterrupt) in lost
    assert (1, PeerLost) in lost
    kept = shelves[1].nbytes
    assert 0 < kept < pieces_bytes(state)
    (_, (common, _)), received = go(2, (0,), (1,), state, None, shelves={0: Shelf(), 1: shelves[1]})
    same(common, state)
    rest = pieces_bytes(state) - (kept - len(cut(state).manifest.text))
    assert rest <= received[1].received_bytes < rest + 20_000
