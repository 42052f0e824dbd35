"""Language modelling on any text, in bytes or in tokens, with our own GPT."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from thinwire.errors import ConfigError
from thinwire.options import about, check, unknown
from thinwire.randomness import mix
from thinwire.train.corpus import REFERENCE, Corpus, byte_tokens, documents, split
from thinwire.train.gpt import GPT, SIZES, gpt, next_token_loss
from thinwire.train.tasks import Batch, evaluating, import_extra

BYTES = "bytes"

_WINDOWS = int.from_bytes(b"windows", "little")  # keeps these keys apart from those of other draws


@dataclass(frozen=True)
class TextOptions:
    """A GPT that learns to predict the next byte or token of a text."""

    data: str = field(
        default=REFERENCE,
        metadata=about(
            "the text: a file, a folder (all UTF-8 files in it), `datasets:NAME_OR_FOLDER[:column]` (extra `hf`), or "
            "`reference`, the text of Python's language reference"
        ),
    )
    tokenizer: str = field(default=BYTES, metadata=about("`bytes`, or the path of a tokenizer.json (extra `hf`)"))
    size: str = field(default="0.9M", metadata=about(f"parameters of the model: {', '.join(SIZES)}"))
    context: int = field(default=128, metadata=about("tokens the model sees at once", at_least=1))
    tied: bool = field(default=True, metadata=about("whether the output layer is the embedding's own matrix"))
    batch_size: int = field(default=16, metadata=about("windows for each local step of a member", at_least=1))
    validation_windows: int = field(
        default=64, metadata=about("windows of the held-out last tenth to evaluate on", at_least=1)
    )

    def __post_init__(self) -> None:
        check(self)
        if self.size not in SIZES:
            raise unknown(f"TextOptions: size = {self.size!r}", self.size, SIZES, what="one of the sizes")

    def build(self, *, seed: int) -> TextTask:
        """Read and tokenise the text."""
        texts = documents(self.data)
        if self.tokenizer == BYTES:
            tokens, vocab = byte_tokens(texts), 256
        else:
            tokens, vocab = _tokenised(texts, self.tokenizer)
        return TextTask(self, seed, split(tokens, context=self.context, data=self.data), vocab)


@dataclass(frozen=True, eq=False)
class TextTask:
    """Random windows of the training part, a function of (seed, step, rank); see `thinwire.train.tasks.Task`."""

    options: TextOptions
    seed: int
    corpus: Corpus
    vocab: int

    def model(self) -> GPT:
        """A fresh GPT."""
        return gpt(self.options.size, vocab=self.vocab, context=self.options.context, tied=self.options.tied)

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
        return next_token_loss(model(batch.inputs), batch.targets)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The same loss on evenly spaced validation windows."""
        options = self.options
        batches = self.corpus.validation(
            count=options.validation_windows, context=options.context, batch_size=options.batch_size
        )
        return {"loss": mean_loss(self, model, batches)}


def mean_loss(task: Any, model: nn.Module, batches: Iterable[Batch]) -> float:
    """Mean of the task's loss over batches, weighted by tokens; the model is left as it was."""
    total, tokens = 0.0, 0
    with evaluating(model) as device:
        for batch in batches:
            total += float(task.loss(model, batch.to(device))) * batch.tokens
            tokens += batch.tokens
    return total / tokens


def _tokenised(texts: list[str], path: str) -> tuple[Tensor, int]:
    """Tokens and size of the vocabulary: int32 [n], v."""
    tokenizers = import_extra("tokenizers", extra="hf", purpose=f"tokenizer = {path!r}")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(path)
    except Exception as error:  # the library raises bare Exception, for a missing file too
        raise ConfigError(
            f"tokenizer = {path!r} cannot be read: {error}",
            expected="'bytes', or a tokenizer.json of the tokenizers library",
            mend="check the path; a relative one starts from the current directory",
        ) from error
    lines = [f"{text}\n" for text in texts[:-1]] + texts[-1:]  # joined as the bytes are
    encoded = tokenizer.encode_batch(lines, add_special_tokens=False)
    ids = [torch.tensor(each.ids, dtype=torch.int32) for each in encoded]
    return torch.cat(ids), tokenizer.get_vocab_size()
