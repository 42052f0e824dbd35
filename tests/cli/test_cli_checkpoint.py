"""`thinwire checkpoint` and `thinwire train --from`, from one group's folder to another's."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from thinwire.cli import cli
from thinwire.errors import ConfigError
from thinwire.report.record import RunRecord
from thinwire.train import checkpoint, launch, universal

#: The least work that is a run, on simulated members.
SMALL = ["--task.size", "0.2M", "--context", 16, "--batch-size", 2, "--validation-windows", 4, "--eval-every", 4]
RUN = ["--link", "simulated", "--steps", 8, "--every", 4, "--checkpoint-every", 4, "--workers", 2]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    place = tmp_path_factory.mktemp("ran")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.delenv("RANK", raising=False)
        cli.main([str(word) for word in ("train", *SMALL, *RUN)], prog_name="thinwire", standalone_mode=False)
    return place / "runs" / "run"


@pytest.fixture
def folder(call, ran):
    """The run's folder, as of a run that was started here."""
    shutil.copytree(ran, "runs/run")
    return Path("runs/run")


def damage(path: Path) -> None:
    """Change a tensor, and leave what the file says of itself."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    tensors["0"] += 1
    save_file(tensors, path, metadata)


def test_from_one_group_to_another(call, folder):
    code, out, err = call("checkpoint", "convert", folder, "two.safetensors")
    assert (code, err) == (0, "")
    assert out.startswith("two.safetensors  step 8, ")
    assert universal.read(Path("two.safetensors")).digest in out
    assert "  random generators of members 0, 1: not taken\n" in out
    code, out, err = call("train", "--from", "two.safetensors", "--workers", 3, "--steps", 12, "--out", "runs/three")
    assert (code, err) == (0, "")
    assert "step 8 of 2 members on 3" in out.replace("\n", " ")
    record = RunRecord.from_json(Path("runs/three/record.json").read_text())
    assert len(record.members) == 3
    assert record.rounds_committed == 3
    assert record.label == "diloco"
    assert call("train", "--resume", "runs/three", "--steps", 16)[0] == 0  # the new group's own, to the bit


def test_a_step_may_be_chosen_and_members(call, folder):
    assert (
        call("checkpoint", "convert", folder, "a.safetensors", "--step", 4, "--members", "1", "--inner", "reset")[0]
        == 0
    )
    found = universal.read(Path("a.safetensors"))
    assert found.step == 4
    assert "members 0: not taken, as asked" in found.told
    assert not any(record.inner for record in found.records.values())


def test_weights_are_what_the_run_left(call, folder):
    """The run ended at a round's end: its anchor is its model."""
    call("checkpoint", "convert", folder, "two.safetensors")
    for place, out in ((folder, "a.safetensors"), ("two.safetensors", "b.safetensors")):
        code, told, _ = call("checkpoint", "convert", place, out, "--to", "weights")
        assert (code, told) == (0, f"{out}  weights of step 8\n")
        found, model = load_file(out), load_file(folder / "model.safetensors")
        assert found.keys() == model.keys()
        assert all(torch.equal(found[name], model[name]) for name in model)
    with pytest.raises(ConfigError, match=r"a\.safetensors is there already"):
        call("checkpoint", "convert", folder, "a.safetensors", "--to", "weights")


def test_a_folder_is_inspected(call, folder):
    code, out, _ = call("checkpoint", "inspect", folder)
    assert code == 0
    assert "step 4  2 of 2 members" in out
    assert "optimizer  AdamW" in out
    assert "schedule Every" in out
    found = json.loads(call("checkpoint", "inspect", folder, "--json")[1])
    assert [step["step"] for step in found["steps"]] == [4, 8]
    for step in found["steps"]:
        assert step["members"] == 2
        assert step["optimizer"] == "AdamW"
        assert "outer" in step["method"]
        for each in step["files"]:
            path = Path(each["path"])
            assert each["bytes"] == path.stat().st_size
            assert each["digest"] == checkpoint.summary(path)[1] in out


