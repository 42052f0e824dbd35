"""Hugging Face models: a causal language model or a text classifier, whole or with LoRA adapters only."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinwire.errors import ConfigError
from thinwire.options import about, check
from thinwire.randomness import mix
from thinwire.train.corpus import REFERENCE, Corpus, dataset_name, dataset_rows, documents, is_dataset, split
from thinwire.train.gpt import next_token_loss
from thinwire.train.sampling import epoch_positions, held_out
from thinwire.train.tasks import Batch, Task, evaluating, import_extra
from thinwire.train.text import mean_loss

_WINDOWS = int.from_bytes(b"windows", "little")  # keeps these keys apart from those of other draws
_VALIDATION_SHARE = 0.1
_PADDING = -1  # in a batch of token ids; the attention mask is where it is not


@dataclass(frozen=True)
class HuggingFaceOptions:
    """A pretrained model of the transformers library (extra `hf`), fine-tuned whole or through LoRA adapters."""

    path: str = field(metadata=about("folder written by `save_pretrained`, or a name on the Hugging Face hub"))
    head: Literal["causal", "classifier"] = field(
        default="causal", metadata=about("`causal` predicts the next token, `classifier` a label for each text")
    )
    data: str = field(
        default=REFERENCE,
        metadata=about(
            "for `causal` any text, as for the text task; for `classifier` a .jsonl or .csv file or "
            "`datasets:NAME_OR_FOLDER`, with a column of texts and one of labels"
        ),
    )
    text_column: str = field(default="text", metadata=about("of a classifier's data"))
    label_column: str = field(default="label", metadata=about("of a classifier's data"))
    context: int = field(default=128, metadata=about("tokens in a row; longer texts are cut", at_least=1))
    batch_size: int = field(default=8, metadata=about("windows or texts for each local step of a member", at_least=1))
    validation_windows: int = field(
        default=64, metadata=about("windows or texts of the held-out tenth to evaluate on, at most", at_least=1)
    )
    lora_rank: int = field(default=0, metadata=about("rank of the LoRA adapters; 0 trains the whole model", at_least=0))
    lora_alpha: float = field(default=16.0, metadata=about("adapters are scaled by alpha / rank", above=0))
    lora_targets: tuple[str, ...] = field(
        default=(), metadata=about("names of the layers to adapt; none given: PEFT's choice for the architecture")
    )

    def __post_init__(self) -> None:
        check(self)

    def build(self, *, seed: int) -> Task:
        """Load the tokenizer and the data; the weights are loaded by `model()`."""
        tokenizer = load_tokenizer(self.path)
        config = _load(self.path, "AutoConfig")
        _check_context(self, config)
        if self.head == "causal":
            return CausalTask(self, seed, _corpus(self, tokenizer, config))
        texts, labels = _labelled(self)
        padding = _padding_id(tokenizer)
        ids = _padded(texts, tokenizer, context=self.context, padding=padding)
        return ClassifierTask(self, seed, ids, labels, *held_out(len(ids), _VALIDATION_SHARE), padding)


@dataclass(frozen=True, eq=False)
class CausalTask:
    """Random windows of the training part; see `thinwire.train.tasks.Task`."""

    options: HuggingFaceOptions
    seed: int
    corpus: Corpus

    def model(self) -> nn.Module:
        """The pretrained model; only the adapters are drawn from torch's global generator."""
        return _causal(self.options)

    def batch(self, step: int, rank: int, world: int) -> Batch:
        """Windows drawn with replacement: they do not depend on how many members there are."""
        key = mix(self.seed, _WINDOWS, step, rank)
        return self.corpus.draw(key, count=self.options.batch_size, context=self.options.context)

    @property
    def units_per_epoch(self) -> int:
        """Batches that hold as many tokens as the training part."""
        return self.corpus.units(count=self.options.batch_size, context=self.options.context)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross entropy of the next token, in nats."""
        return next_token_loss(model(input_ids=batch.inputs).logits, batch.targets)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The same loss on evenly spaced validation windows."""
        options = self.options
        batches = self.corpus.validation(
            count=options.validation_windows, context=options.context, batch_size=options.batch_size
        )
        return {"loss": mean_loss(self, model, batches)}


