"""The transform against its definition, energies, shapes, ties, and that its sums are exact."""

from __future__ import annotations

import importlib
import math
import re

import pytest
import torch

from thinwire.codecs import DCT, dct, int8, parse
from thinwire.codecs.dct import _table
from thinwire.codecs.indices import read_numbers, write_numbers
from thinwire.errors import ConfigError, PacketError

SHAPES = ((130, 70), (7,), (3, 5, 7), (64, 64), (1, 9), (9, 1), (), (0, 3), (200,))
N = sum(map(math.prod, SHAPES))
X = torch.randn(N, generator=torch.Generator().manual_seed(0))


def _cosines(size: int) -> torch.Tensor:
    i, j = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    basis = (math.pi * i * (2 * j + 1) / (2 * size)).cos() * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis


@pytest.mark.parametrize("codec", [dct(1), dct(1).fit(SHAPES), dct(1, chunk=8).fit(SHAPES), dct(1, chunk=7)])
def test_everything_kept_is_the_identity(codec: DCT) -> None:
    fields = codec.encode(X, 0)
    assert (codec.decode(fields, N, 0) - X).norm() <= 1e-6 * X.norm()
    assert (64 * fields["value"].double()).norm().item() == pytest.approx(X.double().norm().item(), rel=1e-7)


