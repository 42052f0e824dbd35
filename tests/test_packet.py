"""Packets: round trip, golden bytes, and refusal of everything else."""

from __future__ import annotations

import importlib.util
import random
import re
import struct
import tracemalloc
import zlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thinwire.codecs import Codec, parse, topk
from thinwire.errors import PacketError
from thinwire.packet import DTYPES, Flag, Header, Kind, Packet, check, read, wire_bytes

TESTS = Path(__file__).parent


def _renew() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_renew", TESTS / "golden" / "renew.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


golden = _renew()
NAMES = sorted(golden.packets())


def as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def as_bytes(buffer: Tensor) -> bytes:
    return buffer.numpy().tobytes()


def sealed(data: bytes) -> bytes:
    """The same with a checksum that fits, so that what is behind the checksum is reached."""
    if len(data) < 68:
        return data
    total = struct.unpack_from("<Q", data, 8)[0]
    end = total if 68 <= total <= len(data) else len(data)
    return data[: end - 4] + struct.pack("<I", zlib.crc32(data[: end - 4])) + data[end:]


# Round trip -----------------------------------------------------------------------------------------------------------

fields = st.dictionaries(
    st.text(max_size=12),
    st.tuples(st.sampled_from(DTYPES), st.integers(0, 40), st.integers(0, 2**31)),
    max_size=5,
)
headers = st.builds(
    Header,
    kind=st.sampled_from(Kind),
    sender=st.integers(0, 2**32 - 1),
    fragment=st.integers(0, 2**32 - 1),
    round=st.integers(0, 2**64 - 1),
    context=st.integers(0, 2**64 - 1),
    weight=st.floats(0, allow_nan=False, allow_infinity=False),
    flags=st.integers(0, Flag.ABSTAINS | Flag.FAILED),
)


