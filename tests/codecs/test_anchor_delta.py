"""Deltas to anchors: their bound, what they save on a cache whose tokens are alike, layers and groups."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from thinwire.codecs import AnchorDelta, anchor_delta, parse
from thinwire.errors import ConfigError, PacketError
from written import again


def _cache(tokens: int, channels: int, seed: int = 0) -> Tensor:
    """Each channel an AR(1) = 0.95 process of its own size.  [tokens, channels]"""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, channels, generator=g)
    for t in range(1, tokens):
        x[t] = 0.95 * x[t - 1] + math.sqrt(1 - 0.95**2) * x[t]
    return x * torch.randn(channels, generator=g).exp()


def _entropy(codes: Tensor) -> float:
    """Bits a code."""
    p = codes.unique(return_counts=True)[1].double() / codes.numel()
    return -(p * p.log2()).sum().item()


@pytest.mark.parametrize("bins", [(0.1,), (0.5,), (1.5,)])
def test_no_element_is_off_by_more_than_half_a_step(bins: tuple[float]) -> None:
    x = _cache(95, 8)
    codec = anchor_delta(8, bins=bins)
    fields = codec.encode(x.view(-1), 0)
    off = (again(codec, x) - x).abs()
    heads = torch.arange(95) % 10 == 0
    rounding = 4 * 2.0**-23 * x.abs().amax(dim=0)
    assert (off[~heads] <= fields["half"] + rounding).all()
    assert (off[heads] <= fields["scale"] / 2 + rounding).all()
    assert (off[~heads].amax(dim=0) > 0.8 * fields["half"]).all()


def test_the_step_is_the_bin_in_units_of_the_deltas() -> None:
    x = _cache(400, 4)
    fields = anchor_delta(4, bins=(0.5,)).encode(x.view(-1), 0)
    anchors = fields["anchor"].view(-1, 4) * fields["scale"]
    deltas = x.view(40, 10, 4)[:, 1:] - anchors[:, None]
    rms = deltas.square().mean(dim=(0, 1)).sqrt()
    torch.testing.assert_close(2 * fields["half"], 0.5 * rms, rtol=1e-4, atol=0)


def test_differences_take_fewer_bits_than_the_numbers() -> None:
    """The issue's own example: steps of sigma / 4. Differences to the token before would take fewer still."""
    x = _cache(1000, 64)
    sigma = x.std(dim=0)
    deltas = x.view(100, 10, 64)[:, 1:] - x.view(100, 10, 64)[:, :1]
    width = (0.25 * sigma / deltas.square().mean(dim=(0, 1)).sqrt()).mean().item()
    plain = _entropy((x / (0.25 * sigma)).round())
    code = (anchor_delta(64, bins=(width,)) | parse("rans")).encode(x.view(-1), 0)["code"]
    coded = 8 * code.numel() / (900 * 64)
    assert plain == pytest.approx(4.07, abs=0.05)
    assert coded == pytest.approx(3.48, abs=0.05)


@pytest.mark.parametrize(("width", "bits"), [(0.5, 3.05), (1.0, 2.10), (1.5, 1.57)])
def test_normal_deltas_take_the_bits_that_the_card_says(width: float, bits: float) -> None:
    x = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0))
    x[::10] = 0
    code = (anchor_delta(16, bins=(width,)) | parse("rans")).encode(x.view(-1), 0)["code"]
    assert 8 * code.numel() / (1800 * 16) == pytest.approx(bits, abs=0.05)


def test_layers_have_scales_anchors_and_bins_of_their_own() -> None:
    parts = [_cache(25, 4, seed) * 10.0**seed for seed in range(3)]
    x = torch.cat(parts).view(-1)
    whole = anchor_delta(4, layers=3).encode(x, 0)
    for layer, (part, width) in enumerate(zip(parts, (0.5, 1.0, 1.5), strict=True)):
        alone = anchor_delta(4, bins=(width,)).encode(part.view(-1), 0)
        assert torch.equal(alone["half"], whole["half"].view(3, 4)[layer])
        assert torch.equal(alone["code"], whole["code"].view(3, -1)[layer])
    six = anchor_delta(4, layers=6, bins=(0.5, 2.0))
    assert [six._bin(layer) for layer in range(6)] == [0.5, 0.5, 0.5, 2.0, 2.0, 2.0]


