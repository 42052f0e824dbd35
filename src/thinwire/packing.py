"""Nested states as a tree that JSON can write, and the tensors that were in it by name; and back. Nothing is pickled.

    {"step": 3, 0: [tensor, None]}   <->   {"items": [["step", 3], [0, [{"tensor": NAME}, None]]]},  {NAME: tensor}

Checkpoints, snapshots and states handed to newcomers are written this way; where the tensors' bytes go, and under which
names, is theirs to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from thinwire.errors import ConfigError

T = TypeVar("T")


def pack(value: Any, keep: Callable[[str, Tensor], str], *, what: str, at: str = "") -> Any:
    """A state's tree, without its tensors.

    value   nested dicts (string or integer keys) and lists of tensors, numbers, strings, booleans and None
    keep    (place, tensor) -> the name that it is kept under; a place is where in the state it is: "/'model'/3"
    what    it is packed for, as error messages say it: "a snapshot"
    raises  ConfigError for anything else, naming the place
    """
    if isinstance(value, Tensor):
        return {"tensor": keep(at, value)}
    if isinstance(value, Mapping):
        # Keys of an optimizer's state are integers, which JSON does not have: pairs keep them apart.
        return {"items": [[key, pack(item, keep, what=what, at=f"{at}/{key!r}")] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [pack(item, keep, what=what, at=f"{at}/{index}") for index, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise cannot_hold(what, at, type(value).__name__)


def unpack(tree: Any, tensors: Mapping[str, T]) -> Any:
    """The inverse: nested dicts and lists, with `tensors[NAME]` where a tensor was; a tuple comes back as a list."""
    if isinstance(tree, dict) and "tensor" in tree:
        return tensors[tree["tensor"]]
    if isinstance(tree, dict):
        return {key: unpack(item, tensors) for key, item in tree["items"]}
    return [unpack(item, tensors) for item in tree] if isinstance(tree, list) else tree


def raw(tensor: Tensor) -> memoryview:
    """A tensor's bytes, row after row: a view where it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def cannot_hold(what: str, at: str, found: str) -> ConfigError:
    """What is said of a value that has no place in a state."""
    return ConfigError(
        f"{what} cannot hold {at or 'a state'}: {found}",
        expected="nested dicts and lists of tensors, numbers, strings and None",
        mend="leave it out, or turn it into one of these",
    )
