"""Entropy coding: squeeze the bytes that another codec wrote to the entropy of what they are, without loss.

    field -> its bytes grouped by position -> runs of symbols, each with a table of frequencies -> one stream of words

A symbol is a byte, or its 4, 2 or 1 bits where packed codes are narrower: a run takes what makes it smallest, its table
included, and stays as it is where nothing makes it smaller. The decoder rebuilds the model from the integers of the
table: no logarithm and no softmax has to come out alike on two machines.

Error   that of the codec before it; none of its own.
Size    varies with the data: the entropy of each run's symbols, its table (at most 2 bytes a symbol of its alphabet
        and 34), and at most 8 bytes a field and 2^-10 of it. Never more than the field, 1 byte a run and 8 of count.
Cost    100 to 150 million symbols a second to encode, 30 million to decode, on one processor core.
Source  Duda 2013, arXiv:1311.2540 (asymmetric numeral systems); Bamler 2022, arXiv:2201.01741 (the coder we use).
Differs the table holds the counts scaled to 8 or 16 bits, whichever is smaller in sum, and not to the coder's 24.
Avoid   where the link is quicker than about 200 Mbit/s: a core decodes no faster; and on float32 values, whose lower
        bytes are noise.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from thinwire.codecs.base import Codec, require
from thinwire.codecs.lossless import Bytes, Lossless, check_left, from_planes, planes
from thinwire.codecs.options import altered, call, changed, is_whole
from thinwire.codecs.precision import fp32
from thinwire.errors import ConfigError, PacketError
from thinwire.packet import Fields, Layout

_RAW = 0  # tag of a run that is written as it is; other tags are bits a symbol | bytes a frequency << 4
_TAGS = tuple(bits | width << 4 for bits in (8, 4, 2, 1) for width in (1, 2))
_COUNT = np.dtype("<i8")
_WORD = np.dtype("<u4")
_STREAM = 8  # bytes a stream may have beyond the information in it: the coder's state
_PIECE = 1 << 17  # symbols coded in one call: the coder wants them as int32

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Rans(Lossless):
    """The bytes of `inner`'s fields, each as tables and one stream.

    inner    the codec before it
    segment  elements that share a table: less follows data that change along the vector, and costs a table each;
             0 has one table for all first bytes of a field, one for all second bytes, and so on
    """

    inner: Codec = fp32
    segment: int = 0

    def __post_init__(self) -> None:
        if not is_whole(self.segment, 0):
            raise ConfigError(
                f"rans is to have segments of {self.segment!r}",
                expected="a whole number of elements that share a table of frequencies, 0 for all of a field",
                mend="leave it out; where layers differ a lot, try rans(segment=65536)",
            )
        check_left("rans", self.inner)

    def __call__(self, segment: int | None = None) -> Rans:
        """The same codec with other segments: `rans(segment=65536)`."""
        return altered(self, segment=segment)

    @property
    def spec(self) -> str:
        return f"{self.inner.spec} | {call('rans', **changed(self, 'segment'))}"

    def layout(self, n: int) -> Layout:
        return {name: (torch.uint8, self._bound(*due)) for name, due in self.inner.layout(n).items()}

    def _bound(self, dtype: torch.dtype, count: int) -> int:
        """Bytes of the field as it is, with a tag for each run and, if its size varies, its count."""
        return dtype.itemsize * (count + self._num_runs(count)) + _COUNT.itemsize * self._counted if count else 0

    @property
    def _counted(self) -> bool:
        return not self.inner.traits.fixed_size

    def _num_runs(self, count: int) -> int:
        return -(-count // self.segment) if self.segment else 1

    def encode(self, x: Tensor, key: int) -> Fields:
        return {name: self._squeeze(field) for name, field in self.inner.encode(x, key).items()}

    def _runs(self, count: int) -> Iterator[slice]:
        step = self.segment or count
        return (slice(start, min(start + step, count)) for start in range(0, count, step))

    def _squeeze(self, field: Tensor) -> Tensor:
        """Heads of the runs, then the words of the stream.  uint8 [varies], on the field's device"""
        if not field.numel():
            return torch.empty(0, dtype=torch.uint8, device=field.device)
        runs = [row[run] for row in planes(field) for run in self._runs(field.numel())]
        models = [_model_of(run) for run in runs]
        written = self._write(runs, models)
        if len(written) > sum(len(run) + 1 for run in runs):  # never seen: the estimates are good to a few bytes
            written = self._write(runs, [None] * len(runs))
        count = np.array([field.numel()] if self._counted else [], dtype=_COUNT).tobytes()
        return torch.frombuffer(bytearray(count + written), dtype=torch.uint8).to(field.device)

    def _write(self, runs: list[Bytes], models: list[_Model | None]) -> bytes:
        coder = _constriction().stack.AnsCoder()
        for run, model in zip(reversed(runs), reversed(models), strict=True):  # the coder is a stack
            if model is not None:
                model.push(coder, run)
        heads = [
            bytes([_RAW]) + run.tobytes() if model is None else model.head()
            for run, model in zip(runs, models, strict=True)
        ]
        words = np.asarray(coder.get_compressed(), dtype=_WORD)
        return b"".join([*heads, words.tobytes()])

    def unfold(self, name: str, data: Tensor, dtype: torch.dtype, most: int) -> Tensor:
        """The field of `most` elements, or at most so many; nothing is allocated that was not due."""
        reader = _Reader(name, data.cpu().numpy().tobytes())
        count = most
        if self._counted:
            count = int(np.frombuffer(reader.take(_COUNT.itemsize), _COUNT)[0]) if reader.data else 0
            if not 0 <= count <= most or bool(count) != bool(reader.data):
                raise PacketError(f"field {name!r} says it has {count} elements", expected=f"1 to {most}")
        if not count:
            require({name: data}, {name: (torch.uint8, 0)})
            return torch.empty(0, dtype=dtype, device=data.device)
        rows = np.empty((dtype.itemsize, count), np.uint8)
        coded = []
        for row in rows:
            for run in self._runs(count):
                model = reader.head(row[run])
                if model is not None:
                    coded.append((model, row[run]))
        _pull(name, reader.rest(), coded)
        return from_planes(rows, dtype, data.device)