def test_coefficients_are_those_of_the_definition() -> None:
    x = X[: 64 * 64]
    fields = dct(1).fit(((64, 64),)).encode(x, 0)
    due = _cosines(64) @ x.double().view(64, 64) @ _cosines(64).T
    torch.testing.assert_close(64 * fields["value"].double().view(64, 64), due, rtol=0, atol=2e-6)
    flat = dct(1).encode(x, 0)["value"].double().view(64, 64)
    torch.testing.assert_close(64 * flat, x.double().view(64, 64) @ _cosines(64).T, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", [(128, 192), (4096,), (64,)])
def test_the_error_is_the_energy_that_was_dropped(shape: tuple[int, ...]) -> None:
    """Exact where no edge is filled up: what is dropped there may lie outside."""
    n = math.prod(shape)
    x, codec = X[:n].repeat(1 + n // N)[:n], dct(1 / 16).fit((shape,))
    fields = codec.encode(x, 0)
    error = (codec.decode(fields, n, 0).double() - x.double()).square().sum()
    kept = (64 * fields["value"].double()).square().sum()
    assert (error + kept).item() == pytest.approx(x.double().square().sum().item(), rel=1e-6)


def test_a_cosine_is_one_coefficient() -> None:
    x = _cosines(64)[5].float()
    fields = dct(1 / 64).encode(x, 0)
    assert read_numbers(fields["index"], 1, 12).tolist() == [5]
    assert fields["value"].item() == pytest.approx(1 / 64)
    torch.testing.assert_close(dct(1 / 64).decode(fields, 64, 0), x, rtol=0, atol=1e-6)


def test_a_smooth_matrix_needs_its_shape() -> None:
    ramp = torch.linspace(-1, 1, 96)
    x = (ramp[:, None] * ramp).reshape(-1)
    errors = [
        (codec.decode(codec.encode(x, 0), 9216, 0) - x).norm() for codec in (dct(1 / 64).fit(((96, 96),)), dct(1 / 64))
    ]
    assert errors[0] < errors[1] / 2


def test_chunks_are_as_large_as_a_parameter_allows() -> None:
    """4096 coefficients of a chunk: 32 of them; 3 x 35: one of 105; vectors of 64 and fewer: one each."""
    codec = dct(1 / 128).fit(SHAPES)
    kept = 3 * 2 * 32 + 1 + 1 + 32 + 1 + 1 + 1 + 0 + 4
    assert codec.layout(N) == {"value": (torch.float32, kept), "index": (torch.uint8, math.ceil(1.5 * kept))}
    assert codec.contraction(N) == pytest.approx(32 / 4096, abs=2**-12)
    assert codec.layout(640)["value"][1] == 10, "another length has no shape"
    assert codec.part(0, N).layout(N) == dct(1 / 128).layout(N)


def test_fitting_is_no_option() -> None:
    codec = dct(1 / 128).fit(SHAPES)
    assert parse(codec.spec) == dct(1 / 128) != codec
    assert parse(codec.spec).fit(SHAPES) == codec  # type: ignore[union-attr]
    assert (dct(1 / 4) | int8).fit(SHAPES).layout(N)["value.code"][1] == dct(1 / 4).fit(SHAPES).layout(N)["value"][1]


def test_every_option_changes_the_result() -> None:
    sizes = [codec.layout(1000)["value"][1] for codec in (dct(1e-9), dct(1 / 16), dct(1 / 16, chunk=32), dct(1))]
    assert sizes == [16, 64, 64, 1024]
    decoded = [c.decode(c.encode(X, 0), N, 0) for c in (dct(1 / 16), dct(1 / 16, chunk=32), dct(1 / 16).fit(SHAPES))]
    assert not any(torch.equal(a, b) for i, a in enumerate(decoded) for b in decoded[:i])


def test_of_equal_coefficients_the_lower_is_kept() -> None:
    x = _cosines(64)[[3, 9, 20]].sum(dim=0).float()
    assert read_numbers(dct(2 / 64).encode(x, 0)["index"], 2, 12).tolist() in (
        [3, 9],
        [3, 20],
        [9, 20],
    )  # equal but for rounding
    one = torch.zeros(64)
    one[0] = 0.0
    assert read_numbers(dct(3 / 64).encode(one, 0)["index"], 3, 12).tolist() == [0, 1, 2]


def test_sums_are_exact_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products added one by one, backwards, give the bits of a matrix product; and no basis entry is near a half."""
    module = importlib.import_module("thinwire.codecs.dct")  # the name in the package is the codec's

    def slowly(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(())
        for i in reversed(range(left.shape[-1])):
            total = total + left[..., :, i : i + 1] * right[..., i : i + 1, :]
        assert total.abs().max() < 2**53
        return total.mul_(2.0**-24).round_()

    shapes = ((130, 70), (7,), (9,))
    x = torch.cat([X[:9107] ** 5, torch.full((9,), torch.finfo(torch.float32).max)])
    codec = dct(1 / 8).fit(shapes)
    fields = codec.encode(x, 0)
    decoded = codec.decode(fields, len(x), 0)
    monkeypatch.setattr(module, "_product", slowly)
    again = codec.encode(x, 0)
    assert all(torch.equal(fields[name], again[name]) for name in fields)
    assert torch.equal(codec.decode(again, len(x), 0), decoded)


def test_the_basis_is_the_same_whatever_the_library() -> None:
    """A cosine off by an ulp rounds to the same whole number: none lies within 1e-4 of a half."""
    nearest = 1.0
    for size in range(1, 65):
        exact = _cosines(size) * 2**24
        nearest = min(nearest, (exact - exact.floor() - 0.5).abs().min().item())
        torch.testing.assert_close(_table(size), exact.round(), rtol=0, atol=0)
    assert nearest > 1e-4


def test_pieces_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("thinwire.codecs.dct")  # the name in the package is the codec's

    codec = dct(1 / 16).fit(SHAPES)
    whole = codec.encode(X, 0)
    monkeypatch.setattr(module, "_PIECE", 4096)
    pieced = codec.encode(X, 0)
    assert all(torch.equal(whole[name], pieced[name]) for name in whole)


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_positions_take_twelve_bits(count: int) -> None:
    index = torch.tensor([4095, 1, 0x123, 0xABC, 7][:count])
    packed = write_numbers(index, 12)
    assert len(packed) == math.ceil(1.5 * count)
    assert torch.equal(read_numbers(packed, count, 12), index)


def test_positions_golden() -> None:
    assert bytes(write_numbers(torch.tensor([0x123, 0xABC], dtype=torch.int16), 12).tolist()) == bytes.fromhex(
        "23 C1 AB"
    )


@pytest.mark.parametrize("index", [[1, 1], [2, 1], [3, 64], [63, 4095]])
def test_positions_that_no_encoder_writes_are_refused(index: list[int]) -> None:
    fields = {"value": torch.ones(2), "index": write_numbers(torch.tensor(index), 12)}
    with pytest.raises(PacketError, match=r"'index' is not a list of ascending positions in each chunk\n.*2 asc.* 64"):
        dct(2 / 64).decode(fields, 64, 0)


@pytest.mark.parametrize("share", [0, -0.1, 1.5, float("nan"), "1/64", True, None])
def test_shares_out_of_range_are_refused(share: object) -> None:
    with pytest.raises(ConfigError, match=r"dct is to keep a share of .*\n  expected  a number in \(0, 1\]"):
        DCT(share)  # type: ignore[arg-type]


@pytest.mark.parametrize("chunk", [0, 1, 65, 8.0, True, "8"])
def test_other_chunks_are_refused(chunk: object) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"dct is to have chunks of side {chunk!r}\n  expected  a whole")):
        DCT(1 / 16, chunk)  # type: ignore[arg-type]
