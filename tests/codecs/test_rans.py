"""The entropy coder: its distance to the entropy, its tables, what it does with little data, and what it refuses."""

from __future__ import annotations

import sys
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from doubles import Nonzero
from thinwire.codecs import Codec, Rans, e3m0, fp32, int4, int8, parse, rans, topk, zstd
from thinwire.codecs.rans import _join, _split
from thinwire.errors import ConfigError, PacketError
from written import size

X = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))


def _entropy(field: torch.Tensor) -> float:
    """Bytes that the bytes of a field need if each is drawn from their frequencies."""
    counts = np.bincount(field.view(torch.uint8).numpy())
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum() * counts.sum() / 8)


@pytest.mark.parametrize("codec", [int8, int4, e3m0])
def test_it_comes_within_a_thousandth_and_a_table_of_the_entropy(codec: Codec) -> None:
    code = codec.encode(X, 0)["code"]
    table = 2 + 32 + 2 * len(code.unique())
    written = (codec | rans).encode(X, 0)["code"].numel()
    assert written <= _entropy(code) * (1 + 2**-10) + table + 8


def test_a_long_stream_is_the_entropy_and_eleven_bytes() -> None:
    """Frequencies of 16 bits cost next to nothing: half of the bytes 0, a quarter 1, an eighth 2, and so on."""
    code = torch.arange(1 << 16).bitwise_or(1 << 16)
    code = (code & -code).log2().to(torch.uint8)  # trailing zeros: exactly geometric
    codec = Rans(fp32)
    written = codec._squeeze(code)
    table = 2 + 17 + 2 * 17
    assert _entropy(code) == pytest.approx((2 * (1 << 16) - 2) / 8, abs=4)
    assert written.numel() - table - _entropy(code) <= 11
    assert torch.equal(codec.unfold("x", written, torch.uint8, 1 << 16), code)


def test_it_beats_zstd_where_symbols_do_not_repeat_in_phrases() -> None:
    skewed = X.pow(5)  # most codes are 0: less than one bit each, which whole bits a symbol cannot have
    assert size((int8 | rans).encode(X, 0)) < size((int8 | zstd).encode(X, 0))
    assert size((int8 | rans).encode(skewed, 0)) < 0.9 * size((int8 | zstd).encode(skewed, 0))


def test_little_data_stays_as_it_is() -> None:
    """A table of frequencies would be longer than what it saves: one byte a run says so."""
    fields = (int8 | rans).encode(X[:40], 0)
    assert [len(field) for field in fields.values()] == [4 * (1 + 1), 40 + 1]
    assert fields["code"][1:].tolist() == int8.encode(X[:40], 0)["code"].view(torch.uint8).tolist()


def test_equal_bytes_are_a_table_of_one() -> None:
    fields = (int8 | rans).encode(torch.full((10_000,), 3.0), 0)
    assert fields["code"].tolist() == [8 | 1 << 4, 0, 127]


def test_narrow_symbols_have_short_tables() -> None:
    """700 nibbles of few values: sixteen frequencies pay where those of 256 bytes do not."""
    x = torch.randn(700, generator=torch.Generator().manual_seed(0)).mul(2).round()
    x[::64] = 7.0  # every block's largest: the codes are x
    code = (int4 | rans).encode(x, 0)["code"]
    assert code[0] == 4 | 1 << 4
    assert code.numel() < 0.9 * 350


def test_a_segment_follows_data_that_change() -> None:
    x = torch.cat([torch.randn(40_000), torch.randn(40_000).round(), torch.zeros(40_000)])
    assert size((int8 | rans(segment=40_000)).encode(x, 0)) < 0.9 * size((int8 | rans).encode(x, 0))
    assert rans(segment=256).spec == "fp32 | rans(segment=256)"
    assert rans(256)() == rans(256) != rans


def test_it_changes_bytes_and_not_numbers() -> None:
    for codec in (fp32, int8, topk(1 / 8) | int4):
        packed = codec | rans
        assert torch.equal(packed.decode(packed.encode(X, 0), len(X), 0), codec.decode(codec.encode(X, 0), len(X), 0))