@dataclass(frozen=True, eq=False)
class ClassifierTask:
    """Every member its own part of each epoch; see `thinwire.train.tasks.Task`.

    ids           int64 [n, context], -1 where a text has ended
    labels        int64 [n], from 0
    train, valid  int64: which of the n are for what
    padding       the id the model knows as padding
    """

    options: HuggingFaceOptions
    seed: int
    ids: Tensor
    labels: Tensor
    train: Tensor
    valid: Tensor
    padding: int

    def model(self) -> nn.Module:
        """The pretrained body under a head for these labels; a new head comes from torch's global generator."""
        return _classifier(self.options, self.labels, self.padding)

    def batch(self, step: int, rank: int, world: int) -> Batch:
        """The member's next texts; together the members see each one once an epoch."""
        size, n = self.options.batch_size, len(self.train)
        return self._batch(self.train[epoch_positions(self.seed, step, rank, world, batch_size=size, n=n)])

    @property
    def units_per_epoch(self) -> int:
        """Batches of one member alone in which each text was seen."""
        return -(-len(self.train) // self.options.batch_size)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross entropy in nats."""
        return F.cross_entropy(self._logits(model, batch), batch.targets)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Loss and share of right answers on held-out texts."""
        valid = self.valid[: self.options.validation_windows]
        total, right = 0.0, 0
        with evaluating(model) as device:
            for index in torch.split(valid, self.options.batch_size):
                batch = self._batch(index).to(device)
                logits = self._logits(model, batch)  # [b, classes]
                total += float(F.cross_entropy(logits, batch.targets, reduction="sum"))
                right += int((logits.argmax(dim=1) == batch.targets).sum())
        return {"loss": total / len(valid), "accuracy": right / len(valid)}

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        mask = batch.inputs != _PADDING  # [b, t]
        ids = batch.inputs.where(mask, self.padding)
        logits: Tensor = model(input_ids=ids, attention_mask=mask.long()).logits
        return logits.float()

    def _batch(self, index: Tensor) -> Batch:
        ids = self.ids[index]  # [b, context]
        lengths = (ids != _PADDING).sum(dim=1)
        return Batch(ids[:, : int(lengths.max())], self.labels[index], len(index), tokens=int(lengths.sum()))


def whole_model(options: HuggingFaceOptions) -> nn.Module:
    """The model of a task with these options; data are read only for a classifier's labels."""
    if options.head == "causal":
        return _causal(options)
    return _classifier(options, _labelled(options)[1], _padding_id(load_tokenizer(options.path)))


def load_tokenizer(path: str) -> Any:
    """The tokenizer beside a pretrained model. Raises ConfigError if there is none."""
    return _load(path, "AutoTokenizer")


def _causal(options: HuggingFaceOptions) -> nn.Module:
    return _adapted(_load(options.path, "AutoModelForCausalLM"), options, "CAUSAL_LM")


def _classifier(options: HuggingFaceOptions, labels: Tensor, padding: int) -> nn.Module:
    classes = int(labels.max()) + 1
    model = _load(options.path, "AutoModelForSequenceClassification", num_labels=classes, pad_token_id=padding)
    return _adapted(model, options, "SEQ_CLS")


def _load(path: str, kind: str, **options: object) -> Any:
    """`transformers.KIND.from_pretrained(path)`."""
    transformers = import_extra("transformers", extra="hf", purpose="the task 'huggingface'")
    try:
        with quiet(transformers):
            return getattr(transformers, kind).from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"path = {path!r}: {kind} cannot load it: {(str(error).splitlines() or ['?'])[0]}",
            expected="a folder written by save_pretrained (model and tokenizer), or a name on the Hugging Face hub",
            mend="check the path; without a network, save model and tokenizer into one folder first",
        ) from error


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Without the library's progress bars: every member loads, and their bars would run over one another."""
    logging = transformers.utils.logging
    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _adapted(model: Any, options: HuggingFaceOptions, task_type: str) -> nn.Module:
    """The model in train mode; with LoRA, only the adapters (and a classifier's head) require gradients."""
    if options.lora_rank:
        peft = import_extra("peft", extra="hf", purpose="lora_rank > 0")
        targets = list(options.lora_targets) or None
        lora = peft.LoraConfig(
            task_type=task_type, r=options.lora_rank, lora_alpha=options.lora_alpha, target_modules=targets
        )
        try:
            model = peft.get_peft_model(model, lora)
        except ValueError as error:
            names = sorted({name.rpartition(".")[2] for name, _ in model.named_modules() if name})
            raise ConfigError(
                f"lora_targets = {list(options.lora_targets)}: {(str(error).splitlines() or ['?'])[0]}",
                expected=f"names of this model's layers: {', '.join(names)}",
                mend="name linear layers, usually those of the attention",
            ) from error
    return cast(nn.Module, model.train())


