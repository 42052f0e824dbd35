"""Numbers in bytes: what writes them, and a reader that believes none of them before it has the bytes.

A varint is a whole number from 0 to 2^64 - 1 in groups of seven bits, the lowest first, 128 added to all bytes but the
last, with no byte more than it takes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence

from thinwire.errors import PacketError

_MASK64 = (1 << 64) - 1


def varint(number: int) -> bytes:
    """A number of at most 64 bits."""
    assert 0 <= number <= _MASK64
    out = bytearray()
    while number >= 128:
        out.append(128 | number & 127)
        number >>= 7
    out.append(number)
    return bytes(out)


def signed(number: int) -> bytes:
    """A signed number: 0, -1, 1, -2, ... as the varints 0, 1, 2, 3, ..."""
    return varint(2 * number if number >= 0 else -2 * number - 1)


def ids(numbers: Sequence[int]) -> bytes:
    """Ascending numbers, all different: how many, then each as its distance from the one before, less one."""
    return varint(len(numbers)) + gaps(numbers)


def gaps(numbers: Iterable[int]) -> bytes:
    out, before = b"", -1
    for number in numbers:
        out += varint(number - before - 1)
        before = number
    return out


class Reader:
    """Bytes from the front. What is not there, or not written as above, is a PacketError with the offset."""

    def __init__(self, data: bytes, *, at: int = 0, what: str) -> None:
        self._data, self._at, self._what = data, at, what

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self._at

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if count > self.left:
            raise self.wrong(f"ends where {count} more bytes are due and {self.left} are left")
        self._at += count
        return self._data[self._at - count : self._at]

    def varint(self) -> int:
        """The next number."""
        number = shift = 0
        while True:
            byte = self.take(1)[0]
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
            if shift > 63:
                raise self.wrong("has a number of more than 64 bits")
        if number > _MASK64 or (byte == 0 and shift > 7):
            raise self.wrong("has a number that is not written as short as it can be, or of more than 64 bits")
        return number

    def signed(self) -> int:
        """The next signed number."""
        number = self.varint()
        return -(number + 1) // 2 if number & 1 else number // 2

    def float32(self) -> float:
        """The next 4 bytes as a finite number of at least 0."""
        value: float = struct.unpack("<f", self.take(4))[0]
        if not (math.isfinite(value) and math.copysign(1.0, value) > 0):
            raise self.wrong(f"has a learning rate of {value}")
        return value

    def ids(self) -> tuple[int, ...]:
        """Ascending numbers and how many they are."""
        return self.gaps(self.count())

    def count(self) -> int:
        """How many numbers follow."""
        count = self.varint()
        self._due(count)
        return count

    def _due(self, count: int) -> None:
        if count > self.left:  # each takes a byte or more
            raise self.wrong(f"ends where {count} numbers are due and {self.left} bytes are left")

    def gaps(self, count: int) -> tuple[int, ...]:
        """`count` ascending numbers."""
        self._due(count)
        found, before = [], -1
        for _ in range(count):
            before += self.varint() + 1
            found.append(before)
        if before > _MASK64:
            raise self.wrong(f"names member {before}, more than 64 bits")
        return tuple(found)

    def end(self) -> None:
        """Nothing may be left."""
        if self.left:
            raise self.wrong(f"has {self.left} bytes too many")

    def wrong(self, said: str) -> PacketError:
        """What is wrong at this byte."""
        return PacketError(f"{self._what} {said}", offset=self._at)