@given(st.binary(max_size=40), st.sampled_from([1, 2, 4, 8]))
def test_symbols_of_bytes_are_put_together_again(raw: bytes, bits: int) -> None:
    run = np.frombuffer(raw, np.uint8)
    symbols = _split(run, bits)
    assert symbols.shape == (len(run), 8 // bits)
    assert (_join(symbols, bits) == run).all()
    assert int.from_bytes(raw[:1], "little") == sum(int(s) << bits * i for i, s in enumerate(symbols[0])) if raw else 1


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 255), st.integers(1, 3000)), min_size=1, max_size=8),
    st.sampled_from([0, 100, 999]),
)
def test_any_bytes_come_back(runs: list[tuple[int, int]], segment: int) -> None:
    field = torch.cat([torch.full((count,), value, dtype=torch.uint8) for value, count in runs])[:4000]
    codec = Rans(fp32, segment)
    written = codec._squeeze(field)
    assert torch.equal(codec.unfold("x", written, torch.uint8, len(field)), field)
    assert written.numel() <= codec._bound(torch.uint8, len(field))


def test_it_goes_around_the_whole_chain_however_it_is_joined() -> None:
    assert topk(1 / 4) | (int4 | rans) == (topk(1 / 4) | int4) | rans == parse("topk(1/4) | int4 | rans")
    assert rans() == rans == fp32 | rans == parse("rans")


@pytest.mark.parametrize("second", [zstd, rans])
@pytest.mark.parametrize("first", [zstd, rans])
def test_one_such_stage_is_enough(first: Codec, second: Codec) -> None:
    with pytest.raises(ConfigError, match=r"int8 \| .*: the left side already writes as few bytes as it can"):
        first.after(int8) | second


@pytest.mark.parametrize("segment", [-1, 2.0, True, "3", None])
def test_segments_that_are_none_are_refused(segment: object) -> None:
    with pytest.raises(ConfigError, match=r"rans is to have segments of .*\n  expected  a whole number of elements"):
        Rans(int8, segment)  # type: ignore[arg-type]


def test_without_its_library_it_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "constriction", None)
    codec = parse("int8 | rans")
    with pytest.raises(ConfigError, match=r"(?s)constriction.*extra `entropy`.*pip install 'thinwire\[entropy\]'"):
        codec.encode(X, 0)


def _bytes(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (_bytes(), "ends inside a table"),
        (_bytes(0, 1, 2, 3), "ends inside a table"),  # as it is, and too short
        (_bytes(7), "no run of symbols begins with 7"),
        (_bytes(8 | 3 << 4), "no run of symbols begins with 56"),
        (_bytes(24, 1, 5, 5, 1, 1), "that no encoder writes"),  # twice the same symbol
        (_bytes(24, 1, 5, 4, 1, 1), "that no encoder writes"),
        (_bytes(24, 1, 4, 5, 1, 0), "that no encoder writes"),  # never
        (_bytes(20, 0, 16), "that no encoder writes"),  # 16 in four bits
        (_bytes(17, 0, 4), "that no encoder writes"),  # 2 in one bit
        (_bytes(17, 1, 0, 1, 1), "that no encoder writes"),  # two symbols, none in the bitmap
        (_bytes(24, 0, 4, 9), "a stream of 1 bytes"),
        (_bytes(24, 0, 4, 0, 0, 0, 0), "never ends in a zero word"),
        (_bytes(24, 0, 4, 1, 0, 0, 0), "does not hold what its tables announce"),
        (_bytes(24, 1, 4, 5, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8), "does not hold what its tables announce"),
    ],
)
def test_other_bytes_are_refused(data: torch.Tensor, said: str) -> None:
    with pytest.raises(PacketError, match=said):
        Rans(int8).unfold("code", data, torch.int8, 8)


def test_a_short_stream_is_not_believed_to_be_long() -> None:
    """Counts of a field of varying size are compared with what may come before anything is allocated."""
    codec = Rans(Nonzero())
    data = torch.frombuffer(bytearray((1 << 40).to_bytes(8, "little") + bytes([24, 0, 4])), dtype=torch.uint8)
    tracemalloc.start()
    with pytest.raises(PacketError, match="says it has 1099511627776 elements\n  expected  1 to 1000"):
        codec.decode({"value": data, "index": data[:0]}, 1000, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
