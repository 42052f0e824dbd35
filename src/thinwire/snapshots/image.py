"""A training state as one run of bytes, written in pieces: a safetensors file in memory.

    8 bytes        length of the header, little-endian
    header         JSON: name -> dtype, shape, place; under "__metadata__" what is not a tensor; padded with spaces
    tensors        end to end, those of wide elements first

Written here, since safetensors' own `save` makes the whole file at once: a second copy of the state, in one stall. Read
by safetensors. Nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from thinwire.errors import PacketError
from thinwire.packing import cannot_hold, pack, unpack
from thinwire.snapshots.erasure import Bytes

PIECE_BYTES = 4 << 20
_PAGE = 4096  # what headers are padded to: counters that get longer do not change the size of the image
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


@dataclass(frozen=True)
class Image:
    """What is to be written, and where: `tensors` are the live ones, by their name in the file, in its order."""

    header: bytes
    tensors: Mapping[str, Tensor]

    @property
    def size(self) -> int:
        """Bytes of all of it."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors.values())

    def write(self, memory: Bytes) -> Iterator[int]:
        """Copy piece by piece; yields the bytes of each after it is there.

        memory  uint8 [size]
        """
        memory[: len(self.header)] = memoryview(self.header)
        place = len(self.header)
        out = torch.from_numpy(memory)
        for tensor in self.tensors.values():
            source = tensor.detach().reshape(-1).view(torch.uint8)  # a copy where the tensor is not contiguous
            for start in range(0, len(source), PIECE_BYTES):
                piece = source[start : start + PIECE_BYTES]
                out[place : place + len(piece)].copy_(piece)
                place += len(piece)
                yield len(piece)


def image_of(state: Mapping[str, Any]) -> Image:
    """The image of nested dicts (string or integer keys) and lists of tensors, numbers, strings and None.

    No tensor is copied yet. Raises ConfigError for what a file cannot hold.
    """
    tensors: dict[str, Tensor] = {}

    def keep(place: str, tensor: Tensor) -> str:
        if tensor.dtype not in _NAMES:
            raise cannot_hold("a snapshot", place, str(tensor.dtype))
        tensors[place] = tensor
        return place

    tree = json.dumps(pack(state, keep, what="a snapshot"))
    # Names alone keep the order of equal widths: it must not depend on the order of a dict that was rebuilt.
    ordered = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    table: dict[str, Any] = {"__metadata__": {"state": tree}}
    place = 0
    for name in ordered:
        tensor = tensors[name]
        stop = place + tensor.nbytes
        table[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, stop]}
        place = stop
    text = json.dumps(table).encode()
    text += b" " * (-(len(text) + 8) % _PAGE)
    return Image(len(text).to_bytes(8, "little") + text, {name: tensors[name] for name in ordered})


def state_of(image: Bytes) -> dict[str, Any]:
    """The inverse: the state, in memory of its own. PacketError for bytes that are no image."""
    raw = image.tobytes()
    try:
        tensors = load(raw)
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        state: dict[str, Any] = unpack(json.loads(header["__metadata__"]["state"]), tensors)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise PacketError(f"{len(raw)} bytes are not the image of a state: {error}") from error
    return state
