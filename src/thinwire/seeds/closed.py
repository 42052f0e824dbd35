"""A round that is over: what counts of it, the same bytes on all members."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from thinwire.errors import ConfigError, PacketError
from thinwire.seeds.codes import float32
from thinwire.seeds.reading import Reader, gaps, ids, varint


@dataclass(frozen=True)
class Closed:
    """What the model's next state follows from.

    number  of the round, from 0
    lr      learning rate, finite and not negative; rounded to float32
    codes   member -> its scalars as it wrote them; members that are not here do not count in this round
    joined  members that came since the round before
    left    members that went since then

    Members are whole numbers of at most 64 bits, kept in ascending order whatever order they are given in.
    """

    number: int
    lr: float
    codes: Mapping[int, bytes]
    joined: tuple[int, ...] = field(default=())
    left: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        if not 0 <= self.lr < float("inf"):
            raise ConfigError(
                f"round {self.number} with a learning rate of {self.lr}",
                expected="a finite number of at least 0",
                mend="1e-4, say",
            )
        members = [*self.codes, *self.joined, *self.left]
        assert self.number >= 0
        assert all(0 <= member < 1 << 64 for member in members)
        object.__setattr__(self, "lr", float32(self.lr))
        object.__setattr__(self, "codes", {member: bytes(self.codes[member]) for member in sorted(self.codes)})
        object.__setattr__(self, "joined", _ascending(self.joined))
        object.__setattr__(self, "left", _ascending(self.left))

    @property
    def members(self) -> tuple[int, ...]:
        """Those whose scalars count, in the order in which they count."""
        return tuple(self.codes)

    def to_bytes(self) -> bytes:
        """As it is sent: about 11 bytes, one for each member, and the codes. See docs/seed-logs.md."""
        sizes = [len(codes) for codes in self.codes.values()]
        alike = len(set(sizes)) == 1
        out = varint(self.number) + struct.pack("<f", self.lr) + varint(len(sizes))
        out += varint(1 + sizes[0]) if alike else b"\0"
        out += gaps(self.codes) + (b"" if alike else b"".join(map(varint, sizes))) + b"".join(self.codes.values())
        out += ids(self.joined) + ids(self.left)
        return out + struct.pack("<I", zlib.crc32(out))

    @classmethod
    def from_bytes(cls, data: bytes) -> Closed:
        """What `to_bytes` wrote.

        raises  PacketError for anything else
        """
        read = Reader(data[:-4], what="a closed round")
        if len(data) < 4 or struct.unpack("<I", data[-4:])[0] != zlib.crc32(data[:-4]):
            raise PacketError("the checksum of a closed round does not match", offset=max(0, len(data) - 4))
        number, lr, count, alike = read.varint(), read.float32(), read.varint(), read.varint()
        members = read.gaps(count)
        sizes = [alike - 1] * count if alike else [read.varint() for _ in members]
        if bool(alike) != (len(set(sizes)) == 1):
            raise read.wrong("does not write sizes as short as it can")
        codes = {member: read.take(size) for member, size in zip(members, sizes, strict=True)}
        joined, left = read.ids(), read.ids()
        read.end()
        return cls(number, lr, codes, joined, left)


def digest_of(rounds: Iterable[Closed]) -> str:
    """One number for rounds in their order, 16 hexadecimal digits."""
    state = hashlib.blake2b(digest_size=8)
    for closed in rounds:
        state.update(closed.to_bytes())
    return state.hexdigest()


def _ascending(members: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(set(members)))
