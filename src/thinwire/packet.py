"""What crosses a link: a versioned header, named one-dimensional fields, a checksum. Never pickle.

The layout is set down byte by byte in docs/wire-format.md and held by the golden files in tests/golden.
Reading checks everything before it is believed: any bytes at all become a `Packet` or a `PacketError`,
and no length found in a packet is allocated (fields are views of the buffer that arrived).
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import lru_cache
from operator import attrgetter

import torch
from torch import Tensor

from thinwire.errors import PacketError

MAGIC = b"TWPK"
WIRE_VERSION = 1

_HEADER = struct.Struct("<4sHBBQIIQQdQHHI")  # 64 bytes
_ENTRY = struct.Struct("<BQ")  # dtype, element count; preceded by the name and its length
_CHECKSUM = struct.Struct("<I")
_ALIGN = 8
_MAX_FIELDS = 64

#: Element types that may cross a link, by their code on the wire.
DTYPES: tuple[torch.dtype, ...] = (
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)
_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}

#: Fields of a packet: name -> one-dimensional tensor.
Fields = Mapping[str, Tensor]
#: What fields a codec writes for a vector: name -> (dtype, number of elements).
Layout = Mapping[str, tuple[torch.dtype, int]]


class Kind(IntEnum):
    """What a packet is for; a receiver refuses one of another kind than was due."""

    CONTRIBUTION = 0  # a member's share of a round, to whoever combines it
    RESULT = 1  # a combined part of a round, to everyone
    HELLO = 2  # who a member is: versions, method, model, initial weights
    VERDICT = 3  # what a member holds at the end of a round, before it commits


_KINDS = {kind.value: kind for kind in Kind}


class Flag:
    """Bits of the header's flag byte."""

    ABSTAINS = 1  # the sender's values were not finite: count it out of this round
    FAILED = 2  # the sender could not combine its part: nobody commits this round


@dataclass(frozen=True)
class Header:
    """What a packet says of itself, beside its fields.

    kind      what it is for
    sender    rank of the member that wrote it
    fragment  index of the fragment of the model
    round     number of the round, from 0
    context   64-bit digest of what all members agreed on at the start; another one is refused
    weight    of the contribution (samples seen), finite and not negative
    flags     bits of `Flag`
    """

    kind: Kind = Kind.CONTRIBUTION
    sender: int = 0
    fragment: int = 0
    round: int = 0
    context: int = 0
    weight: float = 1.0
    flags: int = 0


@dataclass(frozen=True)
class Packet:
    """A header, the codec expression that wrote the fields, and the fields.

    codec   canonical expression, e.g. "topk(0.015625) | int4"
    n       number of float32 elements the fields decode to
    fields  name -> one-dimensional tensor of a dtype in `DTYPES`
    """

    codec: str
    n: int
    fields: Fields = field(default_factory=dict)
    header: Header = field(default_factory=Header)

    def to_bytes(self) -> Tensor:
        """The packet as it crosses the link: uint8 [wire_bytes(...)], on the CPU."""
        layout = {name: (value.dtype, value.numel()) for name, value in self.fields.items()}
        words, total = _plan(self.codec, tuple(layout.items()))
        codec_size = len(self.codec.encode())
        head = self.header
        buffer = torch.zeros(total, dtype=torch.uint8)
        view = buffer.numpy().data
        view[: _HEADER.size] = _HEADER.pack(
            MAGIC, WIRE_VERSION, head.kind, head.flags, total, head.sender, head.fragment, head.round,
            head.context, head.weight, self.n, codec_size, len(layout), len(words) - codec_size,
        )  # fmt: skip
        at = _HEADER.size
        view[at : at + len(words)] = words
        at = _aligned(at + len(words))
        for value in self.fields.values():
            size = value.numel() * value.element_size()
            buffer[at : at + size].view(value.dtype).copy_(value.detach())
            at = _aligned(at + size)
        view[at:] = _CHECKSUM.pack(zlib.crc32(view[:at]))
        return buffer

    def stamped(self, header: Header) -> Packet:
        """The same content under another header."""
        return replace(self, header=header)


def wire_bytes(codec: str, layout: Layout) -> int:
    """Exact size in bytes of a packet with these fields, header and checksum included."""
    return _plan(codec, tuple(layout.items()))[1]


@lru_cache(maxsize=1024)  # a round asks for every packet that is due, and they are alike
def _plan(codec: str, layout: tuple[tuple[str, tuple[torch.dtype, int]], ...]) -> tuple[bytes, int]:
    """Codec expression and field table as they are written, and the packet's size in bytes."""
    entries = []
    for name, (dtype, count) in layout:
        text = name.encode()
        entries.append(bytes([len(text)]) + text + _ENTRY.pack(_CODES[dtype], count))
    words = codec.encode() + b"".join(entries)
    at = _aligned(_HEADER.size + len(words))
    for _, (dtype, count) in layout:
        at = _aligned(at + dtype.itemsize * count)
    return words, at + _CHECKSUM.size


