"""`thinwire checkpoint convert --to hf`: what Hugging Face libraries load gives the model's own logits."""

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from thinwire.cli import cli
from thinwire.config import loads
from thinwire.errors import ConfigError
from thinwire.train import pretrained, universal
from thinwire.train.gathering import gather

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEXT = "a fine day and a poor day, very fine and warm, very poor and cold. " * 40
WINDOWS = ["--context", 8, "--batch-size", 2, "--validation-windows", 4]
RUN = ["--link", "simulated", "--steps", 4, "--every", 2, "--checkpoint-every", 4, "--eval-every", 4, "--workers", 2]
TOKENS = torch.tensor([[5, 9, 2, 77, 31, 8, 8, 1], [4, 4, 60, 2, 9, 10, 11, 12]])


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """call("train", ...) -> standard output; errors are raised."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)

    def run(*words):
        assert cli.main([str(word) for word in words], prog_name="thinwire", standalone_mode=False) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def tokenizer(tmp_path):
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<end>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT], trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    return made


@pytest.fixture
def base(tmp_path, tokenizer):
    """A pretrained GPT-2, with a generation configuration of its own."""
    (tmp_path / "text.txt").write_text(TEXT)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=tokenizer.get_vocab_size(), n_positions=16, n_embd=16, n_layer=2, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "base")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(
        tmp_path / "base"
    )
    return tmp_path / "base"


def train(call, *words):
    call("train", *words, *WINDOWS, *RUN)


def tuned(call, *words):
    train(call, "--task", "huggingface", "--task.path", "base", "--task.data", "text.txt", *words)


def as_trained(run="runs/run"):
    """The run's own model with the checkpoint's weights, as the training loop would have it."""
    made = gather(Path(run))
    task = loads(made.config).task
    model = task.build(seed=0).model()
    model.load_state_dict(pretrained.weights(made))
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def test_a_whole_model_has_its_own_logits_to_the_bit(call, base):
    tuned(call)
    told = call("checkpoint", "convert", "runs/run", "out", "--to", "hf")
    assert told == "out  step 4: GPT2LMHeadModel, for AutoModelForCausalLM.from_pretrained\n"
    model = transformers.AutoModelForCausalLM.from_pretrained("out")
    assert torch.equal(logits(model), logits(as_trained()))
    assert not torch.equal(logits(model), logits(transformers.AutoModelForCausalLM.from_pretrained("base")))
    assert model.generation_config.max_new_tokens == 7
    ours, theirs = (transformers.AutoTokenizer.from_pretrained(place) for place in ("out", "base"))
    assert ours("a fine day")["input_ids"] == theirs("a fine day")["input_ids"]
    assert (ours.eos_token, ours.get_vocab()) == (theirs.eos_token, theirs.get_vocab())
    assert [path.name for path in Path().iterdir() if path.name.startswith(".out")] == []


def test_a_universal_checkpoint_gives_the_same_files_in_shards_of_a_size(call, base):
    tuned(call)
    call("checkpoint", "convert", "runs/run", "out", "--to", "hf")
    call("checkpoint", "convert", "runs/run", "two.safetensors")
    call("checkpoint", "convert", "two.safetensors", "parts", "--to", "hf", "--shard-size", "20kB")
    index = json.loads(Path("parts/model.safetensors.index.json").read_text())
    parts = sorted(Path("parts").glob("*.safetensors"))
    assert {path.name for path in parts} == set(index["weight_map"].values())
    assert len(parts) > 1
    whole, joined = load_file("out/model.safetensors"), {}
    for part in parts:
        joined |= load_file(part)
    assert joined.keys() == whole.keys()
    assert all(torch.equal(joined[name], whole[name]) for name in whole)
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained("parts")), logits(as_trained()))


def test_adapters_are_peft_s(call, base):
    peft = pytest.importorskip("peft")
    tuned(call, "--task.lora-rank", 2, "--task.lora-targets", "c_attn", "--lr", 0.05)
    told = call("checkpoint", "convert", "runs/run", "out", "--to", "hf")
    assert told == "out  step 4: LoRA adapters of base, for peft.PeftModel.from_pretrained\n"
    assert json.loads(Path("out/adapter_config.json").read_text())["r"] == 2
    assert all("lora_" in name for name in load_file("out/adapter_model.safetensors"))
    plain = transformers.AutoModelForCausalLM.from_pretrained("base")
    before = logits(plain)
    found = logits(peft.PeftModel.from_pretrained(plain, "out"))
    assert torch.equal(found, logits(as_trained()))
    assert not torch.equal(found, before)


def test_adapters_of_another_base_are_refused(call, base):
    pytest.importorskip("peft")
    tuned(call, "--task.lora-rank", 2)
    model = transformers.GPT2LMHeadModel.from_pretrained("base")
    with torch.no_grad():
        model.transformer.ln_f.weight[0] += 1
    model.save_pretrained("base")
    with pytest.raises(
        ConfigError, match=r"base is another model than the one that this run began with: .*ln_f\.weight"
    ):
        call("checkpoint", "convert", "runs/run", "out", "--to", "hf")
    assert not Path("out").exists()


@pytest.mark.parametrize("lora", [0, 2])
def test_a_classifier(call, base, lora):
    with Path("rows.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "label"])
        table.writerows([[f"{word} day {i}", word] for i in range(10) for word in ("fine", "poor", "warm")])
    words = ["--task.lora-rank", lora, "--task.lora-targets", "c_attn"] if lora else []
    train(call, "--task", "huggingface", "--task.path", "base", "--task.head", "classifier",
          "--task.data", "rows.csv", *words)  # fmt: skip
    told = call("checkpoint", "convert", "runs/run", "out", "--to", "hf")
    if lora:
        plain = transformers.AutoModelForSequenceClassification.from_pretrained("base", num_labels=3, pad_token_id=0)
        model = pytest.importorskip("peft").PeftModel.from_pretrained(plain, "out")
    else:
        assert "AutoModelForSequenceClassification" in told
        model = transformers.AutoModelForSequenceClassification.from_pretrained("out")
    assert logits(model).shape == (2, 3)
    assert torch.equal(logits(model), logits(as_trained()))


@pytest.mark.parametrize("tied", ["true", "false"])
def test_our_gpt_is_a_gpt2(call, tied):
    train(call, "--task.size", "0.2M", "--task.tied", tied, "--lr", 0.01)
    told = call("checkpoint", "convert", "runs/run", "out", "--to", "hf")
    assert "GPT2LMHeadModel, for AutoModelForCausalLM.from_pretrained; no tokenizer: a token is a byte" in told
    model, ours = transformers.AutoModelForCausalLM.from_pretrained("out"), as_trained()
    with torch.no_grad():
        wanted = ours(TOKENS)
    # Sums of up to 256 products of order 1, in another order: 1e-5 is a hundred units in the last place.
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)
    assert logits(model).std() > 0.05
    assert len(list(model.parameters())) == len(list(ours.parameters()))  # a tied matrix comes once
    assert model.config.eos_token_id is None


def test_our_gpt_s_matrices_are_those_of_the_checkpoint(call):
    train(call, "--task.size", "0.2M")
    call("checkpoint", "convert", "runs/run", "out", "--to", "hf")
    found, made = load_file("out/model.safetensors"), gather(Path("runs/run"))
    assert torch.equal(found["transformer.wte.weight"], made.records["embed.weight"].value)
    assert torch.equal(found["transformer.h.1.mlp.c_fc.weight"].T, made.records["blocks.1.mlp_read.weight"].value)


def test_our_gpt_s_tokenizer_goes_along(call, tokenizer):
    train(call, "--task.size", "0.2M", "--task.tokenizer", "tokenizer.json")
    call("checkpoint", "convert", "runs/run", "out", "--to", "hf")
    found = transformers.AutoTokenizer.from_pretrained("out")
    assert found("a fine day", add_special_tokens=False)["input_ids"] == tokenizer.encode("a fine day").ids
    Path("tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer = 'tokenizer.json', which the run was trained with, is not"):
        call("checkpoint", "convert", "runs/run", "again", "--to", "hf")
    assert not Path("again").exists()


def test_what_cannot_be_exported_is_refused(call, base):
    train(call, "--task.size", "0.2M")
    made = gather(Path("runs/run"))
    images = universal.Universal(**{**vars(made), "config": 'task.name = "images"\n'})
    with pytest.raises(
        ConfigError, match=r"a run of ImageOptions: its model has no Hugging Face .*\n.*\n.*--to weights"
    ):
        pretrained.write(Path("out"), images, shard_bytes=10**9)
    Path("out").mkdir()
    with pytest.raises(ConfigError, match="out is there already"):
        call("checkpoint", "convert", "runs/run", "out", "--to", "hf")
    with pytest.raises(ConfigError, match=r"--shard-size 1MB with --to universal: that is one file"):
        call("checkpoint", "convert", "runs/run", "b.safetensors", "--shard-size", "1MB")
    with pytest.raises(ConfigError, match=r"--shard-size 0B\n  expected  more than 0 bytes"):
        call("checkpoint", "convert", "runs/run", "b", "--to", "hf", "--shard-size", "0B")


def test_a_model_of_another_shape_is_refused(call, base):
    tuned(call)
    config = transformers.GPT2Config.from_pretrained("base", n_layer=1)
    transformers.GPT2LMHeadModel(config).save_pretrained("base")
    with pytest.raises(ConfigError, match=r"the checkpoint does not fit the model of base"):
        call("checkpoint", "convert", "runs/run", "out", "--to", "hf")
