"""Product quantisation: pieces of the vector by the number of the entry they resemble, in a book all members hold.

    C(x)_piece = s (c_1[i_1] + c_2[i_2] + ...)       i_t = argmin_j || piece / r - c_1[i_1] - ... - c_t[j] ||

r is the rms of a block of pieces, and s the factor with which their entries come nearest to the block; each stage codes
what the one before left. 256 entries for pieces of 8 take one bit an element and stage. Without a book of your own the
entries are drawn from the normal distribution, the same on all members.

Error   ||x - C(x)||^2 = ||x||^2 - <x, c>^2 / ||c||^2 for each block, c its entries, and ||x||^2 where they point away
        from it: such a block becomes zeros. So it never adds energy; that it always takes some away is not claimed, for
        entries may be across, and error feedback will not have it. Of normal numbers, one, two and three stages of 8 by
        256 leave 0.36, 0.13 and 0.05 of the energy, and 0.33, 0.11 and 0.04 with a trained book.
Size    4 ceil(n/B) bytes of factors; 1, 2, 4 or 8 bits a piece and stage.
Cost    2 K n operations a stage to encode (K entries); to decode, one look-up a piece and stage.
Source  Jegou, Douze & Schmid 2011 (IEEE TPAMI 33: product quantisation); Chen, Guan & Wang 2010 (Sensors 10: residual
        stages); Hu et al. 2024, arXiv:2405.04966 (CodeFilling: numbers in a shared book between machines).
Differs one book serves all places of the vector, which are alike in an update, where the first paper has one for each.
Avoid   with error feedback, on links of more than about 100 Mbit/s, and where members cannot be given a book and
        normal numbers are not what you have: hadamard makes them so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from thinwire.codecs.base import Codec, Traits, require
from thinwire.codecs.blocks import HUGE, TINY, num_blocks, require_scales
from thinwire.codecs.options import call, changed, is_whole
from thinwire.codecs.planar import bits_for, pack_row, row_bytes, unpack_row
from thinwire.errors import ConfigError, PacketError
from thinwire.packet import Fields, Layout
from thinwire.randomness import mix, random_bytes

_BOOK = int.from_bytes(b"codebook", "little")  # keeps its key apart from those of other draws
_DEFAULTS = {"length": 8, "size": 256, "stages": 1, "block": 256}
_PASSES = 25
_MOST_SAMPLES = 1 << 16  # pieces a book is fitted to
_PIECE = 1 << 14  # pieces compared with all entries at once


@dataclass(frozen=True)
class PQ(Codec):
    """Pieces as numbers of entries.

    length    elements of a piece, from 1 to 64
    size      entries of a stage's book, from 2 to 256
    stages    from 1 to 8; each halves the error or better
    block     elements that share a factor, a multiple of length
    codebook  bytes that `train_codebook` made with the same length, size and stages; drawn if empty
    """

    length: int = _DEFAULTS["length"]
    size: int = _DEFAULTS["size"]
    stages: int = _DEFAULTS["stages"]
    block: int = _DEFAULTS["block"]
    codebook: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        for option, least, most in (("length", 1, 64), ("size", 2, 256), ("stages", 1, 8), ("block", 1, 1 << 20)):
            value = getattr(self, option)
            if not is_whole(value, least, most):
                raise ConfigError(
                    f"pq is to have {option}={value!r}",
                    expected=f"a whole number from {least} to {most}",
                    mend=f"leave it out for {_DEFAULTS[option]}",
                )
        if self.block % self.length:
            raise ConfigError(
                f"pq is to have blocks of {self.block} elements in pieces of {self.length}",
                expected="whole pieces in a block",
                mend=f"write block={num_blocks(self.block, self.length) * self.length}, say",
            )
        _check_book(self.codebook, 4 * self.stages * self.size * self.length)

    @property
    def spec(self) -> str:
        told = changed(self)
        if self.codebook:
            # Members that hold other bytes are told apart by it in the handshake.
            told["codebook"] = hashlib.blake2b(self.codebook, digest_size=8).hexdigest()
        return call("pq", **told)

    @property
    def traits(self) -> Traits:
        return Traits()

    @property
    def _bits(self) -> int:
        return bits_for(self.size)

    def layout(self, n: int) -> Layout:
        codes = num_blocks(n, self.length) * self.stages
        return {
            "scale": (torch.float32, num_blocks(n, self.block)),
            "code": (torch.uint8, row_bytes(codes, self._bits)),
        }

    def encode(self, x: Tensor, key: int) -> Fields:
        device = x.device
        books = _books(self).to(device)  # [stages, K, v]
        blocks = _padded(x, self.block)  # [b, B]
        unit, size = _normalised(blocks)
        pieces = unit.view(-1, self.length)  # [p, v], the last ones perhaps beyond the vector
        codes = torch.empty(self.stages, len(pieces), dtype=torch.uint8, device=device)
        for stage, (found, _) in enumerate(_stages(pieces, books)):
            codes[stage] = found
        entries = _sum(codes, books).view(blocks.shape)
        entries.view(-1)[len(x) :] = 0.0  # what fills the last block up is not sent
        across = (unit * entries).sum(dim=1)
        scale = size * (across / entries.square().sum(dim=1).clamp_(min=TINY)).clamp_(min=0)  # [b]
        kept = codes[:, : num_blocks(len(x), self.length)]
        return {
            "scale": scale.clamp_(max=HUGE).masked_fill_(scale < TINY, 0.0),
            "code": pack_row(kept.reshape(-1), self._bits),
        }

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        require(fields, self.layout(n))
        require_scales(fields["scale"], HUGE, "scale")
        codes = unpack_row(fields["code"], num_blocks(n, self.length) * self.stages, self._bits)
        if len(codes) and int(codes.max()) >= self.size:
            raise PacketError(f"field 'code' names entry {int(codes.max())} of {self.size}")
        entries = _sum(codes.view(self.stages, -1), _books(self).to(codes.device)).view(-1)[:n]
        scale = fields["scale"].repeat_interleave(self.block)[:n]
        return entries.mul_(scale).clamp_(-HUGE, HUGE)  # where the largest numbers are, entries may reach beyond them

    def contraction(self, n: int) -> float | None:
        return 0.0


def train_codebook(
    samples: Iterable[Tensor],
    *,
    length: int = _DEFAULTS["length"],
    size: int = _DEFAULTS["size"],
    stages: int = _DEFAULTS["stages"],
    block: int = _DEFAULTS["block"],
    key: int = 0,
) -> bytes:
    """A book for vectors like these, by k-means on their pieces, stage by stage on what the stage before left.

    samples  float32 [any] each: updates of earlier rounds, say; 65536 of their pieces at most are looked at
    others   as those of `PQ`, which wants the same; key chooses the pieces that begin as entries
    returns  for `pq(..., codebook=...)`: keep it in a file that all members have
    """
    PQ(length, size, stages, block)  # refuses what it refuses
    rows = torch.cat([_normalised(_padded(sample.float().cpu(), block))[0].view(-1, length) for sample in samples])
    rows = rows[rows.square().sum(dim=1) > 0]
    if len(rows) < size:
        raise ConfigError(
            f"a codebook of {size} entries from {len(rows)} pieces",
            expected=f"at least {size} pieces of {length} that are not zero",
            mend="give more samples, or make a smaller book",
        )
    left = rows[_chosen(len(rows), min(len(rows), _MOST_SAMPLES), mix(key, 0))]
    books = []
    for stage in range(stages):
        books.append(_fitted(left, size, mix(key, 1 + stage)))
        left = left - books[-1][_nearest(left, books[-1])[0].long()]
    return torch.stack(books).numpy().astype("<f4").tobytes()


def _fitted(rows: Tensor, size: int, key: int) -> Tensor:
    """Lloyd's iteration from entries chosen among the rows; entries that nobody uses move to the worst rows.  [K, v]"""
    book = rows[_chosen(len(rows), size, key)].clone()
    for _ in range(_PASSES):
        codes, errors = _nearest(rows, book)
        uses = np.bincount(codes.numpy(), minlength=size)
        sums = np.stack([np.bincount(codes.numpy(), column, size) for column in rows.double().numpy().T], axis=1)
        book = torch.from_numpy(sums / np.maximum(uses, 1)[:, None]).float()
        unused = torch.from_numpy(np.flatnonzero(uses == 0))
        book[unused] = rows[errors.sort(descending=True, stable=True).indices[: len(unused)]]
    return book


