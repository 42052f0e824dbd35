"""One number for the tensors of a model: names, shapes, dtypes and bytes, whatever order they come in.

BLAKE2b of 16 bytes, personalised "thinwire model", of the tensors in ascending order of name (as UTF-8): for each the
length of its name (varint), the name; the length of its dtype's (varint), that name, as torch has it ("float32"); the
number of dimensions and each of them (varints); its elements, row after row, little-endian.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from thinwire.packing import raw
from thinwire.seeds.reading import varint

#: dtype, as torch names it, and shape.
Spec = tuple[str, tuple[int, ...]]


class Digest:
    """A digest under way: tensors are added one by one and need not be there together."""

    def __init__(self) -> None:
        self._state = hashlib.blake2b(digest_size=16, person=b"thinwire model")
        self._last = ""

    def add(self, name: str, tensor: Tensor) -> None:
        """The next tensor in ascending order of name."""
        assert name.encode() > self._last.encode() or not self._last
        self._last = name
        dtype, shape = spec(tensor)
        for word in (name, dtype):
            self._state.update(varint(len(word.encode())) + word.encode())
        self._state.update(b"".join(map(varint, (len(shape), *shape))))
        self._state.update(raw(tensor))

    def hex(self) -> str:
        """32 hexadecimal digits."""
        return self._state.hexdigest()


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Digest of named tensors, 32 hexadecimal digits."""
    held = dict(tensors)
    state = Digest()
    for name, tensor in ascending(held, held):
        state.add(name, tensor)
    return state.hex()


def ascending(tensors: Mapping[str, Tensor], names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Tensors in the order of digests; each is asked for when it is due."""
    return ((name, tensors[name]) for name in sorted(names, key=str.encode))


def spec(tensor: Tensor) -> Spec:
    """What a tensor is, apart from its elements."""
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
