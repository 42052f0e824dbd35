"""Random-k: which entries are drawn, that positions need not be sent, and what scaling does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from thinwire.codecs import RandK, parse, randk
from thinwire.codecs.randk import _drawn
from thinwire.errors import ConfigError
from thinwire.randomness import mix

CPU = torch.device("cpu")


def drawn(n: int, k: int, key: int) -> Tensor:
    return torch.cat([p for _, _, p in _drawn(n, k, key, CPU)])


X = torch.randn(1000, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 3), (7, 7), (1000, 1), (1000, 999), (1000, 300), (2**33 + 5, 1000)])
def test_entries_are_drawn_without_replacement(n: int, k: int) -> None:
    for key in range(20):
        p = drawn(n, k, mix(key))
        assert len(p.unique()) == k
        assert 0 <= int(p.min()) <= int(p.max()) < n


@pytest.mark.parametrize(("n", "k"), [(7, 3), (10, 4), (12, 11), (5, 5), (1, 1)])
def test_every_entry_is_drawn_equally_often(n: int, k: int) -> None:
    """Strata of unequal sizes; chi-squared with n - 1 degrees of freedom at most, five standard deviations above."""
    draws = 2000
    counts = torch.zeros(n)
    for key in range(draws):
        counts[drawn(n, k, mix(key))] += 1
    expected = draws * k / n
    assert float(((counts - expected) ** 2 / expected).sum()) < n + 5 * (2 * n) ** 0.5


def test_all_parts_are_heard_each_time() -> None:
    counts = torch.bincount(drawn(1 << 16, 1 << 10, 5) >> 12, minlength=16)
    assert int(counts.min()) >= 62
    assert int(counts.max()) <= 66


def test_entries_change_with_the_key_alone() -> None:
    a, b = randk(0.1).encode(X, 1)["value"], randk(0.1).encode(2 * X, 1)["value"]
    assert torch.equal(2 * a, b)
    assert not torch.equal(randk(0.1).encode(X, 2)["value"], a)


def test_pieces_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    from thinwire.codecs import blocks

    p, fields = drawn(100_003, 5000, 7), randk(1 / 3).encode(X, 7)
    monkeypatch.setitem(blocks._PIECE, "cpu", 100)
    assert torch.equal(drawn(100_003, 5000, 7), p)
    assert torch.equal(randk(1 / 3).encode(X, 7)["value"], fields["value"])
    assert torch.equal(p.sort().values, p.roll(-int((p.diff() < 0).nonzero()) - 1))  # ascending but for the end


def test_what_is_decoded() -> None:
    plain, scaled = randk(0.1), randk(0.1, scaled=True)
    fields = plain.encode(X, 3)
    assert torch.equal(fields["value"], scaled.encode(X, 3)["value"])
    decoded = plain.decode(fields, 1000, 3)
    assert torch.equal(decoded[decoded != 0], X[decoded != 0])
    assert int((decoded != 0).sum()) == 100
    assert torch.equal(scaled.decode(fields, 1000, 3), 10 * decoded)
    assert not torch.equal(plain.decode(fields, 1000, 4), decoded)


def test_everything_is_drawn_at_full_rate() -> None:
    for codec in (randk(1), randk(1, scaled=True)):
        assert torch.equal(codec.decode(codec.encode(X, 3), 1000, 3), X)


def test_sums_of_fields_are_fields_of_sums() -> None:
    """Whole numbers: float32 sums of them are exact."""
    a, b = X.mul(8).round(), X.flip(0).mul(8).round()
    for codec in (randk(0.1), randk(0.1, scaled=True)):
        summed = codec.encode(a, 3)["value"] + codec.encode(b, 3)["value"]
        assert torch.equal(summed, codec.encode(a + b, 3)["value"])
        assert codec.traits.linear


def test_the_claims_are_equalities() -> None:
    """E||x - C(x)||^2 is (1 - k/n) ||x||^2, and (n/k - 1) ||x||^2 scaled: a coordinate is drawn or not, no more."""
    x = torch.tensor([1.0, 2, 4, 8, 16])
    energy = float(x.square().sum())
    for codec, factor in ((randk(0.4), 0.6), (randk(0.4, scaled=True), 1.5)):
        errors = [float((codec.decode(codec.encode(x, mix(i)), 5, mix(i)) - x).square().sum()) for i in range(2000)]
        assert sum(errors) / len(errors) == pytest.approx(factor * energy, rel=0.08)
    assert randk(0.4).contraction(5) == 0.4
    assert randk(0.4, scaled=True).variance(5) == pytest.approx(1.5)


def test_nothing_becomes_infinite() -> None:
    x = torch.full((8,), -torch.finfo(torch.float32).max)
    codec = randk(0.25, scaled=True)
    assert codec.decode(codec.encode(x, 0), 8, 0).isfinite().all()


def test_options() -> None:
    assert parse("randk(1/8, scaled=True)") == randk(0.125, scaled=True)
    assert randk(1 / 8).spec == "randk(0.125)"
    assert randk(1 / 8).traits.wants_feedback
    assert not randk(1 / 8, scaled=True).traits.wants_feedback
    assert [randk(s).layout(1000)["value"][1] for s in (1e-9, 1 / 64, 0.5, 1)] == [1, 16, 500, 1000]


@pytest.mark.parametrize("share", [0, -0.1, 1.5, float("nan"), "1/64", True, None])
def test_shares_out_of_range_are_refused(share: object) -> None:
    with pytest.raises(ConfigError, match=r"randk is to keep a share of .*\n  expected  a number in \(0, 1\]"):
        RandK(share)  # type: ignore[arg-type]


def test_scaled_is_yes_or_no() -> None:
    with pytest.raises(ConfigError, match=r"randk\(scaled=8\)\n  expected  True or False"):
        RandK(0.1, scaled=8)  # type: ignore[arg-type]
