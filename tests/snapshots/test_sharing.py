"""Snapshots dealt over a link come back from those that are left, bit for bit, and only whole ones count."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from thinwire.errors import ConfigError, PacketError, PeerLost
from thinwire.links.faulty import Tampered, flip
from thinwire.links.local import alone, run
from thinwire.snapshots import sharing
from thinwire.snapshots.erasure import Code, Manifest
from thinwire.snapshots.sharing import Pace, owner_name, regain, share
from thinwire.snapshots.store import Store


def state(rank: int, version: int, size: int = 1000) -> np.ndarray:
    return np.random.default_rng([rank, version]).integers(0, 256, size + rank, dtype=np.uint8)


def deal(stores: list[Store], version: int, code: Code, **others) -> list[bool]:
    """All members share their snapshots."""

    def member(link):
        return share(
            link, link.open("snapshots"), stores[link.rank], state(link.rank, version), version, code, **others
        )

    return run(len(stores), member)


def back(stores: list[Store], wants: dict[int, int]) -> list:
    """Members at places of `stores`, of which some want a snapshot."""
    return run(len(stores), lambda link: regain(link, link.open("snapshots"), stores[link.rank], wants.get(link.rank)))


@pytest.mark.parametrize("piece_bytes", [7, 64, 1 << 20])
def test_every_pair_of_members_may_be_lost(desks, piece_bytes, monkeypatch):
    monkeypatch.setattr(sharing, "PIECE_BYTES", piece_bytes)
    stores = [Store(desks()) for _ in range(6)]
    assert deal(stores, 1, Code(6, 4)) == [True] * 6
    for lost in [(0, 1), (2, 5)] if piece_bytes < 100 else itertools.combinations(range(6), 2):
        left = [store for rank, store in enumerate(stores) if rank not in lost]
        # Two newcomers in the places of the lost ones, with stores that are empty.
        found = back([*left, Store(desks()), Store(desks())], {4: lost[0], 5: lost[1]})
        assert found[:4] == [None] * 4
        for rank, (version, bits) in zip(lost, found[4:], strict=True):
            assert version == 1
            assert np.array_equal(bits, state(rank, 1))


def test_three_losses_are_more_than_the_code_bears(desks):
    stores = [Store(desks()) for _ in range(6)]
    deal(stores, 1, Code(6, 4))
    with pytest.raises(ConfigError, match=r"no snapshot of member 0 can be put together from members \(0, 1, 2\)"):
        back(stores[:3], {2: 0})


def test_a_newer_snapshot_takes_the_older_ones_place(desks):
    stores = [Store(desks()) for _ in range(3)]
    for version in (1, 2):
        assert deal(stores, version, Code(3, 2)) == [True] * 3
    for store in stores:
        assert [(s.version, s.in_force) for s in store.read(owner_name(1))] == [(2, True)]
    (_, (version, bits)) = back([stores[0], stores[2]], {1: 1})
    assert version == 2
    assert np.array_equal(bits, state(1, 2))


def test_where_one_member_lacks_room_the_older_snapshot_stands_with_all(desks, monkeypatch):
    stores = [Store(desks()) for _ in range(3)]
    deal(stores, 1, Code(3, 2))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stores[2]._desk, "begin", full, raising=False)
    assert deal(stores, 2, Code(3, 2)) == [False] * 3
    for store in stores:
        assert [s.version for s in store.read(owner_name(0)) if s.in_force] == [1]
    version, bits = back(stores, {0: 0})[0]
    assert version == 2, "two of three were there, whole, and that is enough"
    assert np.array_equal(bits, state(0, 2))


def test_damage_on_the_way_is_noticed_and_nothing_is_in_force(desks):
    stores = [Store(desks()) for _ in range(3)]

    def change(purpose, sender, count, buffer):
        return flip(buffer) if sender == 1 and buffer.numel() > 400 else buffer  # a shard, not a manifest

    def member(link):
        link = Tampered(link, change)
        return share(link, link.open("snapshots"), stores[link.rank], state(link.rank, 1), 1, Code(3, 2))

    assert run(3, member) == [False] * 3
    assert all(not s.in_force for store in stores for rank in range(3) for s in store.read(owner_name(rank)))


def test_members_with_other_versions_or_codes_share_nothing(desks):
    stores = [Store(desks()) for _ in range(3)]

    def member(link):
        version = 2 if link.rank == 2 else 1
        return share(link, link.open("snapshots"), stores[link.rank], state(link.rank, 1), version, Code(3, 2))

    assert run(3, member) == [False] * 3
    assert not any(store.owners() for store in stores)


def test_a_shard_that_was_damaged_in_memory_is_not_offered(desks):
    stores = [Store(desks()) for _ in range(4)]
    deal(stores, 1, Code(4, 2))
    for store in stores[:2]:  # the holders of data shards, which would be asked first
        for segment in store._desk.shelf._owners[owner_name(0)].in_force.segments.values():
            segment._memory.buf[3] ^= 1
    _, bits = back(stores, {3: 0})[3]
    assert np.array_equal(bits, state(0, 1)), "of the two others"


def test_a_member_that_is_lost_in_the_middle_leaves_the_older_snapshot_in_force(desks):
    stores = [Store(desks()) for _ in range(3)]
    deal(stores, 1, Code(3, 2))
    lost = []

    def member(link):
        if link.rank == 2:
            raise KeyError("killed")
        try:
            share(link, link.open("snapshots"), stores[link.rank], state(link.rank, 2), 2, Code(3, 2))
        except PeerLost as error:
            lost.append(error.ranks)

    with pytest.raises(KeyError, match="killed"):
        run(3, member)
    assert lost == [(2,), (2,)]
    assert [(s.version, s.in_force) for s in stores[0].read(owner_name(1))] == [(1, True)]


def test_it_runs_beside_training_and_its_bytes_are_counted(desks):
    stores = [Store(desks()) for _ in range(3)]

    def member(link):
        channel, x = link.open("snapshots"), state(link.rank, 1)
        job = link.spawn(lambda: share(link, channel, stores[link.rank], x, 1, Code(3, 2)), "snapshot")
        to_all = dict.fromkeys((r for r in link.members if r != link.rank), torch.zeros(1, dtype=torch.uint8))
        link.open("training").exchange(to_all, dict.fromkeys(to_all, 1), "a step")
        return job.wait(), link.meter.by_purpose()["snapshots"].sent_bytes

    for kept, sent in run(3, member):
        assert kept
        assert 1000 <= sent < 2000, "a state of 1000 bytes in halves, to two others, and manifests"


def test_a_member_alone_regains_what_its_own_store_has(desks):
    link = alone()
    with pytest.raises(ConfigError, match="no snapshot of member 0"):
        regain(link, link.open("snapshots"), Store(desks()), wanted=0)


def test_a_pace_waits_for_what_was_sent_and_saves_up_nothing():
    clock, slept = [100.0], []

    def sleep(seconds):
        slept.append(seconds)
        clock[0] += seconds

    pace = Pace(8000, now=lambda: clock[0], sleep=sleep)
    pace.sent(1000)
    clock[0] += 0.25
    pace.sent(1000)
    assert slept == [1.0, 0.75]
    clock[0] += 50
    pace.sent(1000)
    pace.sent(500)
    assert slept == [1.0, 0.75, 0.5]
    with pytest.raises(ConfigError, match="snapshots at 0 bits a second"):
        Pace(0)


def test_a_pace_is_told_every_byte(desks, monkeypatch):
    monkeypatch.setattr(sharing, "PIECE_BYTES", 64)
    pace = Pace(1e6, sleep=lambda _: None)
    told = []
    pace.sent = told.append
    deal([Store(desks()) for _ in range(3)], 1, Code(3, 2), pace=pace)
    assert sum(told) == sum(2 * -(-(1000 + rank) // 2) for rank in range(3))
    assert max(told) <= 2 * 64


@pytest.mark.parametrize("text", ["", "[1]", "[null,[[0,1]]]", '["x",[]]', '[null,[[0,"{}",[1]]]]'])
def test_what_others_tell_is_not_believed(text):
    with pytest.raises(PacketError, match=r"in no words of ours|not the manifest"):
        sharing._understand({0: text})


def test_members_choose_alike_the_newest_of_which_enough_is_there():
    older, newer = (Manifest(version, 10, Code(3, 2), ("0" * 64,) * 3) for version in (1, 2))
    offers = [(0, 7, newer, [2]), (0, 7, older, [0]), (1, 7, older, [1]), (2, 7, older, [0, 2]), (1, 8, newer, [0])]
    assert sharing._choose(7, offers) == (older, {0: 0, 1: 1})
    assert sharing._choose(7, [*offers, (4, 7, newer, [0])]) == (newer, {0: 4, 2: 0})
    assert sharing._choose(8, offers) == (None, {})
