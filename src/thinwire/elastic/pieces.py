"""A state as a manifest and pieces: what a newcomer lacks can be asked of anybody who has it, piece by piece.

Each tensor's raw bytes are cut into pieces of 4 MiB (the last one may be shorter), and a piece goes by its SHA-256. So
a tensor that did not change keeps its pieces, equal tensors share them, and it does not matter who sends one, or when.
The manifest says which pieces make which tensors, and holds what is not a tensor. It is canonical JSON

    {"format": "thinwire-state-1", "tensors": [[dtype, shape, [digest, ...]], ...], "tree": ...}

with the tree of packing.py, dicts in the order of their keys (integers first), tensors numbered as they come in it:
equal states have equal manifests, to the bit. It goes by its SHA-256 too. SHA-256 rather than BLAKE2b because
processors have instructions for it (1.6 GB/s against 0.8 on the machine this was written on).

Trust  whoever gives the manifest's digest is believed; all else is checked against it. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from thinwire.errors import ConfigError, PacketError
from thinwire.packing import cannot_hold, pack, raw, unpack

FORMAT = "thinwire-state-1"
PIECE_BYTES = 4 << 20
MANIFEST_BYTES = 16 << 20  # 400 GB of state, in pieces of full size
STATE_BYTES = 1 << 38
_DIGEST = re.compile("[0-9a-f]{64}")
_DEPTH = 64
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Cut:
    """A tensor as its pieces: what it is, and their digests in the order of its bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    digests: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def sizes(self) -> list[int]:
        """Bytes of each piece."""
        return [min(PIECE_BYTES, self.nbytes - start) for start in range(0, self.nbytes, PIECE_BYTES)]


@dataclass(frozen=True)
class Manifest:
    """What a state consists of. Made by `cut` or `parse`."""

    tree: Any
    cuts: tuple[Cut, ...]

    @cached_property
    def text(self) -> bytes:
        """As it is sent."""
        tensors = [[_name(each.dtype), list(each.shape), list(each.digests)] for each in self.cuts]
        return _canonical({"format": FORMAT, "tensors": tensors, "tree": self.tree})

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the text: equal if and only if the states are."""
        return digest_of(self.text)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Digest -> bytes of all pieces, in the order in which they come; equal ones once."""
        return {digest: size for each in self.cuts for digest, size in zip(each.digests, each.sizes(), strict=True)}


@dataclass(frozen=True)
class Pieces:
    """A manifest, and where its pieces lie in tensors that are here (and must stay as they are)."""

    manifest: Manifest
    views: Mapping[str, memoryview]


def cut(state: Mapping[str, Any]) -> Pieces:
    """The pieces of a state: nested dicts (string or integer keys) and lists of tensors, numbers, strings and None.

    Tensors on the CPU are not copied. Raises ConfigError for what a state cannot hold, or too much of it.
    """
    tensors: list[Tensor] = []

    def keep(place: str, tensor: Tensor) -> str:
        if _DTYPES.get(_name(tensor.dtype)) is None or tensor.layout != torch.strided:
            raise cannot_hold("a state for newcomers", place, f"{tensor.dtype}, {tensor.layout}")
        tensors.append(tensor)
        return str(len(tensors) - 1)

    tree = pack(_ordered(state, ""), keep, what="a state for newcomers")
    views: dict[str, memoryview] = {}
    cuts = []
    for tensor in tensors:
        whole = raw(tensor)
        pieces = [whole[start : start + PIECE_BYTES] for start in range(0, len(whole), PIECE_BYTES)]
        digests = tuple(map(digest_of, pieces))
        views.update(zip(digests, pieces, strict=True))
        cuts.append(Cut(tensor.dtype, tuple(tensor.shape), digests))
    manifest = Manifest(tree, tuple(cuts))
    if len(manifest.text) > MANIFEST_BYTES:
        raise ConfigError(
            f"a state whose manifest has {len(manifest.text)} bytes", expected=f"at most {MANIFEST_BYTES}",
            mend="hold long lists of numbers in tensors: those are sent in pieces, and only where they changed",
        )  # fmt: skip
    return Pieces(manifest, views)


def digest_of(piece: bytes | memoryview) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(piece).hexdigest()


def parse(text: bytes | memoryview, *, most_bytes: int = STATE_BYTES) -> Manifest:
    """A manifest that came from somebody else; all it says is checked against the rest before any of it is believed.

    most_bytes  of the state, at most
    raises      PacketError saying what cannot be right
    """
    if len(text) > MANIFEST_BYTES:
        raise PacketError(f"a manifest of {len(text)} bytes", expected=f"at most {MANIFEST_BYTES}")
    try:
        told = json.loads(bytes(text).decode("ascii"))
        canonical = _canonical(told)
    except (ValueError, RecursionError) as error:
        raise PacketError(f"a manifest that is no JSON: {error}", expected="canonical JSON") from error
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise PacketError(
            f"a state of format {str(told.get('format'))[:40]!r}" if isinstance(told, dict) else "no manifest",
            expected=f"format {FORMAT!r}", mend="install the same version of thinwire on all members",
        )  # fmt: skip
    if told.keys() != {"format", "tensors", "tree"} or canonical != text:
        raise PacketError("a manifest that is not written as thinwire writes it", expected="canonical JSON")
    if not isinstance(told["tensors"], list):
        raise PacketError("a manifest without a list of tensors", expected="[dtype, shape, digests] for each")
    cuts = tuple(_cut_of(number, entry) for number, entry in enumerate(told["tensors"]))
    if (total := sum(each.nbytes for each in cuts)) > most_bytes:
        raise PacketError(f"a state of {total} bytes", expected=f"at most {most_bytes}")
    met: list[str] = []
    _check_tree(told["tree"], met, 0)
    if met != [str(number) for number in range(len(cuts))]:
        raise PacketError(f"a tree with {len(met)} tensors, not the {len(cuts)} that the manifest tells of, in order")
    sizes: dict[str, int] = {}
    for each in cuts:
        for digest, size in zip(each.digests, each.sizes(), strict=True):
            if sizes.setdefault(digest, size) != size:
                raise PacketError(f"piece {digest[:12]} with {sizes[digest]} bytes and with {size}")
    return Manifest(told["tree"], cuts)