def test_a_universal_checkpoint_is_inspected(call, folder):
    call("checkpoint", "convert", folder, "two.safetensors")
    code, out, _ = call("checkpoint", "inspect", "two.safetensors")
    found = json.loads(call("checkpoint", "inspect", "two.safetensors", "--json")[1])
    made = universal.read(Path("two.safetensors"))
    assert code == 0
    assert "step 8" in out
    assert made.digest in out
    assert "random generators of members" in out
    assert found["digest"] == made.digest
    assert found["samples"] == 32
    assert found["format"] == universal.FORMAT
    assert {each["name"] for each in found["records"]} == set(made.records)
    assert found["records"][0]["outer"] == ["momentum_buffer"]
    assert "exp_avg" in found["records"][0]["inner"]


def test_a_sound_folder_is_verified(call, folder):
    assert call("checkpoint", "verify", folder)[:2] == (
        0,
        "step 4  2 of 2 members intact, and agreed\nstep 8  2 of 2 members intact, and agreed\n",
    )
    checkpoint.file_of(folder, 8, 1).unlink()
    assert (
        "step 8  1 of 2 members intact, and agreed; no file of members 1\n" in call("checkpoint", "verify", folder)[1]
    )
    call("checkpoint", "convert", folder, "two.safetensors", "--step", 4)
    assert call("checkpoint", "verify", "two.safetensors")[1].endswith(": intact\n")


def test_a_run_by_seeds_is_inspected_and_verified(call):
    tuned = ["--method", "just_one_byte", "--samples", 2, "--link", "simulated", "--steps", 4, "--out", "runs/tuned"]
    call("train", *SMALL, *tuned)
    assert "by seeds and scalars" in call("checkpoint", "inspect", "runs/tuned")[1]
    assert call("checkpoint", "verify", "runs/tuned")[1] == "step 4  2 of 2 members intact, and agreed\n"
    state = checkpoint.load(Path("runs/tuned"), 4, 1)
    next(iter(state["model"].values())).add_(1)
    checkpoint.save(Path("runs/tuned"), 4, 1, state)
    with pytest.raises(ConfigError, match="members do not agree"):
        call("checkpoint", "verify", "runs/tuned")


def test_a_file_at_fault_is_named(call, folder):
    damage(checkpoint.file_of(folder, 8, 1))
    with pytest.raises(ConfigError, match=r"step-00000008/member-1\.safetensors: its digest does not match"):
        call("checkpoint", "verify", folder)


def test_members_that_do_not_agree_are_named(call, folder):
    state = checkpoint.load(folder, 8, 1)
    state["sync"]["fragments"][0]["anchor"] += 1
    checkpoint.save(folder, 8, 1, state)
    with pytest.raises(ConfigError, match=r"member-0\.safetensors, .*member-1\.safetensors: members do not agree"):
        call("checkpoint", "verify", folder)


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_folder_of_something_else(call, command):
    Path("empty").mkdir()
    with pytest.raises(ConfigError, match="no checkpoint in empty"):
        call("checkpoint", command, "empty")
    with pytest.raises(ConfigError, match=r"none\.safetensors"):
        call("checkpoint", command, "none.safetensors")


def test_requests_that_make_no_sense(call, folder):
    call("checkpoint", "convert", folder, "two.safetensors")
    with pytest.raises(ConfigError, match="a file already holds one step"):
        call("checkpoint", "convert", "two.safetensors", "b.safetensors")
    with pytest.raises(ConfigError, match="--members 0;1"):
        call("checkpoint", "convert", folder, "b.safetensors", "--members", "0;1")
    with pytest.raises(ConfigError, match=r"--resume runs/run and --from two\.safetensors"):
        call("train", "--resume", folder, "--from", "two.safetensors")
    with pytest.raises(ConfigError, match="runs/run holds the checkpoints of an earlier run"):
        call("train", "--from", "two.safetensors", "--steps", 12)
    Path("file").write_text("")
    with pytest.raises(ConfigError, match="could not be written"):
        call("checkpoint", "convert", folder, "file/b.safetensors")


def test_workers_of_their_own_processes_are_told(call, folder, monkeypatch):
    call("checkpoint", "convert", folder, "two.safetensors")
    commands = []

    def start(command, *rest):
        commands.append(command)
        raise ConfigError("enough", expected="", mend="")

    monkeypatch.setattr(launch, "_start", start)
    with pytest.raises(ConfigError, match="enough"):
        call("train", "--from", "two.safetensors", "--link", "torch", "--steps", 12, "--out", "runs/three")
    assert commands[0][-2:] == ["--from", "two.safetensors"]
