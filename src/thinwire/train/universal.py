"""Universal checkpoints: one record a parameter, bound to no number of members, method, codec or optimizer.

    NAME.safetensors: tensors NAME/value, NAME/outer/KEY, NAME/inner/KEY; JSON in the metadata: head, records, digest

A file is written whole or not at all. Each record has a digest of its own, which names it when it is damaged; the
digest of the whole is over the head and all records' facts, their digests among them. Nothing is pickled.

Source  one consolidated record a parameter: Lian et al. 2024, arXiv:2406.18820
Differs values lie in one file a checkpoint, not one a parameter, and are never cast: a record notes the model's dtype
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from thinwire.errors import ConfigError
from thinwire.train.checkpoint import digest, write_whole

FORMAT = "thinwire-universal-1"
_NUMBERED = re.compile(r"thinwire-universal-(\d+)")


@dataclass(frozen=True, eq=False)
class Record:
    """What a checkpoint holds of one parameter or buffer.

    role    `trained`, `frozen` or `buffer`
    value   in the parameter's shape; of a trained one of a method with anchors the anchor, float32
    dtype   the model's
    rounds  committed on it
    outer   the outer step's memory of it, by name: in its shape, or of one element for all of it
    inner   an inner optimizer's state of it: tensors, numbers and names
    """

    role: str
    value: Tensor
    dtype: str
    rounds: int = 0
    outer: Mapping[str, Tensor] = field(default_factory=dict)
    inner: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Universal:
    """A checkpoint.

    step       local steps that all members have passed
    members    of the run that it was taken from
    answers    that run's method, in words; `outer` is the outer step in force
    optimizer  of the inner state, by its name in a configuration
    position   samples of the whole group's data that are behind it
    rounds     committed and skipped
    config     the run as TOML
    history    the run's so far; samples, tokens and bytes are all members' together
    aliases    other names of tied parameters
    told       what of the members' states it does not have, and by what rule the rest was taken; sentences
    digest     of the whole; empty until it was written
    """

    step: int
    members: int
    answers: Mapping[str, str]
    outer: str
    optimizer: str
    position: int
    rounds: tuple[int, int]
    config: str
    history: Mapping[str, Any]
    aliases: Mapping[str, str]
    told: tuple[str, ...]
    records: Mapping[str, Record]
    digest: str = ""


_HEAD = (
    "step", "members", "answers", "outer", "optimizer", "position", "rounds", "config", "history", "aliases", "told"
)  # fmt: skip


def write(path: Path, made: Universal) -> str:
    """Write it; returns the digest of the whole.

    raises  ConfigError if the file is there already; OSError as the file system says it, and nothing is left then
    """
    if path.exists():
        raise ConfigError(
            f"{path} is there already", expected="a name that is free", mend="choose another one, or remove the file"
        )
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for name, record in made.records.items():
        own = _tensors(name, record)
        facts[name] = _facts(record)
        facts[name]["digest"] = digest(own, json.dumps(facts[name], sort_keys=True))
        tensors |= own
    head = json.dumps({name: getattr(made, name) for name in _HEAD})
    records = json.dumps(facts)
    whole = digest({}, head + records)
    write_whole(path, tensors, {"format": FORMAT, "head": head, "records": records, "digest": whole})
    return whole


def read(path: Path) -> Universal:
    """Read it back, every record checked against its digest.

    raises  ConfigError if it is missing, of another or a newer format, or damaged: the record is named
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_format(path, metadata.get("format"))
            head, records = metadata.get("head", ""), metadata.get("records", "")
            if metadata.get("digest") != digest({}, head + records):
                raise _damaged(path, "its list of records does not match its digest")
            present = set(file.keys())
            found: dict[str, Record] = {}
            for name, facts in json.loads(records).items():
                wanted = [key for key in _keys(name, facts) if key not in present]
                if wanted:
                    raise _damaged(path, f"record {name!r} lacks {wanted[0]}")
                found[name] = _record(path, name, facts, {key: file.get_tensor(key) for key in _keys(name, facts)})
    except (OSError, SafetensorError) as error:
        raise _damaged(path, str(error)) from error
    told = json.loads(head)
    told["rounds"], told["told"] = tuple(told["rounds"]), tuple(told["told"])
    return Universal(**told, records=found, digest=metadata["digest"])


def is_universal(path: Path) -> bool:
    """Whether a file says that it is a universal checkpoint, of whatever version."""
    try:
        with safe_open(path, framework="pt") as file:
            return _NUMBERED.fullmatch((file.metadata() or {}).get("format", "")) is not None
    except (OSError, SafetensorError):
        return False


def roles(model: nn.Module) -> dict[str, str]:
    """What each name in the model's state is: `trained`, `frozen`, `buffer`, or `=NAME` for a tied parameter."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(p), name)
        found[name] = ("trained" if p.requires_grad else "frozen") if known == name else f"={known}"
    return {name: found.get(name, "buffer") for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def _facts(record: Record) -> dict[str, Any]:
    return {
        "role": record.role,
        "dtype": record.dtype,
        "shape": list(record.value.shape),
        "rounds": record.rounds,
        "outer": sorted(record.outer),
        "inner": sorted(key for key, value in record.inner.items() if isinstance(value, Tensor)),
        "plain": {key: value for key, value in record.inner.items() if not isinstance(value, Tensor)},
    }


def _tensors(name: str, record: Record) -> dict[str, Tensor]:
    found = {f"{name}/value": record.value}
    found |= {f"{name}/outer/{key}": value for key, value in record.outer.items()}
    found |= {f"{name}/inner/{key}": value for key, value in record.inner.items() if isinstance(value, Tensor)}
    # Safetensors refuses tensors that share memory: pieces of one fragment do.
    return {key: value.detach().cpu().clone().contiguous() for key, value in found.items()}


def _keys(name: str, facts: Mapping[str, Any]) -> list[str]:
    kinds = [f"{name}/{kind}/{key}" for kind in ("outer", "inner") for key in facts[kind]]
    return [f"{name}/value", *kinds]


def _record(path: Path, name: str, facts: dict[str, Any], tensors: Mapping[str, Tensor]) -> Record:
    noted = facts.pop("digest")
    if noted != digest(tensors, json.dumps(facts, sort_keys=True)):
        raise _damaged(path, f"record {name!r} does not match its digest: it was changed or damaged")
    outer = {key: tensors[f"{name}/outer/{key}"] for key in facts["outer"]}
    inner = {key: tensors[f"{name}/inner/{key}"] for key in facts["inner"]} | facts["plain"]
    return Record(facts["role"], tensors[f"{name}/value"], facts["dtype"], facts["rounds"], outer, inner)


def _check_format(path: Path, found: str | None) -> None:
    if found == FORMAT:
        return
    numbered = _NUMBERED.fullmatch(found or "")
    if numbered and int(numbered.group(1)) > int(FORMAT.rpartition("-")[2]):
        raise ConfigError(
            f"{path}: format {found}, which is newer than this thinwire",
            expected=f"format {FORMAT}",
            mend="use the thinwire that wrote it, or a newer one",
        )
    member = (found or "").startswith("thinwire-member-")
    raise ConfigError(
        f"{path}: {'one member’s part of a checkpoint' if member else f'format {found!r}'}",
        expected=f"a universal checkpoint, format {FORMAT}",
        mend="make one of the run's folder: thinwire checkpoint convert FOLDER OUT.safetensors",
    )


def _damaged(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{path}: {why}",
        expected=f"an undamaged universal checkpoint, format {FORMAT}",
        mend="copy it anew, or convert the run's own checkpoint again: thinwire checkpoint convert FOLDER OUT",
    )
