"""Checkpoints: the same back, or a sentence that says why not; never half of one."""

import errno
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from thinwire.errors import ConfigError
from thinwire.train import checkpoint

STATE = {
    "model": {"weight": torch.arange(6.0).view(2, 3).t(), "count": torch.tensor(3), "empty": torch.zeros(0)},
    "optimizer": {
        "state": {0: {"step": torch.tensor(2.0)}, 1: {}},
        "param_groups": [{"lr": 0.1, "betas": [0.9, 0.95]}],
    },
    "half": torch.tensor([1.5], dtype=torch.bfloat16),
    "mask": torch.tensor([True, False]),
    "nothing": None,
    "loss": float("inf"),
    "name": "größer",
}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_the_same_back(tmp_path):
    path = checkpoint.save(tmp_path, 7, 2, STATE)
    assert path == tmp_path / "checkpoints" / "step-00000007" / "member-2.safetensors"
    assert same(checkpoint.load(tmp_path, 7, 2), STATE)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@given(
    value=st.recursive(
        plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
    )
)
def test_any_plain_value_comes_back(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("state")
    checkpoint.save(folder, 0, 0, {"value": value})
    assert same(checkpoint.load(folder, 0, 0)["value"], value)


def test_what_it_cannot_hold(tmp_path):
    with pytest.raises(ConfigError, match="a checkpoint cannot hold /'value': set"):
        checkpoint.save(tmp_path, 0, 0, {"value": {1, 2}})


def test_two_are_kept_of_each_member(tmp_path):
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, step, 0, STATE)
    checkpoint.save(tmp_path, 10, 1, STATE)
    assert checkpoint.steps(tmp_path, 0) == {20, 30}
    assert checkpoint.steps(tmp_path, 1) == {10}
    checkpoint.save(tmp_path, 30, 1, STATE)
    checkpoint.save(tmp_path, 40, 1, STATE)
    assert checkpoint.steps(tmp_path, 1) == {30, 40}
    assert not (tmp_path / "checkpoints" / "step-00000010").exists()  # empty now


def test_members_may_tidy_up_at_the_same_moment(tmp_path, monkeypatch):
    """Both find the old step's folder empty, and one of them comes too late to remove it."""

    def too_late(path):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))

    monkeypatch.setattr(Path, "rmdir", too_late)
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, step, 0, STATE)
    assert checkpoint.steps(tmp_path, 0) == {20, 30}


def test_what_else_lies_there_is_no_step(tmp_path):
    checkpoint.save(tmp_path, 10, 0, STATE)
    (tmp_path / "checkpoints" / "notes").mkdir()
    (tmp_path / "checkpoints" / "notes" / "member-0.safetensors").touch()
    assert checkpoint.steps(tmp_path, 0) == {10}
    assert checkpoint.steps(tmp_path / "nowhere", 0) == set()


@pytest.mark.parametrize("kind", ["before", "in the middle"])
def test_a_write_that_fails_leaves_what_was(tmp_path, monkeypatch, kind):
    checkpoint.save(tmp_path, 10, 0, {"value": 1})

    def full(tensors, path, metadata):
        if kind == "in the middle":
            path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    for step in (10, 20):  # over an older one of the same step, too
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save(tmp_path, step, 0, {"value": 2})
    assert checkpoint.load(tmp_path, 10, 0) == {"value": 1}
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["member-0.safetensors"]


def test_a_missing_one(tmp_path):
    with pytest.raises(ConfigError) as caught:
        checkpoint.load(tmp_path, 3, 0)
    assert "step-00000003/member-0.safetensors: No such file" in caught.value.wrong


@pytest.mark.parametrize("at", [0, 1, 8, 20, -200, -20, -1])
def test_a_changed_byte_anywhere_is_seen(tmp_path, at):
    path = checkpoint.save(tmp_path, 0, 0, STATE)
    content = bytearray(path.read_bytes())
    content[at] ^= 0x04
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        checkpoint.load(tmp_path, 0, 0)
    assert caught.value.wrong.startswith(f"{path}: ")
    assert caught.value.expected == "a checkpoint of format thinwire-member-1"
    assert caught.value.mend == "resume from an earlier step: remove this step's folder on all members"


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_cut_one(tmp_path, length):
    path = checkpoint.save(tmp_path, 0, 0, STATE)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ConfigError):
        checkpoint.load(tmp_path, 0, 0)


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"format": "thinwire-member-9"},
        {"format": checkpoint.FORMAT},
        {"format": checkpoint.FORMAT, "state": json.dumps({"items": []}), "digest": "0"},
    ],
)
def test_another_file_of_the_same_kind(tmp_path, metadata):
    path = checkpoint.save(tmp_path, 0, 0, STATE)
    save_file({"a": torch.ones(2)}, path, metadata)
    with pytest.raises(ConfigError):
        checkpoint.load(tmp_path, 0, 0)


def test_nothing_is_pickled(tmp_path):
    assert b"ctorch" not in checkpoint.save(tmp_path, 0, 0, STATE).read_bytes()
