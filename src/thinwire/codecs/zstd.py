"""Zstandard: squeeze the bytes that another codec wrote, without loss.

    field -> its bytes grouped by position (all first bytes, all second bytes, ...) -> one zstd frame

Numbers of like size share their exponents, so grouping puts what repeats side by side. What zstd cannot squeeze it
keeps as it is inside the frame, block by block. A dictionary of what fields have in common pays where fields are of a
few kilobytes: members are given it once, and only its digest is part of the expression.

Error   that of the codec before it; none of its own.
Size    varies with the data; at most a 256th and 64 bytes a field more than the codec before it.
Source  Collet & Kucherawy 2021, RFC 8878; grouping as in Alted's Blosc (byte shuffle).
Avoid   where the link is quicker than about 1 Gbit/s a core, and on float32 values: their lower bytes are noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
import zstandard
from torch import Tensor

from thinwire.codecs.base import Codec, require
from thinwire.codecs.lossless import Lossless, check_left, from_planes, planes
from thinwire.codecs.options import altered, call, changed, is_whole
from thinwire.codecs.precision import fp32
from thinwire.errors import ConfigError, PacketError
from thinwire.packet import Fields, Layout

_LEVELS = range(-7, 20)  # 20 and above want more memory to decode than a member should give for a packet


@dataclass(frozen=True)
class Zstd(Lossless):
    """The bytes of `inner`'s fields, each as one zstd frame.

    inner       the codec before it
    level       -7 (fastest) to 19 (smallest)
    dictionary  bytes that `train_dictionary` made, the same on all members; none if empty
    """

    inner: Codec = fp32
    level: int = 3
    dictionary: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        if not is_whole(self.level, _LEVELS[0], _LEVELS[-1]):
            raise ConfigError(
                f"zstd is to work at level {self.level!r}",
                expected=f"a whole number from {_LEVELS[0]} (fastest) to {_LEVELS[-1]} (smallest)",
                mend="leave it out for level 3, which is fast enough for most links",
            )
        if not isinstance(self.dictionary, bytes):
            raise ConfigError(
                f"zstd is given the dictionary {self.dictionary!r}",
                expected="bytes: an expression can name a dictionary, it cannot hold one",
                mend="build the codec in Python, with the same bytes on all members: codec | zstd(dictionary="
                "pathlib.Path('updates.dict').read_bytes()); train_dictionary makes them",
            )
        check_left("zstd", self.inner)

    def __call__(self, level: int | None = None, *, dictionary: bytes | None = None) -> Zstd:
        """The same codec with other options: `zstd(9)`."""
        return altered(self, level=level, dictionary=dictionary)

    @property
    def spec(self) -> str:
        options = changed(self, "level")
        if self.dictionary:
            # Members that hold other bytes are told apart by it in the handshake.
            options["dictionary"] = hashlib.blake2b(self.dictionary, digest_size=8).hexdigest()
        return f"{self.inner.spec} | {call('zstd', **options)}"

    def layout(self, n: int) -> Layout:
        return {name: (torch.uint8, _bound(t.itemsize * size)) for name, (t, size) in self.inner.layout(n).items()}

    def encode(self, x: Tensor, key: int) -> Fields:
        compressor = zstandard.ZstdCompressor(
            level=self.level,
            dict_data=self._dictionary,
            write_checksum=False,
            write_content_size=True,
            write_dict_id=False,
        )
        return {name: _squeeze(field, compressor) for name, field in self.inner.encode(x, key).items()}

    @property
    def _dictionary(self) -> zstandard.ZstdCompressionDict | None:
        return zstandard.ZstdCompressionDict(self.dictionary) if self.dictionary else None

    def unfold(self, name: str, frame: Tensor, dtype: torch.dtype, count: int) -> Tensor:
        """The field of `count` elements that a frame must hold, or at most so many if the left side varies in size.

        What the frame says of its length is only compared: with what is due, before anything is opened.
        """
        exact = self.inner.traits.fixed_size
        if not count or not (exact or frame.numel()):
            require({name: frame}, {name: (torch.uint8, 0)})
            return torch.empty(0, dtype=dtype, device=frame.device)
        data, most = frame.cpu().numpy().tobytes(), dtype.itemsize * count
        try:
            size = zstandard.frame_content_size(data)
            if size != most if exact else not 0 < size <= most or size % dtype.itemsize:
                raise PacketError(
                    f"field {name!r}: its zstd frame is not one of {'' if exact else 'up to '}{most} bytes"
                )
            window = max(1024, 1 << (size - 1).bit_length())
            opener = zstandard.ZstdDecompressor(dict_data=self._dictionary, max_window_size=window)
            raw = opener.decompress(data, size, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise PacketError(f"field {name!r}: {error}") from error
        return from_planes(np.frombuffer(raw, np.uint8).copy().reshape(dtype.itemsize, -1), dtype, frame.device)


def train_dictionary(samples: Iterable[Fields], size: int = 1 << 14) -> bytes:
    """A dictionary of what the fields that a codec wrote have in common.

    samples  what `codec.encode` gave for vectors such as those to come; a hundred or more
    size     bytes it may have
    returns  for `codec | zstd(dictionary=...)`: keep it in a file that all members have
    raises   ConfigError if zstd finds too little to learn from
    """
    written: list[bytes | bytearray | memoryview] = [
        planes(field).tobytes() for fields in samples for field in fields.values() if field.numel()
    ]
    try:
        return zstandard.train_dictionary(size, written).as_bytes()
    except (zstandard.ZstdError, ValueError) as error:
        raise ConfigError(
            f"a dictionary of {size} bytes from {len(written)} fields: {error}",
            expected="many more bytes of samples than the dictionary is to have",
            mend="encode more vectors, or ask for a smaller dictionary",
        ) from error


def _bound(size: int) -> int:
    """More than zstd's own worst case for `size` bytes; nothing is written for nothing."""
    return size + (size >> 8) + 64 if size else 0


def _squeeze(field: Tensor, compressor: zstandard.ZstdCompressor) -> Tensor:
    """A field of any dtype as one frame, uint8 [varies], on the field's device."""
    if not field.numel():
        return torch.empty(0, dtype=torch.uint8, device=field.device)
    frame = compressor.compress(planes(field).data)
    return torch.from_numpy(np.frombuffer(frame, dtype=np.uint8).copy()).to(field.device)


zstd = Zstd()
