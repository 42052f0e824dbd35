"""Shared randomness: the same numbers for ever, and uniform ones."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinwire.randomness import mix, random_bytes

keys = st.integers(min_value=0, max_value=(1 << 64) - 1)

#: Computed once and never again: a member of another version must draw the same.
MIXED = {
    (): 0x9E3779B97F4A7C15,
    (0,): 0xD85D1D823D12CDE7,
    (1, 2, 3): 0xA8F3134A766937DC,
    (3, 2, 1): 0xB1D727285CF5A100,
    (-1,): 0x782AE3BD0A73ACE7,
    (123456789, 0xDEADBEEF): 0x2973D19BF705F1F0,
}
DRAWN = {
    0: "0000000043d673bb0869d66977fac02c338a27",
    1: "8f5cef2f41045a8e1ffad8ad2e657164a81a54",
    0x0123456789ABCDEF: "ad53c1bef38f844da1fbb7b18e7b65fa231975",
    (1 << 64) - 1: "99462dcea93b802f494f9ddb6336eaad5d0548",
}


@pytest.mark.parametrize("parts", MIXED)
def test_keys_are_golden(parts):
    assert mix(*parts) == MIXED[parts]


@pytest.mark.parametrize("key", DRAWN)
def test_bytes_are_golden(key):
    assert bytes(random_bytes(key, 19).tolist()).hex() == DRAWN[key]


def _plain_bytes(key: int, count: int) -> bytes:
    """The definition in Python integers, without tensors: two rounds of murmur3's finaliser on a counter."""

    def scrambled(word: int) -> int:
        word = (word ^ word >> 16) * 0x85EBCA6B % 2**32
        word = (word ^ word >> 13) * 0xC2B2AE35 % 2**32
        return word ^ word >> 16

    words = (scrambled(scrambled((i * 0x9E3779B1 + key) % 2**32) ^ key >> 32) for i in range(-(-count // 4)))
    return b"".join(word.to_bytes(4, "little") for word in words)[:count]


@given(key=keys, count=st.integers(0, 70))
def test_bytes_follow_their_definition(key, count):
    assert bytes(random_bytes(key, count).tolist()) == _plain_bytes(key, count)


@given(key=keys, short=st.integers(0, 40), long=st.integers(40, 80))
def test_a_longer_draw_begins_with_the_shorter_one(key, short, long):
    assert torch.equal(random_bytes(key, long)[:short], random_bytes(key, short))


@given(parts=st.lists(keys, min_size=1, max_size=4))
def test_a_key_fits_64_bits_and_does_not_depend_on_what_was_drawn_before(parts):
    first = mix(*parts)
    random_bytes(first, 8)
    assert mix(*parts) == first
    assert 0 <= first < 1 << 64


def test_order_length_and_value_of_the_parts_matter():
    drawn = [mix(), mix(0), mix(0, 0), mix(0, 1), mix(1, 0), mix(1), mix(1 << 32), mix(1 << 63)]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("key", [1, mix(3, 1, 4)])
def test_bytes_are_uniform(key):
    """Chi-squared over 256 values with 2^18 draws: mean 255, standard deviation 22.6; five of them are allowed."""
    draws = 1 << 18
    counts = torch.bincount(random_bytes(key, draws).int(), minlength=256).double()
    chi_squared = ((counts - draws / 256) ** 2 / (draws / 256)).sum().item()
    assert abs(chi_squared - 255) < 5 * 22.6


def test_neighbouring_keys_share_nothing():
    """Equal bytes of two streams are a coin of 1/256: 2^16 of them give 256 with a standard deviation of 16."""
    for other in (2, 1 + (1 << 32), 1 + (1 << 63)):
        equal = int((random_bytes(1, 1 << 16) == random_bytes(other, 1 << 16)).sum())
        assert abs(equal - 256) < 5 * 16


def test_no_global_generator_is_touched():
    before = torch.get_rng_state()
    random_bytes(5, 1000)
    assert torch.equal(torch.get_rng_state(), before)
    assert hashlib.sha256(bytes(random_bytes(5, 1000).tolist())).hexdigest()[:16] == "a84048e256f09a61"
