"""Zstandard: squeeze the bytes that another codec wrote, without loss.

    field -> its bytes grouped by position (all first bytes, all second bytes, ...) -> one zstd frame

Numbers of like size share their exponents, so grouping puts what repeats side by side.

Error   that of the codec before it; none of its own.
Size    varies with the data; at most a 256th and 64 bytes a field more than the codec before it.
Source  Collet & Kucherawy 2021, RFC 8878; grouping as in Alted's Blosc (byte shuffle).
Avoid   where the link is quicker than about 1 Gbit/s a core, and on float32 values: their lower bytes are noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import zstandard
from torch import Tensor

from thinwire.codecs.base import Codec, Shapes, Traits, require
from thinwire.codecs.precision import fp32
from thinwire.errors import ConfigError, PacketError
from thinwire.packet import Fields, Layout

_DEFAULT_LEVEL = 3
_LEVELS = range(-7, 20)  # 20 and above want more memory to decode than a member should give for a packet


@dataclass(frozen=True)
class Zstd(Codec):
    """The bytes of `inner`'s fields, each as one zstd frame.

    inner  the codec before it, of fixed size: what a frame may unpack to is known before it is opened
    level  -7 (fastest) to 19 (smallest)
    """

    inner: Codec = fp32
    level: int = _DEFAULT_LEVEL

    def __post_init__(self) -> None:
        if not isinstance(self.level, int) or isinstance(self.level, bool) or self.level not in _LEVELS:
            raise ConfigError(
                f"zstd is to work at level {self.level!r}",
                expected=f"a whole number from {_LEVELS[0]} (fastest) to {_LEVELS[-1]} (smallest)",
                mend="leave it out for level 3, which is fast enough for most links",
            )
        if not self.inner.traits.fixed_size:
            raise ConfigError(
                f"{self.inner.spec} | zstd: the left side already writes as few bytes as it can",
                expected="a codec of fixed size before zstd",
                mend="use one such stage, at the end",
            )

    def __call__(self, level: int | None = None) -> Zstd:
        """The same codec at another level: `zstd(9)`."""
        return replace(self, level=self.level if level is None else level)

    @property
    def spec(self) -> str:
        stage = "zstd" if self.level == _DEFAULT_LEVEL else f"zstd(level={self.level})"
        return f"{self.inner.spec} | {stage}"

    @property
    def traits(self) -> Traits:
        return replace(self.inner.traits, linear=False, fixed_size=False)

    def after(self, first: Codec) -> Codec:
        """The chain `first | self`: around everything that `first` writes."""
        return replace(self, inner=first if self.inner == fp32 else first | self.inner)

    def layout(self, n: int) -> Layout:
        return {name: (torch.uint8, _bound(t.itemsize * size)) for name, (t, size) in self.inner.layout(n).items()}

    def encode(self, x: Tensor, key: int) -> Fields:
        compressor = zstandard.ZstdCompressor(level=self.level, write_checksum=False, write_content_size=True)
        return {name: _squeeze(field, compressor) for name, field in self.inner.encode(x, key).items()}

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        require(fields, self.layout(n), exact=False)
        due = self.inner.layout(n)
        return self.inner.decode({name: _unfold(name, fields[name], *due[name]) for name in due}, n, key)

    def fit(self, shapes: Shapes) -> Codec:
        return replace(self, inner=self.inner.fit(shapes))

    @property
    def leads(self) -> tuple[Codec, ...]:
        return self.inner.leads

    def lead(self, change: Callable[[Codec], Codec]) -> Codec:
        return replace(self, inner=self.inner.lead(change))

    @property
    def selection(self) -> Codec:
        return self.inner.selection

    def part(self, begin: int, end: int) -> Codec:
        return replace(self, inner=self.inner.part(begin, end))

    def contraction(self, n: int) -> float | None:
        return self.inner.contraction(n)

    def variance(self, n: int) -> float | None:
        return self.inner.variance(n)


def _bound(size: int) -> int:
    """More than zstd's own worst case for `size` bytes; nothing is written for nothing."""
    return size + (size >> 8) + 64 if size else 0


def _squeeze(field: Tensor, compressor: zstandard.ZstdCompressor) -> Tensor:
    """A field of any dtype as one frame, uint8 [varies], on the field's device."""
    if not field.numel():
        return torch.empty(0, dtype=torch.uint8, device=field.device)
    # A tensor of one element counts as contiguous whatever its stride, but view(uint8) looks at the stride.
    flat = field.detach().contiguous().as_strided(field.shape, (1,))
    raw = flat.view(torch.uint8).view(-1, field.element_size())
    frame = compressor.compress(raw.t().contiguous().cpu().numpy().data)
    return torch.from_numpy(np.frombuffer(frame, dtype=np.uint8).copy()).to(field.device)


def _unfold(name: str, frame: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    """The field of `count` elements that a frame must hold; what the frame says of its length is only compared."""
    size = dtype.itemsize * count
    if not size:
        require({name: frame}, {name: (torch.uint8, 0)})
        return torch.empty(0, dtype=dtype, device=frame.device)
    data = frame.cpu().numpy().tobytes()
    try:
        if zstandard.frame_content_size(data) != size:
            raise PacketError(f"field {name!r}: its zstd frame is not one of {size} bytes")
        window = max(1024, 1 << (size - 1).bit_length())
        raw = zstandard.ZstdDecompressor(max_window_size=window).decompress(data, size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise PacketError(f"field {name!r}: {error}") from error
    planes = torch.from_numpy(np.frombuffer(raw, dtype=np.uint8).copy()).view(dtype.itemsize, count)
    return planes.t().contiguous().view(-1).view(dtype).to(frame.device)


zstd = Zstd()
