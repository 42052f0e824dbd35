"""Philox: its authors' answers, and the same words however they are asked for."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_directions import philox as plain
from plain_directions import word

from thinwire.errors import ConfigError
from thinwire.seeds import philox

seeds = st.integers(0, 2**64 - 1)
ids = st.integers(0, 2**32 - 1)

#: Random123's known answers for philox4x32-10: counter, key, words.
ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _hex(text: str) -> list[int]:
    return [int(part, 16) for part in text.split()]


def unsigned(words: torch.Tensor) -> list[int]:
    return [value & 0xFFFFFFFF for value in words.tolist()]


@pytest.mark.parametrize(("counter", "key", "answer"), ANSWERS)
def test_the_reference_gives_the_known_answers(counter, key, answer):
    assert plain(_hex(counter), _hex(key)) == _hex(answer)


def test_the_first_known_answer_is_the_first_words_of_all():
    assert unsigned(philox.words(0, 0, 0, 4)) == _hex(ANSWERS[0][2])


@pytest.mark.parametrize(("counter", "key", "answer"), ANSWERS)
def test_the_rounds_give_the_known_answers(counter, key, answer, monkeypatch):
    """Our fourth word of the counter is always zero, so its place is filled in from outside for two of them."""
    (block, tensor, stream, version), (low, high) = _hex(counter), _hex(key)
    monkeypatch.setattr(philox, "VERSION", version)
    drawn = philox.draw([low | high << 32], tensor, torch.tensor([block]), stream)
    assert unsigned(drawn[0]) == _hex(answer)


@given(seed=seeds, tensor=ids, start=st.integers(0, 2**34 - 20), count=st.integers(0, 13), stream=st.integers(0, 3))
def test_words_follow_their_definition(seed, tensor, start, count, stream):
    expected = [word(seed, tensor, index, stream) for index in range(start, start + count)]
    assert unsigned(philox.words(seed, tensor, start, count, stream=stream)) == expected


@settings(max_examples=30)
@given(cuts=st.lists(st.integers(0, 700), max_size=5), order=st.randoms())
def test_pieces_in_any_order_are_the_whole(cuts, order):
    whole, found = philox.words(7, 9, 0, 700), torch.zeros(700, dtype=torch.int32)
    bounds = [0, *sorted(cuts), 700]
    pieces = list(itertools.pairwise(bounds))
    order.shuffle(pieces)
    for begin, end in pieces:
        found[begin:end] = philox.words(7, 9, begin, end - begin)
    assert torch.equal(found, whole)


def test_several_keys_and_tensors_at_once_are_each_by_itself():
    keys, ids, blocks = [3, 2**64 - 1, 5], torch.tensor([1, 1, 2**32 - 1, 8]), torch.tensor([0, 7, 2**32 - 1, 3])
    drawn = philox.draw(keys, ids, blocks, stream=2)
    assert drawn.shape == (3, 16)
    for row, key in zip(drawn, keys, strict=True):
        for place, (tensor, block) in enumerate(zip(ids.tolist(), blocks.tolist(), strict=True)):
            expected = [word(key, tensor, 4 * block + index, 2) for index in range(4)]
            assert unsigned(row[4 * place : 4 * place + 4]) == expected


def test_both_ways_to_compute_give_the_same_words(monkeypatch):
    """The one other devices take, here on the processor."""
    ids, blocks = torch.arange(300) * 77777777 % 2**32, torch.arange(300) * 99999989 % 2**32
    keys = [0, 1, 0xDEADBEEFCAFEBABE, 2**64 - 1]
    by_numpy = philox.draw(keys, ids, blocks, stream=1).clone()
    monkeypatch.setattr(philox, "on_host", lambda device: False)
    assert torch.equal(philox.draw(keys, ids, blocks, stream=1), by_numpy)
    assert torch.equal(philox.draw(keys, 5, blocks), torch.stack([philox.draw([key], 5, blocks)[0] for key in keys]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device to compare with")
def test_another_device_gives_the_same_words():
    assert torch.equal(philox.words(5, 6, 3, 5000, "cuda").cpu(), philox.words(5, 6, 3, 5000))


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_has_64_bits(seed):
    with pytest.raises(ConfigError, match=rf"(?s)a seed of {seed}.*64 bits.*seed % 2\*\*64"):
        philox.words(seed, 0, 0, 4)


#: Computed once and never again: logs of other versions name tensors by these.
IDS = {
    "": 0x25CF7112,
    "weight": 0x2027169E,
    "encoder.layer.0.attention.self.query.weight": 0xAA0388A9,
    "über.0": 0xC82D55C8,
}


@pytest.mark.parametrize("name", IDS)
def test_ids_are_golden(name):
    assert philox.tensor_id(name) == IDS[name]
