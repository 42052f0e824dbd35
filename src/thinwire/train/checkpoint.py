"""Checkpoints: one safetensors file a member and step, written whole or not at all, and checked when read.

    FOLDER/checkpoints/step-00000100/member-0.safetensors

Tensors lie in the file as they are; everything else (numbers, lists, names) is JSON in its metadata, where a tensor is
{"tensor": NAME}. Nothing is pickled. A step counts once all members have its file; older ones are removed then.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from thinwire.errors import ConfigError
from thinwire.packing import pack, raw, unpack

FORMAT = "thinwire-member-1"
_KEEP = 2
_NO_TENSORS: Mapping[str, None] = defaultdict(lambda: None)
_STEP, _MEMBER = re.compile(r"step-(\d+)"), re.compile(r"member-(\d+)\.safetensors")


def save(folder: Path, step: int, rank: int, state: Mapping[str, Any]) -> Path:
    """Write a member's state; an older checkpoint is removed only after the new one is safe.

    state   nested dicts (string or integer keys) and lists of tensors, numbers, strings and None
    raises  ConfigError for anything else in it; OSError as the file system says it; nothing is left behind then, and
            older checkpoints stand
    """
    path = file_of(folder, step, rank)
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_pack(state, tensors), allow_nan=True)
    metadata = {"format": FORMAT, "step": str(step), "state": tree, "digest": digest(tensors, tree)}
    write_whole(path, tensors, metadata)
    for old in sorted(steps(folder, rank))[:-_KEEP]:
        file_of(folder, old, rank).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty yet, or another member was faster
            file_of(folder, old, rank).parent.rmdir()
    return path


def load(folder: Path, step: int, rank: int) -> dict[str, Any]:
    """Read it back, checked against its digest.

    raises  ConfigError if it is missing, of another format or damaged
    """
    path = file_of(folder, step, rank)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, str(error)) from error
    if metadata.get("format") != FORMAT:
        raise _unreadable(path, f"format {metadata.get('format')!r}")
    if metadata.get("digest") != digest(tensors, metadata.get("state", "")):
        raise _unreadable(path, "its digest does not match: it was changed or damaged")
    state: dict[str, Any] = unpack(json.loads(metadata["state"]), tensors)
    return state


def summary(path: Path) -> tuple[dict[str, Any], str]:
    """A member's state without its tensors, which are None, and the digest that the file notes: read, not checked.

    raises  ConfigError if it is no member's checkpoint
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, str(error)) from error
    if metadata.get("format") != FORMAT:
        raise _unreadable(path, f"format {metadata.get('format')!r}")
    state: dict[str, Any] = unpack(json.loads(metadata["state"]), _NO_TENSORS)
    return state, metadata.get("digest", "")


def write_whole(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file whole or not at all; one of this name is replaced only once the new one is safe.

    raises  OSError as the file system says it; nothing is left behind then
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        save_file(tensors, partial, metadata)
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, SafetensorError):  # how safetensors reports a full disk
            raise OSError(str(error)) from error
        raise


def digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """128 bits of the text and of all tensors' bytes, in the order of their names."""
    state = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(tensors):
        state.update(raw(tensors[name]))
    return state.hexdigest()


def file_of(folder: Path, step: int, rank: int) -> Path:
    """Where a member's state of a step lies."""
    return folder / "checkpoints" / f"step-{step:08d}" / f"member-{rank}.safetensors"


def all_steps(folder: Path) -> dict[int, tuple[int, ...]]:
    """Steps in ascending order, with the members that have a file of each."""
    found: dict[int, list[int]] = {}
    for path in folder.glob("checkpoints/*/member-*.safetensors"):
        step, member = _STEP.fullmatch(path.parent.name), _MEMBER.fullmatch(path.name)
        if step and member:
            found.setdefault(int(step.group(1)), []).append(int(member.group(1)))
    return {step: tuple(sorted(found[step])) for step in sorted(found)}


def steps(folder: Path, rank: int) -> set[int]:
    """Steps of which this member has a file."""
    found = (_STEP.fullmatch(path.parent.name) for path in folder.glob(f"checkpoints/*/member-{rank}.safetensors"))
    return {int(match.group(1)) for match in found if match}


def _unreadable(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{path}: {why}",
        expected=f"a checkpoint of format {FORMAT}",
        mend="resume from an earlier step: remove this step's folder on all members",
    )


def _pack(state: Mapping[str, Any], tensors: dict[str, Tensor]) -> Any:
    """Values without tensors; copies of these are put into `tensors`, under their number."""

    def keep(place: str, tensor: Tensor) -> str:
        name = str(len(tensors))
        tensors[name] = tensor.detach().cpu().clone().contiguous()
        return name

    return pack(state, keep, what="a checkpoint")
