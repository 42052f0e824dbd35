"""Where the weights of a model lie that is larger than its device's memory: fetched by name, and put back.

A file is read and written, not mapped: what is in memory is what was fetched, and nothing else counts as the process's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from thinwire.errors import ConfigError, PacketError
from thinwire.packing import raw

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
           "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
           "BOOL": torch.bool}  # fmt: skip


class Shelf(Protocol):
    """Named tensors on the host or on a disk."""

    @property
    def names(self) -> tuple[str, ...]:
        """What there is."""

    def get(self, name: str) -> Tensor:
        """A tensor, on the CPU: the shelf's own memory, or memory that nobody else has."""

    def put(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor of the same dtype and shape in its place."""


class HostShelf:
    """Tensors in the host's memory.

    tensors  by name, e.g. `model.state_dict()`; they are written in place
    pinned   copy them once to memory that a GPU reads directly; then `tensors` themselves are not written
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, pinned: bool = False) -> None:
        self._held = {
            name: tensor.detach().pin_memory() if pinned else tensor.detach() for name, tensor in tensors.items()
        }

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._held)

    def get(self, name: str) -> Tensor:
        return self._held[name]

    def put(self, name: str, tensor: Tensor) -> None:
        if tensor.data_ptr() != self._held[name].data_ptr():
            self._held[name].copy_(tensor)


class FileShelf:
    """A safetensors file, read and written in place. A crash in the middle of a step leaves it between two steps: keep
    the base, which the log makes it from.

    raises  ConfigError if the file is none, or is cut off
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._entries = _entries(self._path)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def get(self, name: str) -> Tensor:
        dtype, shape, start, stop = self._entries[name]
        tensor = torch.empty(shape, dtype=dtype)
        with self._path.open("rb", buffering=0) as file:
            file.seek(start)
            view, done = raw(tensor), 0
            while done < stop - start:
                read = file.readinto(view[done:])
                if not read:
                    raise PacketError(f"{self._path} ends within {name!r}", expected=f"{stop} bytes or more")
                done += read
        return tensor

    def put(self, name: str, tensor: Tensor) -> None:
        _, _, start, stop = self._entries[name]
        with self._path.open("r+b") as file:
            file.seek(start)
            written = file.write(raw(tensor))
        assert written == stop - start


def _entries(path: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], int, int]]:
    """Name -> dtype, shape, first byte and the byte after the last, from the header."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header: dict[str, Any] = json.loads(file.read(min(length, size)))
            header.pop("__metadata__", None)
            found = {
                name: (
                    _DTYPES[entry["dtype"]],
                    tuple(entry["shape"]),
                    *(8 + length + at for at in entry["data_offsets"]),
                )
                for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{path} has no header of a safetensors file", expected="a .safetensors file of dense tensors",
                mend="write one with safetensors.torch.save_file",
            ) from error  # fmt: skip
    last = max((entry[3] for entry in found.values()), default=0)
    if size < last:
        raise ConfigError(
            f"{path} has {size} bytes",
            expected=f"{last} bytes, as its header says",
            mend="copy the file again: it is cut off",
        )
    return found