@dataclass(frozen=True)
class _Model:
    """The symbols of a run and how often each comes.

    bits         of a symbol: 8, 4, 2 or 1
    width        bytes a frequency
    alphabet     uint8 [d], ascending
    frequencies  [d], from 1 to 2^(8 width) - 1; none where d is 1
    """

    bits: int
    width: int
    alphabet: Bytes
    frequencies: _Ints

    def head(self) -> bytes:
        """Tag, d - 1, the alphabet as a list or a bitmap, whichever is shorter, and the frequencies."""
        listed = self.alphabet.tobytes()
        if len(self.alphabet) >= _bitmap_bytes(self.bits):
            present = np.zeros(8 * _bitmap_bytes(self.bits), np.uint8)
            present[self.alphabet] = 1
            listed = np.packbits(present, bitorder="little").tobytes()
        table = self.frequencies.astype(f"<u{self.width}").tobytes()
        return bytes([self.bits | self.width << 4, len(self.alphabet) - 1]) + listed + table

    def _coder_model(self) -> Any:
        # Said explicitly: the default differs between versions of the library.
        return _constriction().model.Categorical(self.frequencies.astype(np.float64), perfect=False)

    def push(self, coder: Any, run: Bytes) -> None:
        """Put a run on the coder's stack."""
        if len(self.alphabet) == 1:
            return
        model, place = self._coder_model(), np.zeros(256, np.int32)
        place[self.alphabet] = np.arange(len(self.alphabet))
        table = np.ascontiguousarray(place[_split(np.arange(256, dtype=np.uint8), self.bits)])  # [256, 8 / bits]
        step = _PIECE * self.bits // 8
        for start in reversed(range(0, len(run), step)):
            coder.encode_reverse(table[run[start : start + step]].reshape(-1), model)

    def pull(self, coder: Any, run: Bytes) -> None:
        """Take a run off the coder's stack, into `run`."""
        if len(self.alphabet) == 1:
            run[:] = _join(np.repeat(self.alphabet, 8 // self.bits).reshape(1, -1), self.bits)
            return
        model = self._coder_model()
        step = _PIECE * self.bits // 8
        for start in range(0, len(run), step):
            part = run[start : start + step]
            part[:] = _join(self.alphabet[coder.decode(model, len(part) * 8 // self.bits)], self.bits)


class _Reader:
    """Takes bytes off the front, never more than there are."""

    def __init__(self, name: str, data: bytes) -> None:
        self.name, self.data, self.at = name, data, 0

    def take(self, size: int) -> bytes:
        if self.at + size > len(self.data):
            raise PacketError(f"field {self.name!r} ends inside a table of frequencies")
        self.at += size
        return self.data[self.at - size : self.at]

    def rest(self) -> bytes:
        return self.take(len(self.data) - self.at)

    def head(self, run: Bytes) -> _Model | None:
        """The next run's model; None if it is written as it is, and then it is in `run`."""
        tag = self.take(1)[0]
        if tag == _RAW:
            run[:] = np.frombuffer(self.take(len(run)), np.uint8)
            return None
        if tag not in _TAGS:
            raise PacketError(f"field {self.name!r}: no run of symbols begins with {tag}")
        bits, width = tag & 15, tag >> 4
        count = self.take(1)[0] + 1
        if count >= _bitmap_bytes(bits):
            bitmap = np.frombuffer(self.take(_bitmap_bytes(bits)), np.uint8)
            alphabet = np.flatnonzero(np.unpackbits(bitmap, bitorder="little")).astype(np.uint8)
        else:
            alphabet = np.frombuffer(self.take(count), np.uint8)
        ascending = len(alphabet) == count and bool((alphabet[1:] > alphabet[:-1]).all())
        frequencies = np.frombuffer(self.take(count * width if count > 1 else 0), f"<u{width}").astype(np.int64)
        if not ascending or alphabet[-1] >> bits or not frequencies.all():
            raise PacketError(f"field {self.name!r} holds a table of frequencies that no encoder writes")
        return _Model(bits, width, alphabet, frequencies)


def _pull(name: str, stream: bytes, coded: list[tuple[_Model, Bytes]]) -> None:
    """Fill the runs from the stream, which must hold them and nothing else."""
    if len(stream) % _WORD.itemsize:
        raise PacketError(f"field {name!r}: a stream of {len(stream)} bytes", expected="whole 32-bit words")
    try:
        coder = _constriction().stack.AnsCoder(np.frombuffer(stream, _WORD).astype(np.uint32))
    except ValueError as error:
        raise PacketError(f"field {name!r}: {error}") from error
    for model, run in coded:
        model.pull(coder, run)
    if not coder.is_empty():
        raise PacketError(f"field {name!r}: its stream does not hold what its tables announce")


def _model_of(run: Bytes) -> _Model | None:
    """The model that makes a run smallest, of those alike the one of wider symbols; None if it gets no smaller."""
    best, least = None, len(run)
    if least <= 3:  # no table is shorter
        return None
    counts = np.zeros(256, np.int64)
    for start in range(0, len(run), _PIECE):
        counts += np.bincount(run[start : start + _PIECE], minlength=256)
    for bits, pool in _POOLS.items():
        pooled = pool @ counts
        alphabet = pooled.nonzero()[0]
        for width in (1, 2) if pooled.max() > 255 else (1,):  # counts that fit a byte are exact in it
            frequencies = _scaled(pooled[alphabet], width)
            table = 2 + min(len(alphabet), _bitmap_bytes(bits)) + width * len(frequencies)
            if table < least and (size := table + _information(pooled[alphabet], frequencies)) < least:
                best, least = _Model(bits, width, alphabet.astype(np.uint8), frequencies), size
    return best


def _scaled(counts: _Ints, width: int) -> _Ints:
    """Counts in proportion, the largest the largest that `width` bytes hold; none where one symbol is all."""
    if len(counts) == 1:
        return np.empty(0, np.int64)
    most, largest = (1 << 8 * width) - 1, int(counts.max())
    if largest <= most:
        return counts
    # Halves up, in integers: every machine writes the same table.
    return np.maximum(1, (2 * counts * most + largest) // (2 * largest))


def _information(counts: _Ints, frequencies: _Ints) -> int:
    """Bytes, rounded up, that the symbols take in the stream under a model, the coder's state included."""
    if len(counts) == 1:
        return 0
    # Logarithms are rounded to 2^-16 before anything is compared: their last bit may differ between machines.
    bits = np.rint(np.log2(np.append(frequencies, frequencies.sum())) * (1 << 16)).astype(np.int64)
    return -int(-(counts * (bits[-1] - bits[:-1])).sum() // (1 << 19)) + _STREAM


def _bitmap_bytes(bits: int) -> int:
    return max(1, (1 << bits) // 8)


def _split(run: Bytes, bits: int) -> Bytes:
    """Bytes as their symbols, lowest bits first.  uint8 [r] -> [r, 8 / bits]"""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return (run[:, None] >> shifts) & np.uint8((1 << bits) - 1)


def _join(symbols: Bytes, bits: int) -> Bytes:
    """The inverse of `_split`, whatever the shape of the symbols."""
    if bits == 8:
        return symbols.reshape(-1)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    joined: Bytes = np.bitwise_or.reduce(symbols.reshape(-1, len(shifts)) << shifts, axis=1)
    return joined


def _pool(bits: int) -> _Ints:
    """How often a byte holds a symbol.  [2^bits, 256]"""
    symbols = _split(np.arange(256, dtype=np.uint8), bits)  # [256, 8 / bits]
    pool: _Ints = (symbols[None] == np.arange(1 << bits)[:, None, None]).sum(axis=2)
    return pool


_POOLS = {bits: _pool(bits) for bits in (8, 4, 2, 1)}


def _constriction() -> Any:
    """The coder's streams, imported where they are used: not everybody needs them."""
    try:
        return importlib.import_module("constriction").stream
    except ImportError as error:
        raise ConfigError(
            f"rans needs the package constriction ({error})",
            expected="the extra `entropy`, which brings it",
            mend="pip install 'thinwire[entropy]' on all members, or use zstd, which is always there",
        ) from error


rans = Rans()
