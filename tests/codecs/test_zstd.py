"""The lossless stage: that it saves bytes, where it may stand, and what its decoder refuses."""

from __future__ import annotations

import re
import tracemalloc

import pytest
import torch
import zstandard

from doubles import Nonzero
from thinwire.codecs import Zstd, bf16, fp32, int4, int8, parse, topk, train_dictionary, zstd
from thinwire.errors import ConfigError, PacketError
from written import size

X = torch.randn(4096, generator=torch.Generator().manual_seed(0))


def test_it_changes_bytes_and_not_numbers() -> None:
    for codec in (fp32, bf16, int8, topk(1 / 8) | int4):
        packed = codec | zstd
        assert torch.equal(packed.decode(packed.encode(X, 0), 4096, 0), codec.decode(codec.encode(X, 0), 4096, 0))


def test_floats_get_smaller_and_grouping_is_why() -> None:
    packed = size((bf16 | zstd).encode(X, 0))
    ungrouped = len(zstandard.ZstdCompressor(level=3).compress(X.bfloat16().view(torch.uint8).numpy().tobytes()))
    assert packed < 0.8 * 2 * 4096
    assert packed < ungrouped


def test_a_level_changes_the_frame() -> None:
    x = X.round()
    assert size(zstd(19).encode(x, 0)) < size(zstd(-7).encode(x, 0))
    assert zstd(level=9).spec == "fp32 | zstd(level=9)"
    assert zstd(level=0) != zstd


def test_alone_it_is_around_fp32() -> None:
    assert zstd() == zstd == fp32 | zstd == parse("zstd")


def test_it_goes_around_the_whole_chain_however_it_is_joined() -> None:
    assert topk(1 / 4) | (int4 | zstd) == (topk(1 / 4) | int4) | zstd == parse("topk(1/4) | int4 | zstd")
    assert list((topk(1 / 4) | int4 | zstd).encode(X, 0)) == ["value.scale", "value.code", "index"]


def test_nothing_may_follow() -> None:
    with pytest.raises(
        ConfigError, match=r"fp32 \| zstd \| int4: fp32 \| zstd leaves no float32 values that int4 could"
    ):
        zstd | int4
    with pytest.raises(ConfigError, match=r"\| zstd \| zstd: the left side already writes as few bytes as it can"):
        zstd | zstd


@pytest.mark.parametrize("level", [20, -8, 2.5, True, "3"])
def test_levels_out_of_range_are_refused(level: object) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"zstd is to work at level {level!r}\n  expected  a whole number")):
        zstd(level)  # type: ignore[arg-type]


def _frame(raw: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(zstandard.ZstdCompressor().compress(raw)), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (torch.zeros(20, dtype=torch.uint8), "field 'value': "),
        (torch.zeros(0, dtype=torch.uint8), "field 'value': "),
        (_frame(bytes(17)), "its zstd frame is not one of 16 bytes"),
        (_frame(bytes(16))[:-1], "field 'value': "),
        (torch.cat([_frame(bytes(16)), torch.zeros(3, dtype=torch.uint8)]), "field 'value': "),
        (torch.zeros(200, dtype=torch.uint8), r"field 'value' is torch.uint8 \[200\]\n  expected  .*at most 80"),
    ],
)
def test_other_frames_are_refused(frame: torch.Tensor, said: str) -> None:
    with pytest.raises(PacketError, match=said):
        zstd.decode({"value": frame}, 4, 0)


def test_a_frame_that_claims_to_be_huge_is_not_opened() -> None:
    bomb = _frame(bytes(1 << 26))  # 64 MiB of zeros in a few kilobytes
    tracemalloc.start()
    with pytest.raises(PacketError, match="its zstd frame is not one of 400000 bytes"):
        zstd.decode({"value": bomb}, 100_000, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_what_it_cannot_squeeze_stays_as_it_is() -> None:
    """Inside the frame, for a dozen bytes: no need of a tag of ours."""
    noise = torch.randint(-127, 128, (5000,), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    for n in (1, 40, 5000):
        assert (int8 | zstd).encode(noise[:n].float(), 0)["code"].numel() <= n + 14


@pytest.mark.parametrize("length", [0, 3, 20])
def test_a_varying_size_is_held_against_what_may_come(length: int) -> None:
    codec, index = Zstd(Nonzero()), torch.zeros(0, dtype=torch.uint8)
    with pytest.raises(PacketError, match="its zstd frame is not one of up to 16 bytes"):
        codec.decode({"value": _frame(bytes(length)), "index": index}, 4, 0)


def _updates(count: int) -> list[torch.Tensor]:
    """Vectors that have a pattern in common and differ in the rest."""
    g = torch.Generator().manual_seed(1)
    pattern = torch.randn(300, generator=g)
    return [torch.cat([pattern, torch.randn(20, generator=g)]) for _ in range(count)]


def test_a_dictionary_saves_what_fields_have_in_common() -> None:
    *known, new = _updates(200)
    codec = bf16 | zstd(dictionary=train_dictionary([bf16.encode(x, 0) for x in known], 2048))
    fields = codec.encode(new, 0)
    assert size(fields) < 0.6 * size((bf16 | zstd).encode(new, 0))
    assert torch.equal(codec.decode(fields, len(new), 0), bf16.decode(bf16.encode(new, 0), len(new), 0))
    with pytest.raises(PacketError, match="field 'value': "):
        (bf16 | zstd).decode(fields, len(new), 0)


def test_members_with_other_dictionaries_are_told_apart_by_their_expression() -> None:
    a, b = zstd(dictionary=b"what updates have in common"), zstd(dictionary=b"something else")
    assert re.fullmatch(r"fp32 \| zstd\(dictionary='[0-9a-f]{16}'\)", a.spec)
    assert a.spec != b.spec
    assert a != b
    assert a == zstd(dictionary=b"what updates have in common")
    assert a(9).dictionary == a.dictionary


def test_an_expression_cannot_hold_a_dictionary_and_says_how_to_give_one() -> None:
    spec = (int8 | zstd(dictionary=b"what updates have in common")).spec
    with pytest.raises(
        ConfigError,
        match=r"(?s)zstd is given the dictionary '[0-9a-f]{16}'.*mend +build the codec in Python.*read_bytes",
    ):
        parse(spec)


def test_too_little_to_learn_a_dictionary_from_is_said() -> None:
    with pytest.raises(
        ConfigError, match=r"(?s)a dictionary of 16384 bytes from 1 fields: .*mend +encode more vectors"
    ):
        train_dictionary([{"value": torch.zeros(4)}])
