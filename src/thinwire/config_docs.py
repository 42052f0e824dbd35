"""Writes docs/configuration.md from the dataclasses: `python -m thinwire.config_docs > docs/configuration.md`."""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping
from dataclasses import MISSING
from typing import Any, Literal, Union, get_args, get_origin

import tomli_w

from thinwire.config import LINKS, Run
from thinwire.options import Option, Options, of_dataclass, plain
from thinwire.train import TASKS
from thinwire.train.optimizer import OptimizerOptions
from thinwire.units import Duration, Rate, Size

_INTRODUCTION = """\
# Configuration of a run

Written by `python -m thinwire.config_docs`; change the dataclasses in `thinwire/config.py` and `thinwire/train/`, not
this file.

A run is a TOML file:

```toml
steps = 400

[task]
name = "text"
data = "corpus.txt"

[optimizer]
name = "AdamW"
lr = 2e-3
weight_decay = 0.1

[method]
name = "diloco"

[link]
kind = "simulated"
rate = "20mbit"
delay = "40ms"
```

Everything has a default, except where a table says otherwise. On the command line every key is a flag by its dotted
name (`--optimizer.lr 1e-3`, `--link.rate=5mbit`), or by the last part alone where only one section has it
(`--lr 1e-3`). `--tied` and `--no-tied` switch what is true or false. A list is written `0.9,0.95`. The name of a
section chooses (`--method diloco`); choosing another task, method or link starts its options anew, choosing another
optimizer those that are its own.

Quantities have units: rates `bit`, `kbit`, `mbit`, `gbit` (per second) or `MB/s`, sizes `B`, `kB`, `MB`, `GB`, `KiB`,
`MiB`, `GiB`, times `us`, `ms`, `s`, `min`, `h`, `d`. The word `none` is no value, where that is allowed.
"""

_USER_TASKS = """\
### name = "module:function"

A function of your own that returns a task (see `thinwire.train.tasks.Task`). The module is looked for in the current
directory too. The other keys are the function's keyword arguments, which need annotations or defaults; a parameter
`seed` gets the run's seed.
"""

_OPTIMIZERS = """\
## [optimizer]

`name` (default `AdamW`) is a class of `torch.optim` that steps without a closure. Beside the keys below, the
class's own arguments are keys too: `weight_decay`, `betas`, `momentum`, ... Three treat a matrix as one thing, and have
the keys of their function in `thinwire.train.layerwise`: `Muon` (embeddings, the head, norms and biases go to AdamW),
`LAMB` and `LARS` (extra `optimizers`; biases and norms are left out of decay and ratio).
"""

_METHODS = """\
## [method]

`name` (default `diloco`) is a named method; the other keys are the arguments of its function in `thinwire.methods`.
Codecs are written as expressions: `codec = "topk(1/64) | int4"`. `just_one_byte` is no method of six answers but a
recipe of [seeds and scalars](seeds.md): of `[optimizer]` it takes the learning rate, its schedule and `accumulate`.
"""

_WORDS: Mapping[Any, str] = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    type(None): "none",
    Duration: "time",
    Rate: "rate",
    Size: "size",
}


def markdown() -> str:
    """The whole file."""
    parts = [_INTRODUCTION, "## The run\n", _markdown_table(of_dataclass(Run))]
    parts.append("## [task]\n\n`name` (default `text`) says what is trained; the other keys depend on it.\n")
    for name, task in TASKS.items():
        parts += [f'### name = "{name}"\n', f"{inspect.getdoc(task)}\n", _markdown_table(of_dataclass(task))]
    parts += [_USER_TASKS, _OPTIMIZERS, _markdown_table(of_dataclass(OptimizerOptions)), _METHODS]
    parts.append("## [link]\n\n`kind` (default `torch`) says what carries the bytes; the other keys depend on it.\n")
    for name, link in LINKS.items():
        parts += [f'### kind = "{name}"\n', f"{inspect.getdoc(link)}\n", _markdown_table(of_dataclass(link))]
    return "\n".join(parts)


def _markdown_table(options: Options) -> str:
    rows = [
        f"| `{option.name}` | {_kind_words(option.kind)} | {_default_words(option)} | {option.help} |"
        for option in options.values()
    ]
    return "\n".join(["| key | value | default | |", "|---|---|---|---|", *rows, ""])


def _kind_words(kind: Any) -> str:
    """A type in words."""
    if get_origin(kind) is Literal:
        return " or ".join(f'`"{choice}"`' for choice in get_args(kind))
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_kind_words(each) for each in get_args(kind))
    if get_origin(kind) is tuple:
        return f"list: {_kind_words(get_args(kind)[0])}"
    return _WORDS[kind]


def _default_words(option: Option) -> str:
    if option.default is MISSING:
        return "must be given"
    if option.default is None:
        return "none"
    return f"`{tomli_w.dumps({'x': plain(option.default)}).removeprefix('x = ').strip()}`"


if __name__ == "__main__":
    print(markdown(), end="")