def _chosen(count: int, size: int, key: int) -> Tensor:
    """`size` different numbers below `count`, ascending.  int64 [size]"""
    order = random_bytes(key, 8 * count).view(torch.int64).sort(stable=True).indices
    return order[:size].sort().values


def _nearest(rows: Tensor, book: Tensor) -> tuple[Tensor, Tensor]:
    """Number of the nearest entry, uint8 [p], and the squared distance to it, less ||row||^2.  [p]"""
    codes, least = torch.empty(len(rows), dtype=torch.uint8, device=rows.device), rows.new_empty(len(rows))
    norms = book.square().sum(dim=1)
    for start in range(0, len(rows), _PIECE):
        here = slice(start, start + _PIECE)
        found = torch.addmm(norms, rows[here], book.T, alpha=-2).min(dim=1)
        codes[here], least[here] = found.indices, found.values
    return codes, least


def _stages(pieces: Tensor, books: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Codes of each stage, and what it leaves."""
    left = pieces
    for book in books:
        codes = _nearest(left, book)[0]
        left = left - book[codes.long()]
        yield codes, left


def _sum(codes: Tensor, books: Tensor) -> Tensor:
    """The entries that codes [stages, p] name, added up in the order of stages.  [p, v]"""
    entries = books[0].index_select(0, codes[0].int())
    for book, numbers in zip(books[1:], codes[1:], strict=True):
        entries.add_(book.index_select(0, numbers.int()))
    return entries


def _padded(x: Tensor, block: int) -> Tensor:
    missing = -len(x) % block
    return (torch.nn.functional.pad(x, (0, missing)) if missing else x.contiguous()).view(-1, block)


def _normalised(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks [b, B] divided by their rms, and the rms [b]; zeros where it is negligible."""
    largest = blocks.abs().amax(dim=1)
    unit = blocks / largest.masked_fill(largest < TINY, torch.inf)[:, None]  # first: squares of 1e30 are no float32
    rms = unit.square().mean(dim=1).sqrt_()
    return unit.div_(rms.masked_fill(rms == 0, 1.0)[:, None]), largest.mul_(rms)


def _books(codec: PQ) -> Tensor:
    return _read_book(codec.codebook, codec.stages, codec.size, codec.length)


@lru_cache(maxsize=8)
def _read_book(codebook: bytes, stages: int, size: int, length: int) -> Tensor:
    """The books, drawn where none is given.  float32 [stages, K, v]"""
    if codebook:
        return torch.frombuffer(bytearray(codebook), dtype=torch.float32).view(stages, size, length)
    count = stages * size * length
    # A sum of twelve uniform numbers is normal enough, and the same bits everywhere: integers over 2^16.
    words = random_bytes(mix(_BOOK, stages, size, length), 24 * count).view(torch.int16)
    normal = words.view(count, 12).sum(dim=1, dtype=torch.int32).add_(6).float().mul_(2.0**-16)
    return normal.view(stages, size, length) * _spreads(stages, size, length)[:, None, None]


def _spreads(stages: int, size: int, length: int) -> Tensor:
    """How large entries of each stage are, to a 4096th: of R bits an element, a share D = 4^-R is left to the next."""
    left = 4.0 ** (-np.log2(size) / length)
    return torch.tensor([round(4096 * ((1 - left) * left**stage) ** 0.5) / 4096 for stage in range(stages)])


def _check_book(codebook: object, size: int) -> None:
    if not isinstance(codebook, bytes):
        raise ConfigError(
            f"pq is given the codebook {codebook!r}",
            expected="bytes: an expression can name a codebook, it cannot hold one",
            mend="build the codec in Python, with the same bytes on all members: pq(codebook="
            "pathlib.Path('updates.book').read_bytes()); train_codebook makes them",
        )
    if codebook and (len(codebook) != size or not np.isfinite(np.frombuffer(codebook, "<f4")).all()):
        raise ConfigError(
            f"pq is given a codebook of {len(codebook)} bytes",
            expected=f"{size} bytes of finite float32: stages of entries of pieces",
            mend="train it with the same length, size and stages",
        )


pq = PQ
