import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from thinwire.config import TorchLink, load, named_methods
from thinwire.errors import ConfigError
from thinwire.report.record import RunRecord

METHODS = named_methods()

OPTIONS = {
    "ddp": "",
    "post_local_sgd": "--switch 4 --every 4",
    "dgc": "--warmup 5 --codec topk(1/8)",
    "one_bit_adam": "--freeze 4",
    "sign_sgd": "--block 256",
    "gossip": "--every 4 --topology exponential(one_peer=False)",
    "late_merge": "--every 2 --merge 8 --rounds 2",
    "demo": "--codec dct(1/8)",
    "sparta": "--share 0.1",
    "just_one_byte": "--samples 2",
}


def record(folder: str = "runs/run") -> RunRecord:
    return RunRecord.from_json((Path(folder) / "record.json").read_text())


def test_a_run_from_flags_alone(call, small):
    code, out, err = call("train", *small, "--steps", 8, "--every", 4, "--workers", 3, "--rate", "5mbit")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("diloco  0/8  valid ")
    assert "8/8  loss " in out
    assert lines[-2:] == ["report   runs/run/report.html", "weights  runs/run/model.safetensors"]
    assert f"weights          {record().digest}" in out
    assert len(record().members) == 3
    assert record().network.startswith("simulated: 5mbit up and down")
    assert record().rounds_committed == 2


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs(call, small, method):
    options = OPTIONS.get(method, "--every 4").split()
    assert call("train", *small, "--steps", 8, "--method", method, *options)[0] == 0
    assert record().label == method
    assert record().rounds_committed > 0


def test_a_file_and_flags_over_it(call, small):
    Path("mine.toml").write_text('steps = 4\n[method]\nname = "local_sgd"\nevery = 2\n')
    assert call("train", "mine.toml", *small, "--steps", 6)[0] == 0
    assert record("runs/mine").steps == 6
    assert record("runs/mine").rounds_committed == 3


def test_the_run_on_disk_gives_the_same_run_again(call, small):
    call("train", *small, "--steps", 4, "--every", 2)
    again = replace(load("runs/run/run.toml"), out="runs/again")
    assert call("train", "runs/run/run.toml", "--out", "runs/again")[0] == 0
    assert load("runs/again/run.toml") == again
    assert record("runs/again").digest == record().digest


def test_the_weights_load_into_a_fresh_model_and_give_the_recorded_loss(call, small):
    call("train", *small, "--steps", 4, "--every", 2)
    task = load("runs/run/run.toml").task.build(seed=0)
    model = task.model()
    model.load_state_dict(load_file("runs/run/model.safetensors"))
    assert task.evaluate(model) == record().final


def test_json_is_all_there_is_on_standard_output(call, small):
    code, out, err = call("train", *small, "--steps", 6, "--every", 4, "--json")
    assert (code, err) == (0, "")
    lines = [json.loads(line) for line in out.splitlines()]
    assert lines[0] == {
        "event": "started", "method": "diloco", "members": 2, "parameters": 214400, "step": 0, "steps": 6
    } | {"parameters": record().parameters}  # fmt: skip
    assert [line["event"] for line in lines if line["event"] not in ("progress", "evaluated")] == [
        "started", "event", "finished"
    ]  # fmt: skip
    assert lines[1]["kind"] == "steps after the last round"
    assert [line["step"] for line in lines if line["event"] == "evaluated"] == [0, 4, 6]
    assert lines[-1]["digest"] == record().digest
    assert lines[-1]["final"] == dict(record().final)
    assert "NaN" not in out


def test_resume_further(call, small):
    call("train", *small, "--steps", 4, "--every", 4, "--out", "a")
    assert call("train", "--resume", "a", "--steps", 8)[0] == 0
    call("train", *small, "--steps", 8, "--every", 4, "--out", "b")
    assert record("a").digest == record("b").digest
    assert load("a/run.toml").steps == 8


def test_a_batch_norm_model_keeps_its_buffers_together(call):
    pytest.importorskip("sklearn")
    words = "train --task images --batch-size 8 --width 4 --method diloco --every 4 --steps 8 --link simulated"
    assert call(*words.split())[0] == 0
    assert "running_mean" in " ".join(load_file("runs/run/model.safetensors"))
    task = load("runs/run/run.toml").task.build(seed=0)
    model = task.model()
    model.load_state_dict(load_file("runs/run/model.safetensors"))
    assert task.evaluate(model) == record().final
    assert "final accuracy" in call("train", "--resume", "runs/run")[1]


