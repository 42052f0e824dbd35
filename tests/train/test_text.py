import math
import sys

import pytest
import torch
from torch import nn

from thinwire.errors import ConfigError
from thinwire.train.corpus import byte_tokens, documents, split
from thinwire.train.tasks import evaluating
from thinwire.train.text import TextOptions

TEXT = "".join(f"{i} little members and {i % 7} slow links; " for i in range(400))


def task(tmp_path, text=TEXT, *, seed=0, **options):
    (tmp_path / "text.txt").write_text(text)
    options = {"size": "0.2M", "context": 16, "batch_size": 4, "validation_windows": 6} | options
    return TextOptions(data=str(tmp_path / "text.txt"), **options).build(seed=seed)


def same(a, b):
    return torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)


def test_a_batch_is_a_function_of_seed_step_and_rank(tmp_path):
    """Asked twice, in another order, of another object: nothing is remembered, so a resume needs nothing."""
    one, other = task(tmp_path), task(tmp_path)
    batches = {(step, rank): one.batch(step, rank, 3) for step in range(4) for rank in range(3)}
    for step, rank in reversed(batches):
        assert same(batches[step, rank], other.batch(step, rank, 3))
    drawn = [batch.inputs for batch in batches.values()] + [task(tmp_path, seed=1).batch(0, 0, 3).inputs]
    assert len({row.numpy().tobytes() for row in drawn}) == len(drawn)


def test_the_global_generator_has_no_part_in_batches(tmp_path):
    torch.manual_seed(1)
    one = task(tmp_path).batch(0, 0, 1)
    before = torch.get_rng_state()
    torch.manual_seed(2)
    assert same(one, task(tmp_path).batch(0, 0, 1))
    torch.manual_seed(1)
    task(tmp_path).batch(0, 0, 1)
    assert torch.equal(before, torch.get_rng_state())


def test_targets_are_the_next_tokens(tmp_path):
    batch = task(tmp_path).batch(0, 0, 1)
    assert batch.inputs.shape == batch.targets.shape == (4, 16)
    assert (batch.samples, batch.tokens) == (4, 64)
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    for inputs, targets in zip(batch.inputs, batch.targets, strict=True):
        assert bytes(inputs.tolist() + targets[-1:].tolist()).decode() in TEXT


def test_windows_never_cross_the_split():
    """Tokens are their own positions, so that every window tells where it came from."""
    tokens = torch.arange(200, dtype=torch.int32)
    corpus = split(tokens, context=8, data="test")
    seen = torch.cat([corpus.draw(key, count=50, context=8).targets for key in range(40)])
    assert (int(seen.min()), int(seen.max())) == (1, 179)  # both ends of the training part are reached
    valid = list(corpus.validation(count=5, context=8, batch_size=2))
    assert [batch.samples for batch in valid] == [2, 2, 1]
    assert [int(row[0]) for batch in valid for row in batch.inputs] == [180, 182, 185, 188, 191]
    assert int(valid[-1].targets.max()) == 199


def test_fewer_validation_windows_where_there_are_not_so_many():
    corpus = split(torch.arange(100, dtype=torch.int32), context=8, data="test")
    valid = list(corpus.validation(count=64, context=8, batch_size=64))
    assert valid[0].inputs[:, 0].tolist() == [90, 91]


def test_evaluate_is_deterministic_and_leaves_the_model_as_it_was(tmp_path):
    work = task(tmp_path)
    torch.manual_seed(0)
    model = work.model()
    model.blocks[0].eval()  # a part that its owner froze stays so
    first, second = work.evaluate(model), work.evaluate(model)
    assert first == second
    assert set(first) == {"loss"}
    assert model.training
    assert model.blocks[1].training
    assert not model.blocks[0].training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_modes_come_back_after_an_error_too():
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
    with pytest.raises(RuntimeError, match="cannot be multiplied"), evaluating(model):
        model(torch.zeros(1, 2))
    assert model[1].training


@pytest.mark.parametrize("count", [1, 4, 6])
def test_validation_windows_is_how_many_are_evaluated(tmp_path, count):
    work = task(tmp_path, validation_windows=count)
    torch.manual_seed(0)
    model = work.model()
    batches = list(work.corpus.validation(count=count, context=16, batch_size=count))
    assert batches[0].samples == count
    assert work.evaluate(model)["loss"] == pytest.approx(work.loss(model, batches[0]).item(), rel=1e-5)


def test_options_shape_the_model(tmp_path):
    assert task(tmp_path, size="0.9M").model().embed.weight.shape == (256, 128)
    untied = task(tmp_path, tied=False).model()
    assert untied.head.weight is not untied.embed.weight
    assert task(tmp_path, context=9).model().context == 9


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.md").write_text("two")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("no")
    assert documents(str(tmp_path)) == ["one", "two"]
    assert bytes(byte_tokens(["one", "tö"]).tolist()).decode() == "one\ntö"


def test_the_text_that_is_always_there():
    texts = documents("reference")
    assert 200_000 < sum(map(len, texts)) < 2_000_000


