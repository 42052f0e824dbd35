"""From base and log to the model: in memory, or from file to file with a few tensors at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from thinwire.errors import ConfigError, StateMismatch
from thinwire.packing import raw
from thinwire.seeds import noise
from thinwire.seeds.digests import Digest, Spec, ascending, digest, spec
from thinwire.seeds.directions import apply_all_
from thinwire.seeds.log import Log, check_specs, updates
from thinwire.seeds.recipe import Recipe
from thinwire.seeds.updates import Update

_TOGETHER = 1 << 26  # bytes of tensors that are held at a time, or the largest one and less than that


def rebuild(tensors: Mapping[str, Tensor], log: Log) -> None:
    """Turn the base into the model, in place.

    tensors  name -> tensor, at least those that were tuned
    raises   ConfigError for another base, before anything is written; StateMismatch if what comes out is not what the
             log says came out
    """
    check_base(tensors, log)
    apply([(name, tensors[name]) for name in log.tensors], list(updates(log)), log.recipe)
    check_result(log, digest((name, tensors[name]) for name in log.tensors))


def apply(pairs: Sequence[tuple[str, Tensor]], made: Sequence[Update], recipe: Recipe) -> None:
    """Updates to tensors, in place, as the recipe has them made and rounded."""
    apply_all_(pairs, made, noise.parse(recipe.noise), rounding=recipe.rounding, key=recipe.seed)


def check_base(tensors: Mapping[str, Tensor], log: Log) -> None:
    """Whether these are the weights that the log starts from; each tensor is asked for once.

    raises  ConfigError naming what is missing, or both digests
    """
    for specs, due, whose in ((log.tensors, log.base, "tuned"), (log.frozen, log.rest, "frozen")):
        found: dict[str, Spec] = {}
        state = Digest()
        missing = specs.keys() - set(tensors)
        for name, tensor in ascending(tensors, specs.keys() - missing):
            found[name] = spec(tensor)
            state.add(name, tensor)
        check_specs(specs, found, "the base")
        if specs and state.hex() != due:
            raise ConfigError(
                f"the base is another one: the digest of its {whose} tensors is {state.hex()}",
                expected=f"digest {due}, of the weights that the run started from",
                mend="give those weights to the bit: in the same dtype, and not trained since",
            )


def check_result(log: Log, found: str) -> None:
    """Raises StateMismatch if the log's last digest is another one."""
    if log.result not in (None, found):
        raise StateMismatch(
            f"what was rebuilt from {len(log.rounds)} rounds has the digest {found}",
            expected=f"digest {log.result}, which the log has of the run's own model",
            mend="`thinwire replay FILE --base BASE` says at which round they part; if the run wrote it right, this "
            "machine or its PyTorch rounds in another way: please report it",
        )


@dataclass(frozen=True)
class Check:
    """A digest that was noted in a run, and that of what the log gives.

    rounds  taken in before it
    """

    rounds: int
    noted: str
    found: str


def audit(tensors: Mapping[str, Tensor], log: Log) -> list[Check]:
    """Replay a log on its base and compare at every digest that it has; `tensors` stay as they are.

    Each tensor is asked for twice; the largest and 64 MiB of others are held at a time.
    """
    check_base(tensors, log)
    made = list(updates(log))
    numbers = sorted(log.checks)
    until = {number: number for number in numbers} | {len(log.rounds): len(made)}  # of a pool one update, in no round
    states = {number: Digest() for number in numbers}
    for pairs in _copies(tensors, log.tensors):
        done = 0
        for number in numbers:
            apply(pairs, made[done : until[number]], log.recipe)
            for name, work in pairs:
                states[number].add(name, work)
            done = until[number]
    return [Check(number, log.checks[number], states[number].hex()) for number in numbers]


def rebuild_file(log: Log, base: Path, out: Path) -> str:
    """Write the model beside its base's other tensors, which are copied as they are.

    Memory for the largest tensor, 64 MiB of others, and the updates.

    base     a safetensors file, or a folder with model.safetensors
    out      written whole or not at all
    returns  digest of the tuned tensors
    raises   ConfigError for another base, StateMismatch for another result
    """
    base = weights_in(base)
    if out.is_dir():
        raise ConfigError(
            f"{out} is a folder", expected="a file to write", mend=f"--out {out / 'model.safetensors'}"
        )  # fmt: skip
    if out.exists() and out.samefile(base):
        raise ConfigError(f"{out} is the base itself", expected="another file to write", mend="--out tuned.safetensors")
    made = list(updates(log))
    with Stored(base, log.aliases) as tensors:
        check_base(tensors, log)
        places = _places(base)
        partial = out.with_name(out.name + ".partial")
        try:
            shutil.copyfile(base, partial)
            state = Digest()
            with partial.open("r+b") as file:
                for pairs in _copies(tensors, log.tensors):
                    apply(pairs, made, log.recipe)
                    for name, work in pairs:
                        state.add(name, work)
                        for alias in tensors.names(name):
                            file.seek(places[alias])
                            file.write(raw(work))
                os.fsync(file.fileno())
            check_result(log, state.hex())
            os.replace(partial, out)
        finally:
            partial.unlink(missing_ok=True)
    return state.hex()


def _copies(tensors: Mapping[str, Tensor], names: Iterable[str]) -> Iterator[list[tuple[str, Tensor]]]:
    """Copies of tensors in the order of digests, small ones together: they are replayed at the price of one."""
    pairs: list[tuple[str, Tensor]] = []
    for name, tensor in ascending(tensors, names):
        pairs.append((name, tensor.clone()))
        if sum(each.numel() * each.element_size() for _, each in pairs) >= _TOGETHER:
            yield pairs
            pairs = []
    if pairs:
        yield pairs


class Stored(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for.

    aliases  other names of a tensor: it is found by its own name if only one of them is in the file
    raises   ConfigError if the file cannot be read
    """

    def __init__(self, path: Path, aliases: Mapping[str, str] | None = None) -> None:
        path = weights_in(path)
        try:
            self._file = cast(Any, safe_open(path, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"{path}: {error}",
                expected="weights as a safetensors file, or a folder with model.safetensors",
                mend="write them with save_file of safetensors.torch, under the names of the model's parameters",
            ) from error
        self._held: set[str] = set(self._file.keys())
        self._names: dict[str, list[str]] = {name: [name] for name in self._held}
        for alias, name in sorted((aliases or {}).items()):
            if alias in self._held:
                self._names.setdefault(name, []).append(alias)

    def names(self, name: str) -> list[str]:
        """All names under which the file has a tensor."""
        return self._names[name]

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(self._names[name][0])
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __enter__(self) -> Stored:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.__exit__(None, None, None)


def weights_in(path: Path) -> Path:
    """The file itself, or the one in a folder."""
    return path / "model.safetensors" if path.is_dir() else path


def _places(path: Path) -> dict[str, int]:
    """Where in a safetensors file each tensor's bytes begin: 8 bytes of length, that much JSON, then the tensors."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {name: 8 + length + told["data_offsets"][0] for name, told in header.items() if name != "__metadata__"}
