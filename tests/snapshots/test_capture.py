"""What is captured is the state of one step, bit for bit, whatever training does meanwhile."""

from __future__ import annotations

import logging
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from safetensors.torch import load
from torch import nn

from thinwire.errors import ConfigError, LinkError, PacketError
from thinwire.snapshots import image as images
from thinwire.snapshots.capture import Capture
from thinwire.snapshots.image import image_of, state_of
from thinwire.snapshots.store import Store


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def written(state) -> np.ndarray:
    image = image_of(state)
    memory = np.zeros(image.size, np.uint8)
    assert sum(image.write(memory)) == sum(tensor.nbytes for tensor in image.tensors.values())
    return memory


STATE = {
    "model": {"weight": torch.arange(12.0).reshape(3, 4).T, "half": torch.ones(3, dtype=torch.bfloat16)},
    "optimizer": {"state": {0: {"step": torch.tensor(3.0), "lr": 1e-3}}, "param_groups": [{"params": [0], "x": None}]},
    "odd": [torch.tensor([True, False, True]), torch.zeros(0), torch.arange(5, dtype=torch.int8), "text", True, 7],
}


@pytest.mark.parametrize("piece_bytes", [1, 16, 1 << 20])
def test_an_image_is_the_state_and_a_safetensors_file(piece_bytes, monkeypatch):
    monkeypatch.setattr(images, "PIECE_BYTES", piece_bytes)
    memory = written(STATE)
    assert same(state_of(memory), STATE)
    assert torch.equal(load(memory.tobytes())["/'model'/'weight'"], STATE["model"]["weight"])


def test_an_image_keeps_its_size_when_a_counter_gets_longer():
    assert image_of({**STATE, "step": 9}).size == image_of({**STATE, "step": 10**12}).size


def test_what_a_file_cannot_hold_is_named():
    with pytest.raises(ConfigError, match=r"a snapshot cannot hold /'a'/1: complex64|a snapshot .*torch.complex64"):
        image_of({"a": [1, torch.zeros(1, dtype=torch.complex64)]})
    with pytest.raises(ConfigError, match="a snapshot cannot hold /'a': set"):
        image_of({"a": {1}})


@given(junk=some.binary(max_size=64))
def test_bytes_that_are_no_image_are_refused(junk):
    with pytest.raises(PacketError, match="are not the image of a state"):
        state_of(np.frombuffer(junk, np.uint8))


def test_a_captured_state_is_that_of_its_step_while_training_goes_on(desk):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters())
    store = Store(desk)
    capture = Capture(store, "me")
    optimizer.register_step_pre_hook(lambda *_: capture.settle())
    for step in range(4):
        state = {"moving": dict(model.named_buffers()), "model": dict(model.named_parameters())}
        state["optimizer"] = optimizer.state_dict()["state"]
        expected = state_of(written(state))
        assert capture.begin({**state, "step": step}, version=step)
        optimizer.zero_grad()
        model(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()
        capture.finish()
        (snapshot,) = store.read("me")
        assert (snapshot.version, snapshot.in_force) == (step, True)
        assert same(state_of(snapshot.parts[0]), {**expected, "step": step})
    assert capture.stall_s > 0
    capture.close()


def test_one_at_a_time_and_settle_waits_for_the_copy(desk):
    store, x = Store(desk), torch.zeros(10)
    capture = Capture(store, "me")
    capture.settle()
    assert capture.stall_s == 0, "nothing to wait for"
    desk.gate.clear()
    assert capture.begin({"x": x}, version=1)
    desk.entered.wait()
    assert not capture.begin({"x": x}, version=2), "the one before is under way"
    settled = threading.Thread(target=capture.settle)
    settled.start()
    assert settled.is_alive()
    desk.gate.set()
    settled.join()
    capture.finish()
    assert store.latest("me") == 1
    capture.close()


def test_tensors_that_change_meanwhile_drop_the_snapshot_and_the_older_one_stands(desk, caplog):
    store, x = Store(desk), torch.zeros(10)
    capture = Capture(store, "me")
    assert capture.begin({"x": x}, version=1)
    capture.finish()
    desk.gate.clear()
    desk.entered.clear()
    assert capture.begin({"x": x}, version=2)
    desk.entered.wait()
    x += 1
    desk.gate.set()
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(ConfigError, match=r"/'x' and 0 others changed while snapshot 2"),
    ):
        capture.finish()
    (snapshot,) = store.read("me")
    assert (snapshot.version, state_of(snapshot.parts[0])["x"].sum()) == (1, 0)
    assert "was copied; it is dropped" in caplog.text
    capture.finish()
    capture.close()


def test_what_moves_is_copied_before_begin_returns(desk):
    store, x = Store(desk), torch.zeros(10)
    capture = Capture(store, "me")
    desk.gate.clear()
    assert capture.begin({"moving": {"x": [x]}}, version=1)
    x += 1
    desk.gate.set()
    capture.finish()
    assert state_of(store.read("me")[0].parts[0])["moving"]["x"][0].sum() == 0
    capture.close()


def test_without_its_store_training_goes_on(desk, monkeypatch):
    def gone(*_):
        raise EOFError

    capture = Capture(Store(desk), "me")
    monkeypatch.setattr(desk, "begin", gone)
    assert capture.begin({"x": torch.zeros(1)}, version=1)
    capture.settle()
    with pytest.raises(LinkError, match="the snapshot store ended"):
        capture.finish()
    capture.close()
