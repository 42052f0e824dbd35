"""Levels at random: their exact variance, both norms, and the streams of Elias codes."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinwire.codecs import QSGD, elias, int4, qsgd
from thinwire.errors import ConfigError, PacketError
from written import again, size


@pytest.mark.parametrize(("block", "levels", "omega"), [(128, 4, 1.26), (512, 7, 1.57)])
def test_the_variance_is_the_exact_one(block: int, levels: int, omega: float) -> None:
    x = torch.randn(block, generator=torch.Generator().manual_seed(0)).double()
    unit = x.norm() / levels
    p = (x.abs() / unit).frac()
    due = (unit.square() * (p * (1 - p)).sum() / x.square().sum()).item()
    assert due == pytest.approx(omega, rel=0.15)
    codec = qsgd(levels, block=block)
    errors = [(again(codec, x.float(), key) - x).square().sum().item() for key in range(400)]
    assert sum(errors) / 400 / x.square().sum().item() == pytest.approx(due, rel=0.03)
    assert due < (codec.variance(block) or 0.0)


def test_the_bound_is_nearly_reached() -> None:
    """All but one at half a level: 1/4 each."""
    codec = qsgd(8, block=64, norm="max")
    x = torch.full((64,), 1 / 16)
    x[0] = 1
    errors = [(again(codec, x, key) - x).double().square().sum().item() for key in range(200)]
    assert sum(errors) / 200 == pytest.approx(63 / 4 / 64, rel=0.03)
    assert codec.variance(64) == 64 / 4 / 64


def test_levels_of_the_largest_norm_are_those_of_the_integers() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    integers = int4(block=512, rounding="stochastic")
    assert torch.equal(again(qsgd(norm="max"), x, 3), integers.decode(integers.encode(x, 3), 1000, 3))


def test_the_scale_is_the_norm_over_the_levels() -> None:
    x = torch.tensor([3.0, 4.0, 0, 0] * 2) * 2.0**100
    assert qsgd(5, block=8).encode(x, 0)["scale"].tolist() == [pytest.approx(2.0**100 * math.sqrt(50) / 5)]
    assert qsgd(5, block=8, norm="max").encode(x, 0)["scale"].tolist() == [pytest.approx(2.0**100 * 4 / 5)]


@pytest.mark.parametrize(("levels", "bits"), [(1, 2), (3, 3), (7, 4), (15, 5), (31, 6), (63, 7), (127, 8)])
def test_sizes_of_fixed_codes(levels: int, bits: int) -> None:
    assert qsgd(levels).layout(1 << 20)["code"][1] == bits << 17
    x = torch.zeros(1000)
    x[::512] = torch.tensor([-3.0, 5.0])
    assert torch.equal(again(qsgd(levels), x), x)


def test_elias_codes_are_the_same_numbers_in_fewer_bytes() -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    fixed, coded = qsgd(23, block=512), qsgd(23, block=512, code="elias")
    assert torch.equal(again(fixed, x, 3), again(coded, x, 3))
    bits = 8 * size(coded.encode(x, 3)) / len(x)
    assert 2.8 < bits - 32 / 512 < 3.0  # s = sqrt(B): 2.95 in the specification of the codes
    assert size(fixed.encode(x, 3)) > 2 * size(coded.encode(x, 3))


def test_elias_streams_by_hand() -> None:
    """0 1 -2 3 -6 as |q| + 1 = 1 2 3 4 7: prefixes 1 01 01 001 001, tails 0 1 00 11, signs + - + -."""
    fields = elias.encode(torch.tensor([0, 1, -2, 3, -6], dtype=torch.int8))
    assert fields["prefix"].tolist() == [0b10010101 & 0xFF, 0b100]
    assert fields["tail"].tolist() == [0b110010]
    assert fields["sign"].tolist() == [0b1010]


@given(st.lists(st.integers(-127, 127), max_size=70))
def test_elias_streams_come_back(numbers: list[int]) -> None:
    codes = torch.tensor(numbers, dtype=torch.int8)
    fields = elias.encode(codes)
    due = elias.layout(len(numbers), 127)
    assert all(len(fields[name]) <= due[name][1] for name in due)
    assert torch.equal(elias.decode(**fields, n=len(numbers), largest=127), codes)


def test_elias_streams_do_not_depend_on_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    codes = (torch.randn(1000, generator=g) * 3).round().to(torch.int8)
    whole = elias.encode(codes)
    monkeypatch.setattr(elias, "_PIECE", 17)
    pieced = elias.encode(codes)
    assert all(torch.equal(whole[name], pieced[name]) for name in whole)
    assert torch.equal(elias.decode(**pieced, n=1000, largest=127), codes)


def _bytes(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("prefix", "tail", "sign", "said"),
    [
        (_bytes(0b11), _bytes(), _bytes(), "field 'prefix' ends too early or too late"),
        (_bytes(0b111, 0), _bytes(), _bytes(), "field 'prefix' ends too early or too late"),
        (_bytes(0b1111), _bytes(), _bytes(), "field 'prefix' is not that of so many numbers"),
        (_bytes(0b110000), _bytes(0), _bytes(0), "field 'prefix' is not that of so many numbers"),
        (_bytes(0b1110), _bytes(), _bytes(0), "field 'tail' has 0 bytes\n  expected  1 bits"),
        (_bytes(0b11100), _bytes(0b11), _bytes(0), "field 'tail' makes a magnitude of 6\n  expected  at most 4"),
        (_bytes(0b1110), _bytes(1), _bytes(), "field 'sign' has 0 bytes\n  expected  1 bits"),
    ],
)
def test_other_streams_are_refused(prefix: torch.Tensor, tail: torch.Tensor, sign: torch.Tensor, said: str) -> None:
    codec = qsgd(4, code="elias")
    with pytest.raises(PacketError, match=said):
        codec.decode({"scale": torch.ones(1), "prefix": prefix, "tail": tail, "sign": sign}, 3, 0)


def test_codes_above_the_levels_are_refused() -> None:
    fields = dict(qsgd.encode(torch.ones(8), 0))
    fields["code"][0] = 15
    with pytest.raises(PacketError, match="field 'code' holds 15\n  expected  codes up to 14"):
        qsgd.decode(fields, 8, 0)


def test_zeros_and_extremes() -> None:
    limit = torch.finfo(torch.float32).max
    for codec in (qsgd, qsgd(1, code="elias"), qsgd(norm="max")):
        assert not again(codec, torch.zeros(9)).any()
        assert again(codec, torch.tensor([limit, -limit] * 300)).isfinite().all()


def test_options() -> None:
    assert qsgd() == qsgd == QSGD(7, 512, "l2", "fixed")
    assert qsgd(1, block=64, norm="max", code="elias").spec == "qsgd(levels=1, block=64, norm='max', code='elias')"
    for levels in (0, 128, 2.5, True, "7"):
        with pytest.raises(ConfigError, match=re.escape(f"qsgd is to have {levels!r} levels\n  expected  a wh")):
            qsgd(levels)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=re.escape("qsgd is to take the norm 'l1'\n  expected  norm='l2'")):
        qsgd(norm="l1")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=re.escape("qsgd is to write the code 'rans'\n  expected  code='fixed'")):
        qsgd(code="rans")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="qsgd is to have blocks of 4\n  expected  a whole number, a multiple of 8"):
        qsgd(3, block=4)
