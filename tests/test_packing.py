"""Nested states as a tree and tensors, and back: the format that checkpoints and snapshots were written in before."""

from __future__ import annotations

import json

import pytest
import torch

from thinwire.errors import ConfigError
from thinwire.packing import pack, raw, unpack

STATE = {"step": 3, 0: [torch.arange(3), None, "a", True], "nested": {"rate": 0.5, "more": (1, 2)}}
TREE = (
    '{"items": [["step", 3], [0, [{"tensor": "/0/0"}, null, "a", true]], '
    '["nested", {"items": [["rate", 0.5], ["more", [1, 2]]]}]]}'
)


def packed(state):
    tensors = {}

    def keep(place, tensor):
        tensors[place] = tensor
        return place

    return json.dumps(pack(state, keep, what="a state")), tensors


def test_a_tree_is_written_as_ever():
    text, tensors = packed(STATE)
    assert text == TREE
    assert tensors == {"/0/0": STATE[0][0]}


def test_a_state_comes_back_with_integer_keys_and_lists_for_tuples():
    text, tensors = packed(STATE)
    back = unpack(json.loads(text), tensors)
    assert back == {**STATE, "nested": {"rate": 0.5, "more": [1, 2]}}
    assert back[0][0] is STATE[0][0]


def test_the_name_is_what_keep_says():
    assert pack([torch.ones(1)], lambda place, tensor: f"named {place}", what="a state") == [{"tensor": "named /0"}]


def test_what_has_no_place_is_refused_by_its_place():
    with pytest.raises(ConfigError, match=r"a checkpoint cannot hold /'a'/1: set"):
        pack({"a": [1, {2}]}, lambda place, tensor: place, what="a checkpoint")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
def test_raw_bytes_are_row_after_row(dtype):
    tensor = torch.tensor([[1, 0, 1], [0, 1, 1]]).to(dtype)
    assert bytes(raw(tensor.t())) == tensor.t().contiguous().view(torch.uint8).numpy().tobytes()
    assert len(raw(torch.tensor(1.0))) == 4
    assert len(raw(torch.empty(0, 3))) == 0
