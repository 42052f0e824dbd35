"""Closed rounds in columns: like beside like, so that what does not change takes next to nothing once it is squeezed.

    one byte a round: 1 the learning rate changes, 2 who takes part changes, 4 somebody joined, 8 somebody left
    learning rates that change    the 32 bits of each as a number, less those of the one before: signed numbers
    who begins or ceases to take part, for each change; who joined; who left      ascending members (reading.py)
    codes    in order of round, member, sample; all first bytes, all second ones, ... of scalars of several bytes

A round takes a byte or more, so a number of rounds that is not there is not believed.
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Iterator, Sequence
from itertools import accumulate

from thinwire.seeds.closed import Closed
from thinwire.seeds.reading import Reader, ids, signed, varint

_LR, _ROSTER, _JOINED, _LEFT = 1, 2, 4, 8
_INFINITE = 0x7F800000  # as a float32


def write(rounds: Sequence[Closed], width: int) -> bytes:
    """Rounds 0, 1, 2, ...; width: bytes of a scalar."""
    flags, lrs, rosters, joined, left = bytearray(), b"", b"", b"", b""
    lr: float | None = None
    roster: set[int] = set()
    for closed in rounds:
        members = set(closed.codes)
        flags.append(
            _LR * (closed.lr != lr) + _ROSTER * (members != roster) + _JOINED * bool(closed.joined)
            + _LEFT * bool(closed.left)
        )  # fmt: skip
        if closed.lr != lr:
            lrs += signed(_bits(closed.lr) - _bits(lr or 0.0))
        rosters += ids(sorted(members ^ roster)) if members != roster else b""
        joined += ids(closed.joined) if closed.joined else b""
        left += ids(closed.left) if closed.left else b""
        lr, roster = closed.lr, members
    codes = b"".join(told for closed in rounds for told in closed.codes.values())
    return varint(len(rounds)) + flags + lrs + rosters + joined + left + _planes(codes, width)


def read(reader: Reader, width: int, samples: int) -> tuple[Closed, ...]:
    """What `write` wrote of members that say `samples` scalars each.

    raises  PacketError
    """
    flags = reader.take(reader.varint())
    if any(flag > 15 for flag in flags) or (flags and not flags[0] & _LR):
        raise reader.wrong("has rounds with unknown flags, or without a learning rate")
    lrs = list(_rates(reader, flags))
    toggles = [_members(reader, flag & _ROSTER) for flag in flags]
    rosters: list[frozenset[int]] = list(accumulate(toggles, operator.xor))
    joined = [_members(reader, flag & _JOINED) for flag in flags]
    left = [_members(reader, flag & _LEFT) for flag in flags]
    size = width * samples
    codes = Reader(_joined(reader.take(size * sum(len(roster) for roster in rosters)), width), what="the codes")
    rounds = []
    for number, roster in enumerate(rosters):
        told = {member: codes.take(size) for member in sorted(roster)}
        rounds.append(Closed(number, lrs[number], told, tuple(joined[number]), tuple(left[number])))
    return tuple(rounds)


def _rates(reader: Reader, flags: bytes) -> Iterator[float]:
    """The learning rate of every round."""
    bits = 0
    for flag in flags:
        bits += reader.signed() if flag & _LR else 0
        if not 0 <= bits < _INFINITE:
            raise reader.wrong("has a learning rate that is negative or not finite")
        yield struct.unpack("<f", struct.pack("<I", bits))[0]


def _bits(lr: float) -> int:
    """A float32 of at least 0 as a number: larger for a larger one."""
    bits: int = struct.unpack("<I", struct.pack("<f", lr))[0]
    return bits


def _members(reader: Reader, due: int) -> frozenset[int]:
    if not due:
        return frozenset()
    found = reader.ids()
    if not found:
        raise reader.wrong("has a change of members that changes none")
    return frozenset(found)


def _planes(data: bytes, width: int) -> bytes:
    """All first bytes of elements of `width` bytes, all second ones, ..."""
    return b"".join(data[place::width] for place in range(width))


def _joined(planes: bytes, width: int) -> bytes:
    out, count = bytearray(len(planes)), len(planes) // width
    for place in range(width):
        out[place::width] = planes[place * count : (place + 1) * count]
    return bytes(out)
