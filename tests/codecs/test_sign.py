"""Signs: the golden vector, the error to the last digit, and what the scale is."""

from __future__ import annotations

import re

import pytest
import torch

from thinwire.codecs import Sign, sign
from thinwire.errors import ConfigError, PacketError
from written import again

X = torch.tensor([7, -7, 3.5, -3.4, 0, 1, -1, 0.49])


def _heavy(n: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, generator=g).sign() * (2 * torch.randn(n, generator=g)).exp()


def test_golden() -> None:
    """Zero counts as positive: bits 1 0 1 0 1 1 0 1 from the lowest up."""
    fields = sign(block=8).encode(X, 0)
    assert fields["code"].tolist() == [0xB5]
    assert fields["scale"].tolist() == [pytest.approx(2.92375, rel=1e-6)]
    assert again(sign(block=8), X).sign().tolist() == [1, -1, 1, -1, 1, 1, -1, 1]


def test_bits_are_planar_and_the_pad_is_zero() -> None:
    x = -torch.ones(16)
    x[[0, 2, 15]] = 1
    assert sign(block=16).encode(x, 0)["code"].tolist() == [0b11, 0b10000000]  # bit i of byte j is that of 2 i + j
    assert sign(block=16).encode(torch.ones(3), 0)["code"].tolist() == [0b111]


@pytest.mark.parametrize(("n", "block"), [(4096, 1024), (1000, 64), (77, 1024)])
def test_the_error_is_what_the_block_has_beyond_its_mean_magnitude(n: int, block: int) -> None:
    """(1 - rho^2) ||x||^2, each block for itself; float32 means, squared errors in float64."""
    for x in (_heavy(n), torch.randn(n, generator=torch.Generator().manual_seed(1))):
        error = (again(sign(block=block), x).double() - x).square().sum().item()
        parts = x.double().split(block)
        due = sum((p.square().sum() - p.abs().sum() ** 2 / len(p)).item() for p in parts)
        assert error == pytest.approx(due, rel=1e-6)


def test_two_means_leave_the_spread_about_each() -> None:
    x = _heavy(4096) + 0.3
    codec = sign(block=256, scale="two-means")
    error = (again(codec, x).double() - x).square().sum().item()
    due = 0.0
    for part in x.double().split(256):
        for half in (part[part >= 0], part[part < 0]):
            due += (half - half.mean()).square().sum().item()
    assert error == pytest.approx(due, rel=1e-6)
    assert error < (again(sign(block=256), x).double() - x).square().sum().item()


def test_one_sided_blocks() -> None:
    codec = sign(block=8, scale="two-means")
    for x in (torch.full((8,), 0.75), torch.full((8,), -0.75)):
        assert torch.equal(again(codec, x), x)
    assert torch.equal(again(codec, torch.tensor([1.0, -3] * 4)), torch.tensor([1.0, -3] * 4))


def test_fractions_of_known_distributions() -> None:
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(1 << 16, generator=g)
    laplace = normal.sign() * -torch.rand(1 << 16, generator=g).clamp(min=1e-12).log()
    for x, fraction in ((normal, 0.363), (laplace, 0.5)):
        assert ((again(sign, x) - x).norm() / x.norm()).item() ** 2 == pytest.approx(fraction, abs=0.02)


def test_extremes_stay_finite() -> None:
    x = torch.tensor([1.0, 1, -1, 1]).repeat(300) * torch.finfo(torch.float32).max
    for codec in (sign, sign(scale="two-means")):
        assert again(codec, x).isfinite().all()
        torch.testing.assert_close(again(codec, x), x)
        assert not again(codec, torch.zeros(9)).any()


def test_bits_beyond_the_end_are_ignored() -> None:
    fields = dict(sign.encode(torch.ones(3), 0))
    assert sign.decode({**fields, "code": fields["code"] | 0xF8}, 3, 0).tolist() == [1, 1, 1]


def test_impossible_scales_are_refused() -> None:
    fields = dict(sign(scale="two-means").encode(X, 0))
    for name, value, said in (
        ("scale", -1.0, "a scale that is negative"),
        ("centre", float("nan"), "a centre that is"),
    ):
        with pytest.raises(PacketError, match=f"field '{name}' holds {said}"):
            sign(scale="two-means").decode({**fields, name: torch.tensor([value])}, 8, 0)


def test_options() -> None:
    assert sign() == sign == Sign(1024, "mean")
    assert sign(64, scale="two-means").spec == "sign(block=64, scale='two-means')"
    with pytest.raises(ConfigError, match=re.escape("sign is to have blocks of 4\n  expected  a whole number, a mult")):
        sign(block=4)
    with pytest.raises(ConfigError, match=re.escape("sign is to have the scale 'l2'\n  expected  scale='mean' or")):
        sign(scale="l2")  # type: ignore[arg-type]
