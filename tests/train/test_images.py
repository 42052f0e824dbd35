import sys

import numpy as np
import pytest
import torch
from torch import nn

from thinwire.errors import ConfigError
from thinwire.train.images import ImageOptions, small_cnn


def npz(tmp_path, n=40, shape=(8, 8), classes=4):
    """Pictures that tell their number: sample i is i everywhere."""
    x = np.arange(n, dtype=np.float32).reshape(n, *([1] * len(shape))) * np.ones(shape, dtype=np.float32)
    np.savez(tmp_path / "pictures.npz", x=x, y=np.arange(n) % classes)
    return str(tmp_path / "pictures.npz")


def samples(task, batch):
    """Which samples a batch holds."""
    values = task.x[:, 0, 0, 0]
    return [int((values == each).nonzero()) for each in batch.inputs[:, 0, 0, 0]]


def test_members_share_an_epoch(tmp_path):
    """32 training samples, two members, four steps of 4: each sample once, and never a held-out one."""
    task = ImageOptions(data=npz(tmp_path), batch_size=4).build(seed=0)
    seen = [each for step in range(4) for rank in range(2) for each in samples(task, task.batch(step, rank, 2))]
    assert sorted(seen) == sorted(task.train.tolist())
    assert not set(seen) & set(task.valid.tolist())
    again = ImageOptions(data=npz(tmp_path), batch_size=4).build(seed=0)
    assert torch.equal(again.batch(3, 1, 2).inputs, task.batch(3, 1, 2).inputs)
    other = ImageOptions(data=npz(tmp_path), batch_size=4).build(seed=1)
    assert samples(other, other.batch(0, 0, 2)) != samples(task, task.batch(0, 0, 2))
    assert torch.equal(other.valid, task.valid)  # seeds are compared on the same pictures


def test_a_batch_counts_samples_and_no_tokens(tmp_path):
    batch = ImageOptions(data=npz(tmp_path), batch_size=4).build(seed=0).batch(0, 0, 1)
    assert (batch.samples, batch.tokens) == (4, 0)
    moved = batch.to("meta")
    assert moved.inputs.device.type == moved.targets.device.type == "meta"
    assert moved.samples == 4


@pytest.mark.parametrize(("shape", "channels"), [((8, 8), 1), ((8, 6, 3), 3)])
def test_pictures_become_channels_first_and_standard(tmp_path, shape, channels):
    task = ImageOptions(data=npz(tmp_path, shape=shape)).build(seed=0)
    assert task.x.shape == (40, channels, *shape[:2])
    train = task.x[task.train]
    assert train.mean().item() == pytest.approx(0, abs=1e-6)
    assert train.std().item() == pytest.approx(1, rel=1e-2)
    assert task.model()(task.x[:2]).shape == (2, 4)


def test_batch_norm_has_buffers_and_group_norm_has_none():
    assert {name.rpartition(".")[2] for name, _ in small_cnn(1, 10, width=8, norm="batch").named_buffers()} == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }
    assert not list(small_cnn(1, 10, width=8, norm="group").named_buffers())


def test_evaluate_does_not_move_the_buffers(tmp_path):
    task = ImageOptions(data=npz(tmp_path), batch_size=8).build(seed=0)
    torch.manual_seed(0)
    model = task.model()
    task.loss(model, task.batch(0, 0, 1)).backward()
    before = {name: value.clone() for name, value in model.named_buffers()}
    assert task.evaluate(model) == task.evaluate(model)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.named_buffers())


def test_evaluate_counts_right_answers(tmp_path):
    task = ImageOptions(data=npz(tmp_path)).build(seed=0)

    class Always(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.tensor([0.0, 9.0, 0.0, 0.0]))

        def forward(self, x):
            return self.logits.expand(len(x), 4)

    right = (task.y[task.valid] == 1).double().mean().item()
    assert task.evaluate(Always())["accuracy"] == right


def test_options_shape_the_network(tmp_path):
    data = npz(tmp_path)
    assert ImageOptions(data=data, width=8).build(seed=0).model()[0].out_channels == 8
    assert isinstance(ImageOptions(data=data, norm="group").build(seed=0).model()[1], nn.GroupNorm)


def pictures(tmp_path, names=("cat", "dog")):
    image = pytest.importorskip("PIL.Image")
    for number, name in enumerate(names):
        (tmp_path / name).mkdir()
        for i in range(4):
            image.new("RGB", (20, 10), (60 * number, 10 * i, 5)).save(tmp_path / name / f"{i}.png")
    return str(tmp_path)


@pytest.mark.parametrize("pixels", [8, 12])
def test_a_folder_with_a_subfolder_for_each_class(tmp_path, pixels):
    task = ImageOptions(data=pictures(tmp_path), pixels=pixels, batch_size=2).build(seed=0)
    assert task.x.shape == (8, 3, pixels, pixels)
    assert task.y.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert task.batch(0, 0, 1).inputs.shape == (2, 3, pixels, pixels)


def test_a_file_among_the_pictures_that_is_none(tmp_path):
    data = pictures(tmp_path)
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    with pytest.raises(ConfigError, match=r"notes\.txt: no picture"):
        ImageOptions(data=data).build(seed=0)


def test_data_that_will_not_do(tmp_path):
    with pytest.raises(ConfigError, match="there is no picture in its subfolders\n  expected  one subfolder"):
        ImageOptions(data=str(tmp_path)).build(seed=0)
    with pytest.raises(ConfigError, match=r"none.npz: No such file or directory\n.*\n  mend      check the path"):
        ImageOptions(data=str(tmp_path / "none.npz")).build(seed=0)
    np.savez(tmp_path / "one.npz", x=np.zeros((4, 8, 8)))
    with pytest.raises(ConfigError, match=r"one.npz: .*y is not a file"):
        ImageOptions(data=str(tmp_path / "one.npz")).build(seed=0)
    np.savez(tmp_path / "shape.npz", x=np.zeros((4, 8)), y=np.zeros(4, dtype=int))
    with pytest.raises(ConfigError, match=r"shape.npz: x is float64 \[4, 8\] and y is int64 \[4\]"):
        ImageOptions(data=str(tmp_path / "shape.npz")).build(seed=0)
    np.savez(tmp_path / "object.npz", x=np.array([{}, {}], dtype=object), y=np.zeros(2, dtype=int))
    with pytest.raises(ConfigError, match="allow_pickle=False"):
        ImageOptions(data=str(tmp_path / "object.npz")).build(seed=0)


def test_a_width_that_groups_do_not_divide():
    with pytest.raises(ConfigError, match="ImageOptions: width = 10\n  expected  a multiple of 4\n"):
        ImageOptions(width=10)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match=r"needs sklearn\.datasets.*\n.*'images'\n.*'thinwire\[images\]'"):
        ImageOptions().build(seed=0)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_few_steps_on_the_digits_learn(norm):
    """Far above the tenth that guessing gets right."""
    pytest.importorskip("sklearn")
    task = ImageOptions(width=8, norm=norm, batch_size=64).build(seed=0)
    assert (len(task.train), len(task.valid)) == (1438, 359)
    torch.manual_seed(0)
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(60):
        optimizer.zero_grad()
        task.loss(model, task.batch(step, 0, 1)).backward()
        optimizer.step()
    assert task.evaluate(model)["accuracy"] > 0.7
