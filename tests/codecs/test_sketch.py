"""Exact sums, planted elements found again, and the hash."""

from __future__ import annotations

import importlib
import re

import pytest
import torch

from thinwire.codecs import Sketch, sketch
from thinwire.codecs.sketch import _median, estimated, sketched, touched, unsketch
from thinwire.errors import ConfigError

WHOLE = torch.randint(-1000, 1000, (5, 3000), generator=torch.Generator().manual_seed(0)).float()


def test_it_is_the_table_of_the_definition() -> None:
    x = torch.zeros(100)
    x[17], x[40] = 2.0, -1.0
    cells = sketched(x, 50, 3, 9)
    for row, (first, second) in zip(cells, touched(torch.tensor([17, 40]), 50, 3, 9), strict=True):
        if first != second:
            assert row[first].abs() == 2
            assert row[second].abs() == 1
        assert row.count_nonzero() <= 2


def test_sums_of_sketches_are_the_sketch_of_the_sum() -> None:
    """Exact: whole numbers, and every order of adding them."""
    codec = sketch(width=64)
    parts = [codec.encode(row, 5)["cell"] for row in WHOLE]
    assert torch.equal(sum(parts[1:], parts[0]), codec.encode(WHOLE.sum(dim=0), 5)["cell"])
    assert torch.equal(sum(reversed(parts[:-1]), parts[-1]), codec.encode(WHOLE.sum(dim=0), 5)["cell"])
    assert torch.equal(codec.encode(WHOLE[0] * 0.5, 5)["cell"], parts[0] * 0.5)


def _found(width: int, rows: int, n: int = 5000, k: int = 40) -> float:
    """Share of planted elements that are found, over ten tries."""
    found = 0
    for trial in range(10):
        g = torch.Generator().manual_seed(trial)
        place = torch.randperm(n, generator=g)[:k]
        x = torch.zeros(n)
        x[place] = torch.randn(k, generator=g).sign() * (1 + torch.rand(k, generator=g))
        index, _ = unsketch(sketched(x, width, rows, trial), n, k, trial)
        found += int(torch.isin(place, index).sum())
    return found / (10 * k)


def test_planted_elements_are_found() -> None:
    """Forty cells a row for each, or four and more rows; four and five rows are not enough, as the card says."""
    assert _found(40 * 40, 5) >= 0.99
    assert _found(4 * 40, 15) >= 0.98
    assert _found(4 * 40, 5) < 0.7


def test_noise_disturbs_an_estimate_as_much_as_it_should() -> None:
    """About ||x|| / sqrt(W) times the median's factor for five rows, 0.54 of one row's standard deviation."""
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    for width in (500, 2000):
        error = (estimated(sketched(x, width, 5, 1), 20_000, 1) - x).square().mean().sqrt()
        assert error.item() == pytest.approx(0.54 * (20_000 / width) ** 0.5, rel=0.1)


def test_wide_enough_a_table_holds_everything() -> None:
    x = WHOLE[0]
    decoded = sketch(width=1_000_000).decode(sketch(width=1_000_000).encode(x, 0), 3000, 0)
    assert torch.equal(decoded, x)


def test_options_change_the_result() -> None:
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    codecs = [sketch(100), sketch(200), sketch(100, rows=1), sketch(100, keep=50), sketch(100, keep=60)]
    decoded = [codec.decode(codec.encode(x, 1), 2000, 1) for codec in codecs]
    assert not any(torch.equal(a, b) for i, a in enumerate(decoded) for b in decoded[:i])
    assert not torch.equal(sketch(100).encode(x, 1)["cell"], sketch(100).encode(x, 2)["cell"])
    assert decoded[3].count_nonzero() == 50
    assert torch.equal(decoded[3][decoded[3] != 0], decoded[0][decoded[3] != 0])
    assert torch.equal(sketch(100, keep=2000).decode(sketch(100).encode(x, 1), 2000, 1), decoded[0])


def test_pieces_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("thinwire.codecs.sketch")  # the name in the package is the codec's
    x = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    whole = sketch(64).encode(x, 1)
    decoded = sketch(64).decode(whole, 3000, 1)
    monkeypatch.setattr(module, "_PIECE", 100)
    assert torch.equal(sketch(64).encode(x, 1)["cell"], whole["cell"])
    assert torch.equal(sketch(64).decode(whole, 3000, 1), decoded)


def test_cells_and_signs_are_evenly_drawn() -> None:
    width, n = 10, 200_000
    for row in touched(torch.arange(n), width, 3, 4):
        counts = torch.bincount(row, minlength=width)
        assert len(counts) == width
        assert (counts - n / width).abs().max() < 6 * (n / width) ** 0.5
    alternating = sketched(torch.ones(n), 1, 5, 4)
    assert (alternating.abs() < 6 * n**0.5).all()


@pytest.mark.parametrize("rows", [1, 3, 5, 7])
def test_the_median(rows: int) -> None:
    x = torch.randn(rows, 500, generator=torch.Generator().manual_seed(rows))
    assert torch.equal(_median(list(x)), x.median(dim=0).values)


def test_the_largest_numbers_stay_finite() -> None:
    x = torch.full((1000,), torch.finfo(torch.float32).max)
    fields = sketch(3).encode(x, 0)
    assert fields["cell"].isfinite().all()


@pytest.mark.parametrize("width", [0, -1, 2.5, True, "5", 2**31])
def test_other_widths_are_refused(width: object) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"sketch is to have rows of {width!r} cells\n  expected  a whole")):
        Sketch(width)  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [0, 2, -1, True, 3.0])
def test_other_rows_are_refused(rows: object) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"sketch is to have {rows!r} rows\n  expected  an odd number")):
        sketch(10, rows=rows)  # type: ignore[arg-type]


def test_other_refusals() -> None:
    with pytest.raises(ConfigError, match=r"sketch is to keep 0 estimates\n  expected  a whole number of at least 1"):
        sketch(10, keep=0)
    with pytest.raises(ConfigError, match=r"sketch of a vector of 2147483648 elements\n  expected  fewer than 2\^31"):
        sketch(10).encode(torch.zeros(1).expand(2**31), 0)