def _check_context(options: HuggingFaceOptions, config: Any) -> None:
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and options.context > longest:
        raise ConfigError(
            f"context = {options.context}, and {options.path!r} has {longest} positions",
            expected="no more tokens in a row than the model has positions",
            mend=f"set context to {longest} or less",
        )


def _corpus(options: HuggingFaceOptions, tokenizer: Any, config: Any) -> Corpus:
    rows = tokenizer(documents(options.data), add_special_tokens=False, verbose=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]  # after each document, as in pretraining
    tokens = torch.cat([torch.tensor(row + end, dtype=torch.int32) for row in rows])  # [n]
    if len(tokens) and int(tokens.max()) >= config.vocab_size:
        raise ConfigError(
            f"{options.path!r}: its tokenizer writes token {int(tokens.max())}, its model knows {config.vocab_size}",
            expected="a tokenizer and a model made for each other",
            mend="save the tokenizer the model was trained with into the model's folder",
        )
    return split(tokens, context=options.context, data=options.data)


def _padding_id(tokenizer: Any) -> int:
    """What fills up short texts; it is masked, so any id will do where the tokenizer has none."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(each for each in known if each is not None))


def _padded(texts: Sequence[str], tokenizer: Any, *, context: int, padding: int) -> Tensor:
    """int64 [n, context], -1 where a text has ended; a text without tokens is one visible padding token."""
    ids = torch.full((len(texts), context), _PADDING)
    for row, tokens in enumerate(tokenizer(list(texts), truncation=True, max_length=context)["input_ids"]):
        ids[row, : max(1, len(tokens))] = torch.tensor(tokens or [padding])
    return ids


def _labelled(options: HuggingFaceOptions) -> tuple[list[str], Tensor]:
    """Texts, and their labels as numbers from 0 in the order of the labels: [n], int64 [n]."""
    columns = [options.text_column, options.label_column]
    if is_dataset(options.data):
        name, _ = dataset_name(options.data, default_column=options.text_column)
        table = dataset_rows(name, columns)
        rows = list(zip(table[columns[0]], table[columns[1]], strict=True))
    else:
        rows = list(_rows(Path(options.data), columns))
    labels = sorted({label for _, label in rows}, key=lambda label: (str(type(label)), label))
    if len(labels) < 2 or len(rows) < 10:
        raise ConfigError(
            f"{options.data}: {len(rows)} texts with {len(labels)} different labels",
            expected="at least 10 texts and 2 labels",
            mend="give more data, or name its label column with label_column",
        )
    number = {label: i for i, label in enumerate(labels)}
    return [str(text) for text, _ in rows], torch.tensor([number[label] for _, label in rows])


def _rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, Any]]:
    """(text, label) of each line of a .jsonl or .csv file."""
    readers: dict[str, Callable[[Iterable[str]], Iterable[Any]]] = {".jsonl": _jsonl, ".csv": csv.DictReader}
    if path.suffix not in readers:
        raise ConfigError(
            f"{path}: labelled data of an unknown kind",
            expected="a .jsonl or .csv file, or datasets:NAME_OR_FOLDER",
            mend="write one JSON object a line, with the keys " + " and ".join(columns),
        )
    try:
        with path.open(newline="", encoding="utf-8") as lines:
            for number, row in enumerate(readers[path.suffix](lines), start=1):
                if not isinstance(row, dict) or any(row.get(column) is None for column in columns):
                    raise ConfigError(
                        f"{path}: row {number} lacks {' or '.join(columns)}",
                        expected="a text and a label in every row",
                        mend="name the columns with text_column and label_column",
                    )
                yield row[columns[0]], row[columns[1]]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}", expected="a readable UTF-8 file", mend="check the path") from error
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}: not JSON: {error}", expected="one JSON object a line", mend="correct the line, or use .csv"
        ) from error


def _jsonl(lines: Iterable[str]) -> Iterator[Any]:
    return (json.loads(line) for line in lines if line.strip())
