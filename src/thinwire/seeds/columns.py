"""Closed rounds in columns: like beside like, so that what does not change takes next to nothing once it is squeezed.

    one byte a round: 1 the learning rate changes, 2 who takes part changes, 4 somebody joined, 8 somebody left
    learning rates that change    float32: all their first (lowest) bytes, all second ones, ...
    who begins or ceases to take part, for each change; who joined; who left      ascending members (reading.py)
    codes    in order of round, member, sample; all first bytes, all second ones, ... of scalars of several bytes

A round takes a byte or more, so a number of rounds that is not there is not believed.
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Sequence
from itertools import accumulate

from thinwire.seeds.closed import Closed
from thinwire.seeds.reading import Reader, ids, varint

_LR, _ROSTER, _JOINED, _LEFT = 1, 2, 4, 8


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
        lrs += struct.pack("<f", closed.lr) if closed.lr != lr else b""
        rosters += ids(sorted(members ^ roster)) if members != roster else b""
        joined += ids(closed.joined) if closed.joined else b""
        left += ids(closed.left) if closed.left else b""
        lr, roster = closed.lr, members
    codes = b"".join(told for closed in rounds for told in closed.codes.values())
    return varint(len(rounds)) + flags + _planes(lrs, 4) + rosters + joined + left + _planes(codes, width)


def read(reader: Reader, width: int, samples: int) -> tuple[Closed, ...]:
    """What `write` wrote of members that say `samples` scalars each.

    raises  PacketError
    """
    flags = reader.take(reader.varint())
    if any(flag > 15 for flag in flags) or (flags and not flags[0] & _LR):
        raise reader.wrong("has rounds with unknown flags, or without a learning rate")
    lrs = Reader(_joined(reader.take(4 * sum(flag & _LR for flag in flags)), 4), what="a learning rate")
    changes = [lrs.float32() if flag & _LR else None for flag in flags]
    toggles = [_members(reader, flag & _ROSTER) for flag in flags]
    rosters: list[frozenset[int]] = list(accumulate(toggles, operator.xor))
    joined = [_members(reader, flag & _JOINED) for flag in flags]
    left = [_members(reader, flag & _LEFT) for flag in flags]
    size = width * samples
    codes = Reader(_joined(reader.take(size * sum(len(roster) for roster in rosters)), width), what="the codes")
    rounds, lr = [], 0.0
    for number, (change, roster) in enumerate(zip(changes, rosters, strict=True)):
        lr = lr if change is None else change
        told = {member: codes.take(size) for member in sorted(roster)}
        rounds.append(Closed(number, lr, told, tuple(joined[number]), tuple(left[number])))
    return tuple(rounds)


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