def test_a_task_of_ones_own(call, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("mytask.py").write_text(
        "from thinwire.train.text import TextOptions\n"
        "def make(context: int = 8, *, seed):\n"
        "    return TextOptions(size='0.2M', context=context, batch_size=2, validation_windows=2).build(seed=seed)\n"
    )
    words = "train --task mytask:make --context 4 --steps 4 --every 2 --link simulated"
    assert call(*words.split())[0] == 0
    assert record().members[0].tokens == 4 * 2 * 4
    sys.modules.pop("mytask")


@pytest.mark.slow
def test_lora_adapters_of_a_hugging_face_model(call):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("peft")
    letters = {chr(code): code for code in range(32, 127)} | {"[UNK]": 127}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained("tiny")
    config = transformers.GPT2Config(vocab_size=128, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained("tiny")
    Path("text.txt").write_text("a slow link is a patient teacher. " * 200)
    words = (
        "train --task huggingface --path tiny --data text.txt --context 16 --batch-size 2 --lora-rank 2 --steps 4 "
        "--every 2 --link simulated"
    )
    code, out, _ = call(*words.split())
    assert code == 0
    assert record().rounds_committed == 2
    assert any("lora" in name for name in load_file("runs/run/model.safetensors"))
    assert record().digest in out


# ---- requests that cannot be met


@pytest.mark.parametrize(
    ("words", "wrong", "mend"),
    [
        ("--stps 3", "--stps 3: no such option", "did you mean --steps?"),
        ("--method dilocoo", "--method dilocoo: there is no method 'dilocoo'", "did you mean 'diloco'?"),
        ("--steps x", "--steps x: 'x' is not a whole number", "write it like 100"),
        ("--steps 0", "--steps 0: 0 is out of range", "steps is: local steps of each member; left out, it is 400"),
        ("-x", "-x: not a flag", "put a value with spaces in quotes, and -- before a name"),
        (
            "nofile.toml",
            "nofile.toml: No such file or directory",
            "check the path; docs/configuration.md shows what to write into it",
        ),
        (
            "--resume nothing",
            "--resume nothing: there is no nothing/run.toml",
            "name the folder that the run wrote into, or give its TOML file as well",
        ),
        (
            "--rank 1",
            "--rank and --world without --join",
            "leave them out on a single machine; torchrun gives its own",
        ),
        (
            "--join here --rank 0 --world 2",
            "TorchLink: address = 'here'",
            "name the machine of member 0 as the others see it, and a port that is open there",
        ),
        (
            "--join 127.0.0.1:1 --rank 2 --world 2",
            "TorchLink: rank = 2 of world = 2",
            "count members from 0",
        ),
    ],
)
def test_what_is_wrong_is_named_as_it_was_typed(call, words, wrong, mend):
    with pytest.raises(ConfigError) as caught:
        call("train", *words.split())
    assert (caught.value.wrong, caught.value.mend) == (wrong, mend)
    assert not Path("runs").exists()


def test_a_codec_that_cannot_be(call):
    with pytest.raises(ConfigError, match=r"--codec 'topk\(1.5\) \| int4': topk is to keep a share of 1.5"):
        call("train", "--codec", "topk(1.5) | int4")


def test_a_gpu_that_is_not_there(call):
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(ConfigError, match="device cuda: this machine has no GPU that torch can use"):
        call("train", "--device", "cuda", "--workers", 2)


@pytest.mark.parametrize("words", ["--out b", "--out=b"])
def test_a_resumed_run_stays_in_its_folder(call, small, words):
    call("train", *small, "--steps", 2, "--every", 2, "--out", "a")
    with pytest.raises(ConfigError) as caught:
        call("train", "--resume", "a", *words.split())
    assert caught.value.wrong == f"--resume a and {words.split()[0]}"
    assert caught.value.expected == "one of them: a run goes on in its own folder"


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        ("--workers 3", "the checkpoint in a is of 2 members, this run has 3"),
        ("--method ddp", "the saved state is of another method: its schedule is Every(steps=2, overlap=0)"),
        ("--task.size 0.9M", "the checkpoint in a is of another model: "),
    ],
)
def test_a_resume_of_another_run_is_refused(call, small, words, wrong):
    call("train", *small, "--steps", 2, "--every", 2, "--out", "a")
    with pytest.raises(ConfigError) as caught:
        call("train", "--resume", "a", "--steps", 4, *words.split())
    assert caught.value.wrong.startswith(wrong)


def test_torchrun_and_join_choose_the_torch_link(monkeypatch):
    from thinwire.cli.train import _joined
    from thinwire.config import Run, SimulatedLink

    assert _joined(Run(link=SimulatedLink()), None, None, None).link == SimulatedLink()
    monkeypatch.setenv("RANK", "0")
    assert _joined(Run(link=SimulatedLink()), None, None, None).link == TorchLink()
    joined = _joined(Run(link=SimulatedLink(), workers=4), "10.0.0.1:29500", 1, 3)
    assert joined.link == TorchLink(address="10.0.0.1:29500", rank=1, world=3)
    assert joined.workers == 1