class Assembly:
    """A state that is being put together from pieces, in any order."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._buffers = [torch.empty(each.nbytes, dtype=torch.uint8) for each in manifest.cuts]
        self._places: dict[str, list[memoryview]] = {}
        for each, buffer in zip(manifest.cuts, self._buffers, strict=True):
            whole = buffer.numpy().data
            for number, digest in enumerate(each.digests):
                piece = whole[number * PIECE_BYTES : (number + 1) * PIECE_BYTES]
                self._places.setdefault(digest, []).append(piece)

    @property
    def missing(self) -> dict[str, int]:
        """Digest -> bytes of the pieces that are not there yet."""
        return {digest: self._manifest.sizes[digest] for digest in self._places}

    def put(self, digest: str, piece: bytes | memoryview) -> None:
        """A piece is here, checked against its digest (`check`)."""
        for place in self._places.pop(digest, ()):
            place[:] = piece

    def state(self) -> dict[str, Any]:
        """The whole, once nothing is missing; in memory of its own."""
        assert not self._places
        pairs = zip(self._manifest.cuts, self._buffers, strict=True)
        tensors = {str(n): buffer.view(each.dtype).reshape(each.shape) for n, (each, buffer) in enumerate(pairs)}
        state: dict[str, Any] = unpack(self._manifest.tree, tensors)
        return state


def check(digest: str, size: int, piece: bytes | memoryview) -> None:
    """PacketError unless a piece is the one that goes by this digest."""
    if len(piece) != size:
        raise PacketError(f"piece {digest[:12]} came with {len(piece)} bytes", expected=f"{size} bytes")
    if digest_of(piece) != digest:
        raise PacketError(
            f"piece {digest[:12]} was changed on the way: its digest does not match",
            expected="the bytes that the manifest names",
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _place_of(key: Any) -> tuple[bool, Any]:
    """Integers first, then strings."""
    return isinstance(key, str), key


def _is_key(key: Any) -> bool:
    return isinstance(key, str | int) and not isinstance(key, bool)


def _ordered(value: Any, at: str) -> Any:
    """The same value, dicts in the order of their keys: members that built them in another order hold the same."""
    if isinstance(value, Mapping):
        if strange := [key for key in value if not _is_key(key)]:
            raise cannot_hold("a state for newcomers", at, f"a key of type {type(strange[0]).__name__}")
        return {key: _ordered(value[key], f"{at}/{key!r}") for key in sorted(value, key=_place_of)}
    if isinstance(value, list | tuple):
        return [_ordered(item, f"{at}/{index}") for index, item in enumerate(value)]
    return value


def _cut_of(number: int, entry: Any) -> Cut:
    """One entry of the list of tensors, after every number in it was compared with the others."""
    if not (isinstance(entry, list) and len(entry) == 3 and isinstance(entry[1], list) and isinstance(entry[2], list)):
        raise PacketError(f"tensor {number} is not told as [dtype, shape, digests]")
    name, shape, digests = entry
    dtype = _DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise PacketError(f"tensor {number} is of type {str(name)[:40]!r}", expected=", ".join(_DTYPES))
    if not all(type(n) is int and n >= 0 for n in shape) or math.prod(max(1, n) for n in shape) > STATE_BYTES:
        raise PacketError(f"tensor {number} has shape {str(shape)[:80]}", expected="whole numbers, not too large")
    if not all(isinstance(digest, str) and _DIGEST.fullmatch(digest) for digest in digests):
        raise PacketError(f"tensor {number} has a piece without a digest", expected="64 hexadecimal digits for each")
    made = Cut(dtype, tuple(shape), tuple(digests))
    if len(digests) != -(-made.nbytes // PIECE_BYTES):
        raise PacketError(
            f"tensor {number} of {made.nbytes} bytes has {len(digests)} pieces",
            expected=f"{-(-made.nbytes // PIECE_BYTES)} pieces of {PIECE_BYTES} bytes",
        )
    return made


def _check_tree(node: Any, met: list[str], depth: int) -> None:
    """PacketError unless a tree is one that `pack` can have made; the names of its tensors go to `met`."""
    if depth > _DEPTH:
        raise PacketError(f"a tree of more than {_DEPTH} levels")
    if isinstance(node, list):
        for item in node:
            _check_tree(item, met, depth + 1)
    elif isinstance(node, dict) and node.keys() == {"tensor"} and isinstance(node["tensor"], str):
        met.append(node["tensor"])
    elif isinstance(node, dict):
        items = node.get("items")
        pairs = isinstance(items, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in items)
        if node.keys() != {"items"} or not pairs or not all(_is_key(key) for key, _ in items or ()):
            raise PacketError("a tree with a dict that is no list of keys and values")
        keys = [_place_of(key) for key, _ in items or ()]
        if any(one >= after for one, after in pairwise(keys)):
            raise PacketError("a tree with keys out of order, or twice")
        for _, item in items or ():
            _check_tree(item, met, depth + 1)
