"""On models of two layers, made and saved on the spot: nothing is downloaded."""

import csv
import json
import sys

import pytest
import torch

from thinwire.errors import ConfigError
from thinwire.train.huggingface import HuggingFaceOptions

pytest.importorskip("transformers")

GOOD = ["a fine day", "very fine and warm", "what a fine result"]
BAD = ["a poor day", "very poor and cold", "what a poor result"]
ROWS = [
    {"text": f"{text} {i}", "label": label}
    for i in range(10)
    for label, side in (("good", GOOD), ("bad", BAD))
    for text in side
]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A folder with a tiny GPT-2 without dropout and a BPE tokenizer without a padding token."""
    import tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([row["text"] for row in ROWS], trainer)
    folder = tmp_path_factory.mktemp("gpt2")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(), n_positions=32, n_embd=32, n_layer=2, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(" and ".join(row["text"] for row in ROWS) * 3)
    return str(tmp_path / "text.txt")


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return str(tmp_path / "rows.jsonl")


def causal(gpt2, text, **options):
    return HuggingFaceOptions(gpt2, data=text, **({"context": 8, "batch_size": 4} | options)).build(seed=0)


def classifier(gpt2, data, **options):
    options = {"head": "classifier", "context": 12, "batch_size": 6} | options
    return HuggingFaceOptions(gpt2, data=data, **options).build(seed=0)


def seeded(task, seed=0):
    torch.manual_seed(seed)
    return task.model()


def trainable(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def train(task, model, steps):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        task.loss(model, task.batch(step, 0, 1)).backward()
        optimizer.step()


def test_causal_batches_are_pure_and_members_differ(gpt2, text):
    task = causal(gpt2, text)
    batch = task.batch(3, 1, 2)
    assert batch.inputs.shape == (4, 8)
    assert (batch.samples, batch.tokens) == (4, 32)
    assert torch.equal(batch.inputs, causal(gpt2, text).batch(3, 1, 2).inputs)
    assert not torch.equal(batch.inputs, task.batch(3, 0, 2).inputs)
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])


def test_documents_end_with_the_models_token_for_it(gpt2, text, tmp_path):
    (tmp_path / "second.txt").write_text("a fine day")
    task = causal(gpt2, str(tmp_path))
    tokens = torch.cat([task.corpus.train, task.corpus.valid])
    assert int((tokens == 0).sum()) == 2
    assert int(tokens[-1]) == 0


def test_the_causal_loss_is_the_librarys_own(gpt2, text):
    """transformers shifts labels itself: on the whole window it must come to the same mean."""
    task = causal(gpt2, text)
    model, batch = seeded(task), task.batch(0, 0, 1)
    whole = torch.cat([batch.inputs, batch.targets[:, -1:]], dim=1)
    assert task.loss(model, batch).item() == pytest.approx(model(input_ids=whole, labels=whole).loss.item(), rel=1e-5)


def test_a_causal_model_is_the_saved_one_and_learns(gpt2, text):
    task = causal(gpt2, text)
    model = seeded(task)
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), seeded(task, 1).parameters(), strict=True))
    before = task.evaluate(model)
    assert before == task.evaluate(model)
    train(task, model, 20)
    assert task.evaluate(model)["loss"] < before["loss"] - 0.5


@pytest.mark.parametrize("targets", [(), ("c_proj",)])
def test_with_lora_only_adapters_are_trained(gpt2, text, targets):
    pytest.importorskip("peft")
    task = causal(gpt2, text, lora_rank=2, lora_targets=targets)
    model = seeded(task)
    assert trainable(model)
    assert all("lora_" in name for name in trainable(model))
    assert all(target in name for name in trainable(model) for target in targets)
    same = zip(model.parameters(), seeded(task).parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    frozen = {name: value.clone() for name, value in model.named_parameters() if "lora_" not in name}
    before = task.evaluate(model)["loss"]
    train(task, model, 20)
    assert task.evaluate(model)["loss"] < before
    assert all(torch.equal(value, frozen[name]) for name, value in model.named_parameters() if "lora_" not in name)


def test_lora_rank_and_alpha_reach_the_adapters(gpt2, text):
    pytest.importorskip("peft")
    model = causal(gpt2, text, lora_rank=3, lora_alpha=12.0).model()
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    assert layer.lora_A["default"].weight.shape[0] == 3
    assert layer.scaling["default"] == 4.0


def test_lora_targets_that_are_not_there(gpt2, text):
    pytest.importorskip("peft")
    with pytest.raises(
        ConfigError, match=r"lora_targets = \['query'\].*\n  expected  names of this model's layers: .*c_attn"
    ):
        causal(gpt2, text, lora_rank=2, lora_targets=("query",)).model()


def test_a_classifier_learns_two_words(gpt2, rows):
    task = classifier(gpt2, rows)
    model = seeded(task)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), seeded(task).parameters(), strict=True))
    assert task.evaluate(model) == task.evaluate(model)
    train(task, model, 30)
    assert task.evaluate(model)["accuracy"] == 1.0


def test_a_classifier_with_lora_trains_adapters_and_its_new_head(gpt2, rows):
    pytest.importorskip("peft")
    names = trainable(classifier(gpt2, rows, lora_rank=2).model())
    assert {("lora_" in name, "score" in name) for name in names} == {(True, False), (False, True)}


def test_classifier_batches_share_an_epoch(gpt2, rows):
    """54 training texts, two members, 27 a step: both steps are whole epochs."""
    task = classifier(gpt2, rows, batch_size=27)
    for step in range(2):
        parts = [task.batch(step, rank, 2) for rank in range(2)]
        seen = sorted(tuple(row[row >= 0].tolist()) for part in parts for row in part.inputs)
        assert seen == sorted(tuple(row[row >= 0].tolist()) for row in task.ids[task.train])
        assert all(part.tokens == int((part.inputs >= 0).sum()) for part in parts)


def test_padding_does_not_change_a_classifiers_answer(gpt2, rows):
    """A short text alone and the same text beside a longer one; the tolerance covers another order of summation."""
    task = classifier(gpt2, rows)
    model = seeded(task).eval()
    lengths = (task.ids >= 0).sum(dim=1)
    index = torch.stack([lengths.argmin(), lengths.argmax()])
    assert int(lengths.min()) < int(lengths.max())
    together = task._logits(model, task._batch(index))[0]
    alone = task._logits(model, task._batch(index[:1]))[0]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["csv", "datasets"])
def test_labelled_rows_of_every_kind_are_read_alike(gpt2, rows, tmp_path, kind):
    data = str(tmp_path / "rows.csv")
    if kind == "csv":
        with open(data, "w", newline="") as file:
            writer = csv.DictWriter(file, ["sentence", "mood"])
            writer.writeheader()
            writer.writerows({"sentence": row["text"], "mood": row["label"]} for row in ROWS)
    else:
        datasets = pytest.importorskip("datasets")
        columns = {"sentence": [row["text"] for row in ROWS], "mood": [row["label"] for row in ROWS]}
        datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "set")
        data = f"datasets:{tmp_path / 'set'}"
    task, other = classifier(gpt2, data, text_column="sentence", label_column="mood"), classifier(gpt2, rows)
    assert torch.equal(task.ids, other.ids)
    assert torch.equal(task.labels, other.labels)


@pytest.mark.parametrize(
    ("name", "content", "wrong"),
    [
        ("a.jsonl", '{"text": "x"}', "row 1 lacks text or label"),
        ("a.jsonl", "text", "not JSON"),
        ("a.jsonl", '{"text": "x", "label": 1}', "1 texts with 1 different labels"),
        ("a.csv", "text,mood\nx,1", "row 1 lacks text or label"),
        ("a.txt", "x", "labelled data of an unknown kind"),
    ],
)
def test_labelled_data_that_will_not_do(gpt2, tmp_path, name, content, wrong):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=wrong) as caught:
        classifier(gpt2, str(tmp_path / name))
    assert str(tmp_path / name) in caught.value.wrong


def test_labelled_data_that_is_not_there(gpt2, tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        classifier(gpt2, str(tmp_path / "none.csv"))


def test_validation_windows_is_how_many_are_evaluated(gpt2, rows):
    task = classifier(gpt2, rows, validation_windows=1)
    assert task.evaluate(seeded(task))["accuracy"] in (0.0, 1.0)


def test_a_model_that_is_not_there(tmp_path, text):
    with pytest.raises(ConfigError) as caught:
        causal(str(tmp_path / "none"), text)
    assert caught.value.wrong.startswith(f"path = '{tmp_path / 'none'}': AutoTokenizer cannot load it: ")
    assert caught.value.expected.startswith("a folder written by save_pretrained")


def test_a_context_longer_than_the_model(gpt2, text):
    with pytest.raises(ConfigError, match=r"context = 33, and .* has 32 positions\n.*\n  mend      set context to 32"):
        causal(gpt2, text, context=33)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"'huggingface' needs transformers.*\n.*\n.*pip install 'thinwire\[hf\]'"):
        HuggingFaceOptions("model").build(seed=0)