def test_tokens_like_their_anchor_cost_nothing() -> None:
    x = torch.tensor([[3.0, -127.0], [1.0, 2.0]]).repeat_interleave(5, dim=0)
    fields = anchor_delta(2, group=5).encode(x.view(-1), 0)
    assert fields["anchor"].view(2, 2)[:, 0].tolist() == [127, 42]
    assert (fields["code"].view(2, 4, 2)[0] == 0).all()
    assert again(anchor_delta(2, group=5), x)[0].tolist() == [3.0, -127.0]


def test_an_outlier_widens_the_step_rather_than_be_cut_off() -> None:
    x = torch.randn(5000, 1, generator=torch.Generator().manual_seed(0))
    x[777] = 1e4
    codec = anchor_delta(1, bins=(0.1,))
    half = codec.encode(x.view(-1), 0)["half"].item()
    assert 2 * half * 127 == pytest.approx(1e4, rel=1e-2)
    assert (again(codec, x) - x)[777].abs() <= 1.01 * half


@pytest.mark.parametrize("value", [3.4e38, -3.4e38, 1e-38, 0.0])
def test_the_limits_of_float32(value: float) -> None:
    x = torch.tensor([[value], [-value], [value / 2], [value]])
    decoded = again(anchor_delta(1, group=4, bins=(1 / 64,)), x)
    torch.testing.assert_close(decoded, x, rtol=0, atol=max(abs(value) / 60, 2.0**-110))


def test_options_and_their_expression() -> None:
    codec = anchor_delta(128, layers=12, group=5, bins=(0.5, 1))
    assert codec.spec == "anchor_delta(channels=128, layers=12, group=5, bins=(0.5, 1.0))"
    assert parse(codec.spec) == codec
    assert anchor_delta(8, bins=(0.25,)).spec == "anchor_delta(channels=8, bins=(0.25,))"
    assert parse("anchor_delta(8)").spec == "anchor_delta(channels=8)"
    assert [anchor_delta(8, group=g).layout(800)["anchor"][1] for g in (2, 10, 100)] == [400, 80, 8]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"channels": 0}, "anchor_delta is to have 0 channels\n  expected  a whole number of at least 1"),
        ({"layers": 0}, "anchor_delta is to have layers=0\n  expected  a whole number of at least 1: how many layers"),
        ({"layers": True}, "anchor_delta is to have layers=True\n"),
        ({"group": 1}, "anchor_delta is to have group=1\n  expected  a whole number of at least 2: how many tokens"),
        ({"group": 2.0}, "anchor_delta is to have group=2.0\n"),
        ({"bins": ()}, r"anchor_delta is to have bins=\(\)\n  expected  a tuple of numbers from 2\^-10"),
        ({"bins": (1, 0)}, r"anchor_delta is to have bins=\(1, 0\)"),
        ({"bins": (math.nan,)}, r"anchor_delta is to have bins=\(nan,\)"),
        ({"bins": 0.5}, r"anchor_delta is to have bins=0.5"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        AnchorDelta(**{"channels": 8, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("scale", -1.0, "holds a scale"),
        ("half", math.inf, "holds a scale"),
        ("half", 1e37, "holds a scale"),
        ("code", -128, "reserved code -128"),
        ("anchor", -128, "reserved code -128"),
    ],
)
def test_what_no_encoder_writes_is_refused(name: str, value: float, said: str) -> None:
    fields = dict(anchor_delta(4).encode(_cache(12, 4).view(-1), 0))
    fields[name] = torch.full_like(fields[name], value)
    with pytest.raises(PacketError, match=f"field '{name}' .*{said}"):
        anchor_delta(4).decode(fields, 48, 0)