def read(buffer: Tensor) -> Packet:
    """Parse bytes that arrived.

    buffer   uint8 [at least the packet's own length], on the CPU; what follows the packet is ignored
    returns  the packet; its fields are views of `buffer` (of a copy, if it does not start at a multiple of 8)
    raises   PacketError with the offset and the reason, for anything that is not an intact packet
    """
    if buffer.storage_offset() % _ALIGN:
        buffer = buffer.clone()  # part of a larger buffer: fields of wide types are views only where they are aligned
    view = buffer.numpy().data
    if len(view) < _HEADER.size:
        raise PacketError(f"only {len(view)} bytes arrived, a header has {_HEADER.size}", offset=len(view))
    (
        magic, version, kind, flags, total, sender, fragment, round_, context, weight, n, codec_size, count, table_size
    ) = _HEADER.unpack_from(view)  # fmt: skip
    if magic != MAGIC:
        raise PacketError(f"the first bytes are {magic!r}, not {MAGIC!r}: this is no thinwire packet", offset=0)
    if version != WIRE_VERSION:
        raise PacketError(
            f"wire version {version}",
            offset=4,
            expected=f"wire version {WIRE_VERSION}",
            mend="install the same version of thinwire on both sides",
        )
    if not _HEADER.size + _CHECKSUM.size <= total <= len(view):
        raise PacketError(f"the packet says it has {total} bytes, {len(view)} arrived", offset=8)
    body = total - _CHECKSUM.size
    if _CHECKSUM.unpack_from(view, body)[0] != zlib.crc32(view[:body]):
        raise PacketError("the checksum does not match: bytes were changed on the way", offset=body)
    if kind not in _KINDS:
        raise PacketError(f"unknown packet kind {kind}", offset=6)
    if flags & ~(Flag.ABSTAINS | Flag.FAILED):
        raise PacketError(f"unknown flag bits {flags:#04x}", offset=7)
    if not (math.isfinite(weight) and weight >= 0):
        raise PacketError(f"weight {weight}", offset=40, expected="a finite weight of at least 0")
    if _HEADER.size + codec_size + table_size > body:
        raise PacketError("codec name and field table reach past the end", offset=56)
    codec = _text(view, _HEADER.size, codec_size)
    fields = _read_fields(buffer, view, _HEADER.size + codec_size, table_size, count, body)
    return Packet(codec, n, fields, Header(_KINDS[kind], sender, fragment, round_, context, weight, flags))


def _read_fields(
    buffer: Tensor, view: memoryview, at: int, table_size: int, count: int, body: int
) -> dict[str, Tensor]:
    """The fields as views of the buffer, after every length was checked against it."""
    if count > _MAX_FIELDS:
        raise PacketError(f"{count} fields, at most {_MAX_FIELDS} are allowed", offset=58)
    end, data = at + table_size, _aligned(at + table_size)
    fields: dict[str, Tensor] = {}
    for _ in range(count):
        name_size = view[at] if at < end else 0
        if at + 1 + name_size + _ENTRY.size > end:
            raise PacketError("the field table ends inside an entry", offset=at)
        name = _text(view, at + 1, name_size)
        code, elements = _ENTRY.unpack_from(view, at + 1 + name_size)
        if code >= len(DTYPES):
            raise PacketError(f"field {name!r}: unknown element type {code}", offset=at + 1 + name_size)
        if name in fields:
            raise PacketError(f"field {name!r} twice", offset=at)
        dtype = DTYPES[code]
        size = elements * dtype.itemsize  # a Python integer: it cannot overflow
        if data + size > body:
            raise PacketError(f"field {name!r} of {elements} elements reaches past the end", offset=at)
        fields[name] = buffer[data : data + size].view(dtype)
        at, data = at + 1 + name_size + _ENTRY.size, _aligned(data + size)
    if at != end or data != body:
        raise PacketError("the field table does not add up to the packet's length", offset=end)
    return fields


def check(packet: Packet, *, header: Header, codec: str, n: int) -> Packet:
    """The packet, if it is the one that was due; weight and flags are the sender's to choose.

    raises  PacketError naming what differs
    """
    if _due(packet.header) != _due(header):
        found, due = packet.header, header
        wrong = [name for name in _DUE if getattr(found, name) != getattr(due, name)]
        told = ", ".join(f"{name} {getattr(found, name)}" for name in wrong)
        raise PacketError(
            f"a packet from member {header.sender} came with {told}",
            expected=", ".join(f"{name} {getattr(due, name)}" for name in wrong),
            mend="start all members with the same method, model and membership, at the same round",
        )
    if packet.codec != codec:
        raise PacketError(f"member {header.sender} wrote with codec {packet.codec!r}", expected=f"codec {codec!r}")
    if packet.n != n:
        raise PacketError(f"member {header.sender} sent {packet.n} elements", expected=f"{n} elements")
    return packet


_DUE = ("kind", "sender", "fragment", "round", "context")
_due = attrgetter(*_DUE)


def _text(view: memoryview, at: int, size: int) -> str:
    try:
        return bytes(view[at : at + size]).decode()
    except UnicodeDecodeError as error:
        raise PacketError("a name is not UTF-8", offset=at) from error


def _aligned(at: int) -> int:
    return -(-at // _ALIGN) * _ALIGN


def length(buffer: Tensor) -> int:
    """Bytes of the packet at the beginning of a buffer, for the ledger; the whole buffer if it holds no packet."""
    if buffer.numel() < _HEADER.size:
        return buffer.numel()
    (total,) = struct.unpack_from("<Q", buffer.numpy().data, 8)
    return total if bytes(buffer[:4].numpy()) == MAGIC and total <= buffer.numel() else buffer.numel()