@pytest.mark.parametrize(
    ("data", "wrong"),
    [
        ("missing.txt", "missing.txt: No such file or directory"),
        ("empty.txt", "empty.txt: there is no text in it"),
        ("folder", "folder: there is no text in it"),
        ("binary.txt", "binary.txt: byte 2 is not UTF-8 text"),
        ("short.txt", "short.txt: the text has 100 tokens, its last tenth only 10"),
    ],
)
def test_data_that_will_not_do(tmp_path, monkeypatch, data, wrong):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(b"ab\xff")
    (tmp_path / "short.txt").write_text("x" * 100)
    with pytest.raises(ConfigError) as caught:
        TextOptions(data=data, context=10).build(seed=0)
    assert caught.value.wrong == wrong


def test_the_refusal_of_a_short_text_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("x" * 109)
    TextOptions(data="short.txt", context=9).build(seed=0).batch(0, 0, 1)
    with pytest.raises(ConfigError) as caught:
        TextOptions(data="short.txt", context=10).build(seed=0)
    assert str(caught.value) == (
        "short.txt: the text has 109 tokens, its last tenth only 10\n"
        "  expected  at least 110 tokens, so that a window of context 10 and its last target fit in\n"
        "  mend      set context to 9 or less, or give more text"
    )


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"size": "1M"}, "TextOptions: size = '1M'"),
        ({"context": 0}, "TextOptions: context = 0: 0 is out of range"),
        ({"batch_size": -1}, "TextOptions: batch_size = -1: -1 is out of range"),
    ],
)
def test_options_are_checked_on_construction(options, wrong):
    with pytest.raises(ConfigError) as caught:
        TextOptions(**options)
    assert caught.value.wrong == wrong


@pytest.mark.parametrize(
    ("options", "module"), [({"tokenizer": "t.json"}, "tokenizers"), ({"data": "datasets:x"}, "datasets")]
)
def test_a_missing_extra_is_named(monkeypatch, options, module):
    monkeypatch.setitem(sys.modules, module, None)  # how Python marks a module that cannot be imported
    with pytest.raises(ConfigError, match=f"needs {module}.*\n.*extra 'hf'\n.*pip install 'thinwire\\[hf\\]'"):
        TextOptions(**options).build(seed=0)


def bpe(path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(path))
    return tokenizer


def test_a_tokenizer_decides_tokens_and_vocabulary(tmp_path):
    tokenizer = bpe(tmp_path / "tokenizer.json")
    work = task(tmp_path, tokenizer=str(tmp_path / "tokenizer.json"))
    assert work.vocab == tokenizer.get_vocab_size() != 256
    assert work.model().embed.weight.shape[0] == work.vocab
    assert tokenizer.decode(work.corpus.train.tolist() + work.corpus.valid.tolist()) == TEXT
    assert len(work.corpus.train) < 0.9 * len(TEXT) / 2  # it found words
    (tmp_path / "more.txt").write_text("the end")
    (tmp_path / "tokenizer.json").rename(tmp_path / ".tokenizer.json")
    folder = TextOptions(data=str(tmp_path), tokenizer=str(tmp_path / ".tokenizer.json"), context=16).build(seed=0)
    tokens = folder.corpus.train.tolist() + folder.corpus.valid.tolist()
    assert tokenizer.decode(tokens) == f"the end\n{TEXT}"
    assert work.loss(work.model(), work.batch(0, 0, 1)).isfinite()


@pytest.mark.parametrize("content", [None, "{}"])
def test_a_tokenizer_that_cannot_be_read(tmp_path, content):
    pytest.importorskip("tokenizers")
    if content is not None:
        (tmp_path / "t.json").write_text(content)
    with pytest.raises(ConfigError, match=r"tokenizer = .*t\.json' cannot be read"):
        task(tmp_path, tokenizer=str(tmp_path / "t.json"))


def test_a_saved_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["one", "", "two"], "body": ["1", "2", "3"]}).save_to_disk(tmp_path / "set")
    assert documents(f"datasets:{tmp_path / 'set'}") == ["one", "two"]
    assert documents(f"datasets:{tmp_path / 'set'}:body") == ["1", "2", "3"]
    with pytest.raises(ConfigError, match="has no column 'words'\n  expected  one of its columns: text, body"):
        documents(f"datasets:{tmp_path / 'set'}:words")


def test_a_saved_data_set_in_parts_gives_its_training_part(tmp_path):
    datasets = pytest.importorskip("datasets")
    parts = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    assert documents(f"datasets:{tmp_path / 'set'}") == ["train"]


def test_a_data_set_that_is_not_there(tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(ConfigError, match=r"cannot load the data set .*there is no such folder"):
        documents(f"datasets:{tmp_path / 'none'}")


def test_training_on_the_embedded_text_learns_more_than_letter_frequencies():
    """A fresh model has the loss of the uniform distribution, ln 256 = 5.5 nats; sixty steps bring it below the
    entropy of the bytes' frequencies, which no model that ignores its context can beat."""
    work = TextOptions(size="0.2M", context=64, batch_size=16, validation_windows=32).build(seed=0)
    frequencies = work.corpus.valid.long().bincount(minlength=256).double() / len(work.corpus.valid)
    entropy = -(frequencies * frequencies.clamp(min=1e-300).log()).sum().item()
    torch.manual_seed(0)
    model = work.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    before = work.evaluate(model)["loss"]
    for step in range(60):
        optimizer.zero_grad()
        work.loss(model, work.batch(step, 0, 1)).backward()
        optimizer.step()
    after = work.evaluate(model)["loss"]
    assert before == pytest.approx(math.log(256), abs=0.2)
    assert after < entropy < 3.5
