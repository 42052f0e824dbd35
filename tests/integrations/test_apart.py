"""What frameworks may see of a group, and what members are asked before they train."""

from __future__ import annotations

import importlib
import os
import sys

import pytest
import torch
import torch.distributed as dist

import thinwire
from small import adamw, batch, loss_of, make_model, same
from thinwire.integrations import join
from thinwire.integrations.apart import (
    _own_device,
    check_apart,
    check_folders,
    check_length,
    samples_in,
    sends_gradients,
)


def test_within_the_block_there_is_one_process_and_after_it_the_group_again(monkeypatch):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    told = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "x", "MASTER_PORT": "1"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    try:
        with join() as link:
            assert not dist.is_initialized()
            assert not set(told) & set(os.environ)
            assert link.members == (0,)
        assert dist.is_initialized()
        assert told.items() <= os.environ.items()
    finally:
        dist.destroy_process_group()


def test_a_framework_that_sees_a_group_is_refused():
    check_apart(1, "Accelerate")
    with pytest.raises(thinwire.ConfigError, match=r"Accelerate sees 3 processes.*\n.*\n.*integrations\.join\(\)"):
        check_apart(3, "Accelerate")


def test_a_member_sees_its_own_gpu_of_several():
    local = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert _own_device(local, 4) == {"CUDA_VISIBLE_DEVICES": "1"}
    assert _own_device(local | {"CUDA_VISIBLE_DEVICES": "5,7"}, 2) == {"CUDA_VISIBLE_DEVICES": "7"}
    assert _own_device(local, 1) == {}, "members share the one there is"
    assert _own_device({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, 4) == {}
    assert _own_device({}, 4) == {}


def test_members_of_unlike_length_or_with_one_folder_are_refused(tmp_path):
    thinwire.run(2, lambda link: check_length(link, 10))
    with pytest.raises(thinwire.ConfigError, match=r"members disagree on training\.steps"):
        thinwire.run(2, lambda link: check_length(link, 10 + link.rank))
    thinwire.run(2, lambda link: check_folders(link, tmp_path / str(link.rank)))
    with pytest.raises(thinwire.ConfigError, match="members 0 and 2 write their checkpoints into one folder"):
        thinwire.run(3, lambda link: check_folders(link, tmp_path / str(link.rank % 2)))


def test_samples_are_the_length_of_the_first_tensor():
    x = torch.zeros(3, 7)
    assert samples_in(x) == samples_in({"id": "a", "x": x, "y": torch.zeros(9)}) == samples_in([None, (x,)]) == 3
    assert samples_in(torch.tensor(1.0)) == 1
    assert samples_in("text") == 0


def test_which_methods_send_gradients():
    assert sends_gradients(thinwire.every_step())
    assert sends_gradients(thinwire.post_local_sgd(switch=3))
    assert not sends_gradients(thinwire.diloco())


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [("huggingface", "transformers", "hf"), ("lightning", "lightning.pytorch", "lightning")],
)
def test_a_framework_that_is_not_installed_is_named_with_its_extra(monkeypatch, module, package, extra):
    monkeypatch.delitem(sys.modules, f"thinwire.integrations.{module}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        thinwire.ConfigError, match=rf"integrations\.{module} needs.*\n.*extra '{extra}'.*\n.*\[{extra}\]"
    ):
        importlib.import_module(f"thinwire.integrations.{module}")


def test_a_state_is_loaded_before_the_block_where_the_model_is_the_members_own():
    """In mid-round live weights differ: compared are the anchors, and the run goes on to the bit."""

    def steps(model, optimizer, rank, numbers):
        for number in numbers:
            loss_of(model, *batch(number, rank)).backward()
            optimizer.step()
            optimizer.zero_grad()

    def member(link):
        model = make_model()
        optimizer = adamw(model)
        with thinwire.synchronize(model, optimizer, thinwire.diloco(every=4), link) as sync:
            steps(model, optimizer, link.rank, range(6))
            saved = sync.state_dict(), {k: v.clone() for k, v in model.state_dict().items()}
            inner = {
                "state": {k: {n: t.clone() for n, t in v.items()} for k, v in optimizer.state_dict()["state"].items()}
            }
            inner["param_groups"] = optimizer.state_dict()["param_groups"]
            steps(model, optimizer, link.rank, range(6, 10))
        again = make_model(seed=9)
        again.load_state_dict(saved[1])
        other = adamw(again)
        other.load_state_dict(inner)
        resumed = thinwire.synchronize(again, other, thinwire.diloco(every=4), link)
        resumed.load_state_dict(saved[0])
        with resumed:
            steps(again, other, link.rank, range(6, 10))
        assert same(list(again.parameters()), list(model.parameters()))
        resumed.take_consensus()
        return [p.detach().clone() for p in again.parameters()], [p.detach().clone() for p in model.parameters()]

    (first, live), (second, other) = thinwire.run(2, member)
    assert same(first, second), "all take the same model"
    assert not same(live, other), "after ten steps of rounds of four each had its own"
