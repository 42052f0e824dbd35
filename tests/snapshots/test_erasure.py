"""What is coded comes back bit for bit after every loss that the code is to bear, and never otherwise."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from thinwire.errors import ConfigError, PacketError
from thinwire.snapshots import erasure
from thinwire.snapshots.erasure import Code, Manifest, encode, recover


def state(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def test_every_pair_of_losses_of_six_and_four_recovers():
    x = state(100_003)
    manifest, shards = encode(x, Code(6, 4), version=3)
    for lost in itertools.combinations(range(6), 2):
        kept = {index: shard for index, shard in enumerate(shards) if index not in lost}
        assert np.array_equal(recover(manifest, kept), x), lost


@pytest.mark.parametrize("code", [Code(2, 1), Code(3, 2), Code(6, 4), Code(8, 6), Code(9, 6)], ids=str)
@pytest.mark.parametrize("size", [0, 1, 7, 47, 49, 1000])
def test_every_subset_of_as_many_as_are_needed_recovers(code, size):
    x = state(size)
    manifest, shards = encode(x, code, version=0)
    for kept in itertools.combinations(range(code.shards), code.needed):
        assert np.array_equal(recover(manifest, {index: shards[index] for index in kept}), x), kept


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_states_longer_than_a_block_recover(extra, monkeypatch):
    monkeypatch.setattr(erasure, "BLOCK_BYTES", 64)
    x = state(4 * 64 * 3 + extra)
    manifest, shards = encode(x, Code(6, 4), version=0)
    monkeypatch.setattr(erasure, "BLOCK_BYTES", 1 << 20)
    whole, same = encode(x, Code(6, 4), version=0)
    assert whole == manifest, "blocks change nothing of what is written"
    assert all(map(np.array_equal, shards, same))
    monkeypatch.setattr(erasure, "BLOCK_BYTES", 64)
    assert np.array_equal(recover(manifest, {i: shards[i] for i in (1, 3, 4, 5)}), x)


def test_data_shards_are_the_state_itself():
    x = state(4096)
    _, shards = encode(x, Code(6, 4), version=0)
    assert all(np.shares_memory(shard, x) for shard in shards[:4])
    assert np.array_equal(np.concatenate(shards[:4]), x)


@given(bit=some.integers(0, 8 * 25 - 1), which=some.integers(0, 5))
def test_a_damaged_shard_counts_as_lost(bit, which):
    x = state(100)
    manifest, shards = encode(x, Code(6, 4), version=0)
    damaged = shards[which].copy()
    damaged[bit // 8] ^= 1 << (bit % 8)
    assert np.array_equal(recover(manifest, {**dict(enumerate(shards)), which: damaged}), x)
    others = [index for index in range(6) if index != which][:3]
    with pytest.raises(ConfigError, match=rf"3 intact shards; .*of another snapshot \[{which}\]"):
        recover(manifest, {**{index: shards[index] for index in others}, which: damaged})


def test_shards_of_another_snapshot_or_place_are_not_mixed_in():
    x = state(100)
    manifest, shards = encode(x, Code(6, 4), version=1)
    _, older = encode(state(100, seed=1), Code(6, 4), version=0)
    mixed = {0: shards[0], 1: shards[1], 2: older[2], 3: older[3], 4: shards[4], 5: shards[5], 17: shards[2]}
    assert np.array_equal(recover(manifest, mixed), x)
    with pytest.raises(ConfigError, match=r"missing none, damaged or of another snapshot \[2, 3, 4, 17\]"):
        recover(manifest, {**mixed, 4: shards[5]})


def test_too_few_shards_say_what_is_missing():
    manifest, shards = encode(state(100), Code(6, 4), version=9)
    with pytest.raises(ConfigError, match=r"snapshot 9 has 2 intact shards; missing \[0, 2, 3, 5\].*none") as caught:
        recover(manifest, {1: shards[1], 4: shards[4]})
    assert caught.value.expected == "4 of its 6"


@pytest.mark.parametrize(("shards", "needed"), [(4, 4), (3, 4), (2, 0), (257, 6)])
def test_codes_that_are_none_are_refused(shards, needed):
    with pytest.raises(ConfigError, match=f"a code of {shards} shards of which {needed} are needed"):
        Code(shards, needed)


def test_a_manifest_is_its_text():
    manifest, _ = encode(state(100), Code(3, 2), version=7)
    assert Manifest.from_json(manifest.to_json()) == manifest


@given(text=some.text() | some.sampled_from(["[1,2,3,2,[]]", "[-1,2,2,1,[]]", "[1,2,2,2,[]]", "{}", "[" * 20_000]))
def test_any_other_text_is_refused(text):
    with pytest.raises(PacketError, match="not the manifest of a snapshot"):
        Manifest.from_json(text)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "zfec", None)
    with pytest.raises(ConfigError, match="needs the package zfec") as caught:
        encode(state(10), Code(), version=0)
    assert "thinwire[snapshots]" in caught.value.mend