def _field(dtype: torch.dtype, count: int, seed: int) -> Tensor:
    raw = torch.randint(
        256, (count * dtype.itemsize,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    return raw.view(dtype)


@given(
    codec=st.text(max_size=40), n=st.integers(0, 2**64 - 1), drawn=fields, header=headers, after=st.binary(max_size=9)
)
def test_what_is_written_is_read(
    codec: str, n: int, drawn: dict[str, tuple[torch.dtype, int, int]], header: Header, after: bytes
) -> None:
    packet = Packet(codec, n, {name: _field(*what) for name, what in drawn.items()}, header)
    written = as_bytes(packet.to_bytes())
    assert len(written) == wire_bytes(codec, {name: (dtype, count) for name, (dtype, count, _) in drawn.items()})
    found = read(as_tensor(written + after))
    assert (found.codec, found.n, found.header, list(found.fields)) == (codec, n, header, list(packet.fields))
    assert all(found.fields[name].dtype == field.dtype for name, field in packet.fields.items())
    assert as_bytes(found.to_bytes()) == written


def test_fields_are_views_and_may_be_strided() -> None:
    written = Packet("x", 0, {"a": torch.arange(20, dtype=torch.int32)[1::2], "b": torch.ones(2)[::2]}).to_bytes()
    found = read(written)
    assert found.fields["a"].tolist() == list(range(1, 20, 2))
    assert found.fields["b"].tolist() == [1]
    assert found.fields["a"].untyped_storage().data_ptr() == written.untyped_storage().data_ptr()


@pytest.mark.parametrize("offset", range(1, 9))
def test_a_packet_may_begin_anywhere_in_a_buffer(offset: int) -> None:
    written = Packet("x", 0, {"a": torch.arange(3.0, dtype=torch.float64)}).to_bytes()
    buffer = torch.cat([torch.zeros(offset, dtype=torch.uint8), written])
    assert read(buffer[offset:]).fields["a"].tolist() == [0, 1, 2]


def test_a_stamped_packet_differs_in_its_header_alone() -> None:
    packet = golden.packets()["int4"].stamped(Header(kind=Kind.RESULT, sender=9))
    assert packet.header.sender == 9
    assert as_bytes(packet.to_bytes())[48:-4] == as_bytes(golden.packets()["int4"].to_bytes())[48:-4]


# Golden bytes ---------------------------------------------------------------------------------------------------------


def test_every_golden_packet_has_its_file_and_every_file_its_packet() -> None:
    assert {golden.path(name).name for name in NAMES} == {path.name for path in golden.HERE.glob("*.bin")}


@pytest.mark.parametrize("name", NAMES)
def test_golden_bytes_are_read_and_written_again(name: str) -> None:
    data, made = golden.path(name).read_bytes(), golden.packets()[name]
    found = read(as_tensor(data))
    assert as_bytes(found.to_bytes()) == data
    assert (found.codec, found.n, found.header, list(found.fields)) == (
        made.codec,
        made.n,
        made.header,
        list(made.fields),
    )


@pytest.mark.parametrize("name", sorted(golden.ENCODED))
def test_codecs_still_write_and_read_golden_bytes(name: str) -> None:
    data, made, codec = golden.path(name).read_bytes(), golden.packets()[name], golden.codec_of(name)
    if codec.traits.fixed_size:  # versions of a compressor may differ in their bytes, never in what those unpack to
        assert as_bytes(made.to_bytes()) == data
    decoded = codec.decode(read(as_tensor(data)).fields, made.n, 0)
    assert as_bytes(decoded) == as_bytes(codec.decode(made.fields, made.n, 0))


def test_the_documented_example_is_the_golden_one() -> None:
    page = (TESTS.parent / "docs" / "wire-format.md").read_text()
    block = re.search(r"```hex\n(.*?)```", page, re.DOTALL)
    assert block is not None
    data = b""
    for line in block[1].splitlines():
        assert int(line[:8], 16) == len(data)
        data += bytes.fromhex(line[10:58])
    assert data == golden.path("int4").read_bytes()
    packet = read(as_tensor(data))
    codec = parse(packet.codec)
    decoded = codec.decode(packet.fields, 8, 0).int().tolist()
    assert "decodes to " + ", ".join(map(str, decoded)).replace("-", "−") in page


def test_the_documented_offsets_are_those_of_the_bytes() -> None:
    """Every row of the header's table, looked up in a packet whose values are all different."""
    header = Header(Kind.VERDICT, 11, 12, 13, 14, 15.0, Flag.FAILED)
    data = as_bytes(Packet("codec", 16, {"f": torch.zeros(3)}, header).to_bytes())
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\w+) \|", (TESTS.parent / "docs" / "wire-format.md").read_text(), re.M)
    types = {"uint8": "B", "uint16": "H", "uint32": "I", "uint64": "Q", "float64": "d"}
    found = [struct.unpack_from("<" + types[kind], data, int(at))[0] for at, _, kind in rows if kind in types]
    assert found == [1, 3, 2, len(data), 11, 12, 13, 14, 15.0, 16, 5, 1, 11]
    assert sum(int(size) for _, size, _ in rows) == 64
    assert data[64:69] == b"codec"


# Refusals -------------------------------------------------------------------------------------------------------------

GOOD = golden.path("int4").read_bytes()  # 13 bytes of codec, then the table: at 77 "scale", at 92 "code"


def _with(at: int, value: bytes) -> bytes:
    return GOOD[:at] + value + GOOD[at + len(value) :]


@pytest.mark.parametrize(
    ("data", "said", "offset"),
    [
        (b"", "only 0 bytes arrived, a header has 64", 0),
        (GOOD[:63], "only 63 bytes arrived, a header has 64", 63),
        (_with(0, b"GET "), "the first bytes are b'GET ', not b'TWPK': this is no thinwire packet", 0),
        (_with(4, b"\2"), "wire version 2 (at byte 4)\n  expected  wire version 1\n  mend      install the same", 4),
        (_with(8, b"\xff"), "the packet says it has 255 bytes, 132 arrived", 8),
        (_with(8, b"\x43"), "the packet says it has 67 bytes, 132 arrived", 8),
        (_with(15, b"\x10"), f"the packet says it has {2**60 + 132} bytes, 132 arrived", 8),
        (GOOD[:-1], "the packet says it has 132 bytes, 131 arrived", 8),
        (_with(120, b"\0"), "the checksum does not match: bytes were changed on the way", 128),
        (sealed(_with(6, b"\5")), "unknown packet kind 5", 6),
        (sealed(_with(7, b"\4")), "unknown flag bits 0x04", 7),
        (sealed(_with(40, struct.pack("<d", -1))), "weight -1.0 (at byte 40)\n  expected  a finite weight", 40),
        (sealed(_with(40, struct.pack("<d", float("nan")))), "weight nan", 40),
        (sealed(_with(40, struct.pack("<d", float("inf")))), "weight inf", 40),
        (sealed(_with(60, b"\xff\xff\xff\xff")), "codec name and field table reach past the end", 56),
        (sealed(_with(56, b"\xff\xff")), "codec name and field table reach past the end", 56),
        (sealed(_with(64, b"\xff")), "a name is not UTF-8", 64),
        (sealed(_with(78, b"\xff")), "a name is not UTF-8", 78),
        (sealed(_with(58, b"\x41")), "65 fields, at most 64 are allowed", 58),
        (sealed(_with(58, b"\x03")), "the field table ends inside an entry", 106),
        (sealed(_with(77, b"\xf0")), "the field table ends inside an entry", 77),
        (sealed(_with(83, b"\x09")), "field 'scale': unknown element type 9", 83),
        (sealed(_with(91, b"\x10")), f"field 'scale' of {2**60 + 1} elements reaches past the end", 77),
        (sealed(_with(84, b"\x09")), "field 'scale' of 9 elements reaches past the end", 77),
        (sealed(_with(58, b"\x01")), "the field table does not add up to the packet's length", 106),
        (sealed(_with(98, b"\x09")), "field 'code' of 9 elements reaches past the end", 92),
        (sealed(_with(98, b"\x00")), "the field table does not add up to the packet's length", 106),
    ],
)
def test_what_is_wrong_with_the_bytes(data: bytes, said: str, offset: int) -> None:
    with pytest.raises(PacketError, match=re.escape(said)) as caught:
        read(as_tensor(data))
    assert caught.value.offset == offset


def test_a_field_twice_is_refused() -> None:
    data = as_bytes(Packet("x", 0, {"a": torch.zeros(1), "b": torch.zeros(1)}).to_bytes())
    at = data.index(b"\1b")
    with pytest.raises(PacketError, match=re.escape(f"field 'a' twice (at byte {at})")):
        read(as_tensor(sealed(data[: at + 1] + b"a" + data[at + 2 :])))


@pytest.mark.parametrize(
    ("due", "said"),
    [
        ({"header": Header(sender=2, fragment=1, round=8, context=0x0123456789ABCDEF)},
         "a packet from member 2 came with round 7\n  expected  round 8\n  mend      start all members with the same"),
        ({"header": Header(Kind.RESULT, sender=3, fragment=1, round=7, context=5)},
         "a packet from member 3 came with kind 0, sender 2, context 81985529216486895\n"
         "  expected  kind 1, sender 3, context 5"),
        ({"codec": "int4"}, "member 2 wrote with codec 'int4(block=8)'\n  expected  codec 'int4'"),
        ({"n": 9}, "member 2 sent 8 elements\n  expected  9 elements"),
    ],
)  # fmt: skip
def test_an_intact_packet_that_was_not_due_is_refused(due: dict[str, object], said: str) -> None:
    packet = read(as_tensor(GOOD))
    asked = {"header": packet.header, "codec": "int4(block=8)", "n": 8, **due}
    with pytest.raises(PacketError, match=re.escape(said)):
        check(packet, **asked)  # type: ignore[arg-type]


def test_weight_and_flags_are_the_senders_to_choose() -> None:
    packet = read(as_tensor(GOOD))
    due = Header(sender=2, fragment=1, round=7, context=0x0123456789ABCDEF, weight=1.0, flags=Flag.ABSTAINS)
    assert check(packet, header=due, codec="int4(block=8)", n=8) is packet


# Any bytes at all -----------------------------------------------------------------------------------------------------


def _read_and_decode(data: bytes, codec: Codec | None, n: int) -> bool:
    """Whether the bytes were taken; anything but a PacketError gets through and fails the test."""
    try:
        packet = read(as_tensor(data))
        if codec is not None:
            decoded = codec.decode(packet.fields, n, 0)
            assert decoded.shape == (n,)
            assert decoded.dtype == torch.float32
    except PacketError:
        return False
    return True


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    _read_and_decode(data, None, 0)
    _read_and_decode(sealed(b"TWPK\1\0" + data), None, 0)


@settings(max_examples=200)
@given(
    name=st.sampled_from(NAMES),
    edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(0, 8),
    seal=st.booleans(),
)
def test_changed_packets_are_read_or_refused(name: str, edits: list[tuple[int, int]], cut: int, seal: bool) -> None:
    data = bytearray(golden.path(name).read_bytes())
    for at, value in edits:
        data[at % len(data)] = value
    changed = bytes(data[: len(data) - cut])
    codec = golden.codec_of(name) if name in golden.ENCODED else None
    _read_and_decode(sealed(changed) if seal else changed, codec, golden.packets()[name].n)


@pytest.mark.parametrize("name", NAMES)
def test_every_single_byte_changed(name: str) -> None:
    """Without a new checksum each change is refused; with one, what is behind the checksum takes it or refuses it."""
    data, n = golden.path(name).read_bytes(), golden.packets()[name].n
    codec = golden.codec_of(name) if name in golden.ENCODED else None
    chance = random.Random(name)
    for at in range(len(data)):
        for value in {0, 255, data[at] ^ 1, data[at] ^ 128, chance.randrange(256)} - {data[at]}:
            changed = data[:at] + bytes([value]) + data[at + 1 :]
            assert not _read_and_decode(changed, codec, n)
            _read_and_decode(sealed(changed), codec, n)


@pytest.mark.parametrize("name", NAMES)
def test_every_beginning_of_a_packet_is_refused(name: str) -> None:
    data = golden.path(name).read_bytes()
    assert not any(_read_and_decode(data[:size], None, 0) for size in range(len(data)))


def test_a_hostile_number_of_elements_allocates_nothing() -> None:
    """n is 2^60 in the header; the decoder is told what the receiver knows."""
    codec = topk(1 / 4)
    honest = Packet(codec.spec, 64, codec.encode(torch.randn(64), 0))
    hostile = as_tensor(sealed(as_bytes(Packet(codec.spec, 2**60, honest.fields).to_bytes())))
    tracemalloc.start()
    packet = read(hostile)
    decoded = codec.decode(packet.fields, 64, 0)
    with pytest.raises(PacketError, match=f"sent {2**60} elements\n  expected  64 elements"):
        check(packet, header=packet.header, codec=codec.spec, n=64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert decoded.shape == (64,)
    assert peak < 1 << 20
    with pytest.raises(PacketError):
        codec.decode(packet.fields, 2**30, 0)  # a receiver that expects more refuses before it makes room
