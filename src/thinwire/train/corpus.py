"""Text as one row of tokens, and windows cut from it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thinwire.errors import ConfigError
from thinwire.train.sampling import uniform
from thinwire.train.tasks import Batch, import_extra

#: The data that is always there: the topics of Python's language reference, 465 kB of English in Python 3.11.
REFERENCE = "reference"

_DATASETS = "datasets:"
_VALIDATION = 10  # every tenth part of the text, the last one, is for validation


@dataclass(frozen=True, eq=False)
class Corpus:
    """A row of tokens in two parts; no window reaches from one into the other.

    train, valid   uint8 or int32 [n]: the first nine tenths, the last tenth
    """

    train: Tensor
    valid: Tensor

    def draw(self, key: int, *, count: int, context: int) -> Batch:
        """`count` windows at random places of the training part; a pure function of the key."""
        return _windows(self.train, uniform(key, count, len(self.train) - context), context)

    def units(self, *, count: int, context: int) -> int:
        """How many draws hold as many tokens as the training part."""
        return max(1, len(self.train) // (count * context))

    def validation(self, *, count: int, context: int, batch_size: int) -> Iterator[Batch]:
        """`count` windows evenly spaced over the validation part, in batches; fewer if there are not so many."""
        last = len(self.valid) - context - 1
        count = min(count, last + 1)
        starts = torch.tensor([i * last // max(1, count - 1) for i in range(count)])  # [count]
        for some in torch.split(starts, batch_size):
            yield _windows(self.valid, some, context)


def _windows(tokens: Tensor, starts: Tensor, context: int) -> Batch:
    rows = tokens[starts[:, None] + torch.arange(context + 1)].long()  # [count, context + 1]
    return Batch(rows[:, :-1], rows[:, 1:], samples=len(rows), tokens=len(rows) * context)


def split(tokens: Tensor, *, context: int, data: str) -> Corpus:
    """The two parts, each long enough for a window.

    raises  ConfigError if the text is too short
    """
    cut = len(tokens) - len(tokens) // _VALIDATION
    corpus = Corpus(tokens[:cut], tokens[cut:])
    if len(corpus.valid) < context + 1:
        needed = _VALIDATION * (context + 1)
        raise ConfigError(
            f"{data}: the text has {len(tokens)} tokens, its last tenth only {len(corpus.valid)}",
            expected=f"at least {needed} tokens, so that a window of context {context} and its last target fit in",
            mend=f"set context to {max(1, len(corpus.valid) - 1)} or less, or give more text",
        )
    return corpus


def byte_tokens(texts: Sequence[str]) -> Tensor:
    """UTF-8 bytes: uint8 [n]."""
    return torch.frombuffer(bytearray("\n".join(texts).encode()), dtype=torch.uint8)


def documents(data: str) -> list[str]:
    """The texts that `data` names, none of them empty.

    data     "reference"; a file; a directory (all files in it that are UTF-8 text, in the order of their paths; names
             that begin with a dot are passed over); "datasets:NAME_OR_FOLDER[:column]"
    raises   ConfigError if there is no such thing, or no text in it
    """
    if data == REFERENCE:
        return _reference()
    if data.startswith(_DATASETS):
        name, column = dataset_name(data, default_column="text")
        return _some([text for text in dataset_rows(name, [column])[column] if text], data)
    path = Path(data)
    if path.is_dir():
        return _some([text for file in _files(path) if (text := _text_or_none(file))], data)
    return _some([_text(path)], data)


def is_dataset(data: str) -> bool:
    """Whether `data` names a Hugging Face data set."""
    return data.startswith(_DATASETS)


def dataset_name(data: str, *, default_column: str) -> tuple[str, str]:
    """Name and column of "datasets:NAME[:column]"."""
    name, _, column = data.removeprefix(_DATASETS).partition(":")
    return name, column or default_column


def dataset_rows(name: str, columns: Sequence[str]) -> dict[str, list[Any]]:
    """Columns of a Hugging Face data set's training part: column -> one value a row.

    name    a folder written by `save_to_disk`, or a name that `datasets.load_dataset` knows
    raises  ConfigError if it cannot be loaded or has no such column
    """
    datasets = import_extra("datasets", extra="hf", purpose=f"the data set {name!r}")
    try:
        loaded = _load_dataset(datasets, name)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot load the data set {name!r}: {_first_line(error)}",
            expected="a folder written by save_to_disk, or a name that datasets.load_dataset knows",
            mend="check the name; without a network, save the data set with save_to_disk and name the folder",
        ) from error
    for column in columns:
        if column not in loaded.column_names:
            raise ConfigError(
                f"the data set {name!r} has no column {column!r}",
                expected=f"one of its columns: {', '.join(loaded.column_names)}",
                mend=f"write {_DATASETS}{name}:COLUMN, or set the column's option",
            )
    return {column: list(loaded[column]) for column in columns}


def _load_dataset(datasets: Any, name: str) -> Any:
    path = Path(name)
    saved = any((path / file).exists() for file in ("state.json", "dataset_dict.json"))
    if not saved and not path.exists() and (path.is_absolute() or name.startswith(".")):
        raise FileNotFoundError("there is no such folder")
    loaded = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, split="train")
    return loaded["train"] if isinstance(loaded, datasets.DatasetDict) else loaded


def _reference() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _files(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place) / name for name in sorted(names) if not name.startswith("."))


def _text_or_none(file: Path) -> str | None:
    try:
        return file.read_bytes().decode()
    except UnicodeDecodeError:
        return None  # a picture, an archive: not what a folder of text is read for


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: byte {error.start} is not UTF-8 text", expected="a text file", mend="convert it to UTF-8"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}",
            expected="a text file, a folder of text files, 'reference', or datasets:NAME",
            mend="check the path; a relative one starts from the current directory",
        ) from error


def _some(texts: list[str], data: str) -> list[str]:
    if not any(texts):
        raise ConfigError(f"{data}: there is no text in it", expected="at least one character", mend="give other data")
    return texts


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
