"""Channel-separable quantisation: its bound, what c is for, its guards, and the tokens it is mixed for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinwire.codecs import CST, cst, join_tokens, parse, salient_tokens, split_tokens
from thinwire.codecs.cst import _bfloat_above, _bfloat_below
from thinwire.errors import ConfigError, PacketError
from written import again


def _cache(tokens: int, channels: int, spread: float = 1.0) -> torch.Tensor:
    """Normal numbers whose channels have log-normal scales."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(tokens, channels, generator=g) * (spread * torch.randn(channels, generator=g)).exp()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("size", [1, 5, 127, 1000])
def test_no_element_is_off_by_more_than_half_a_step(bits: int, size: int) -> None:
    x = _cache(1, size).view(-1) + 3
    codec = cst(10, bits=bits)
    fields = codec.encode(x, 0)
    token = torch.arange(size) // 10
    allowed = fields["channel"][torch.arange(size) % 10] * fields["step"].float()[token] / 2
    # A few roundings of numbers up to the token's largest, beside the bound.
    assert ((codec.decode(fields, size, 0) - x).abs() <= allowed + 4 * 2.0**-23 * x.abs().max()).all()


@pytest.mark.parametrize(("bits", "published"), [(2, 0.209), (4, 0.0085)])
def test_channels_of_different_size_do_not_crowd_each_other_out(bits: int, published: float) -> None:
    x = _cache(256, 128)
    low = x.amin(dim=1, keepdim=True)
    step = (x.amax(dim=1, keepdim=True) - low) / ((1 << bits) - 1)
    token_wise = (((x - low) / step).round() * step + low - x).square().sum() / x.square().sum()
    ours = (again(cst(128, bits=bits), x) - x).square().sum() / x.square().sum()
    assert ours < token_wise / 4
    assert ours < 1.1 * published


def test_with_one_size_of_channels_it_is_token_wise() -> None:
    """c = 1 for every channel: plain grids, and numbers on one are exact."""
    x = torch.randint(0, 16, (40, 8), generator=torch.Generator().manual_seed(0)).float() / 16
    x[0] = 1.0
    x[1:, 0], x[1:, 1] = 0.0, 15 / 16
    assert torch.equal(again(cst(8), x), x)


def test_dead_channels_and_equal_tokens() -> None:
    x = _cache(6, 4)
    x[:, 2] = 0.0
    x[3] = 0.0
    x[4] = 1e-38
    decoded = again(cst(4), x)
    assert (decoded[:, 2] == 0).all()
    assert (decoded[3] == 0).all()
    assert decoded.isfinite().all()
    constant = torch.full((5, 4), -0.3)
    torch.testing.assert_close(again(cst(4), constant), constant, rtol=2**-9, atol=0)


def test_more_bits_lose_less_and_more_channels_share_fewer_steps() -> None:
    x = _cache(64, 32)
    errors = [(again(cst(32, bits=bits), x) - x).square().sum().item() for bits in (2, 4, 8)]
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
    assert [cst(c).layout(2048)["step"][1] for c in (1, 32, 2048)] == [2048, 64, 1]
    assert parse("cst(32, 2)") == cst(32, bits=2)
    assert cst(32, bits=2).spec == "cst(channels=32, bits=2)"


def test_the_last_row_may_be_short() -> None:
    x = _cache(1, 37).view(-1)
    whole = torch.cat([x, x.new_zeros(3)])
    fields = cst(10).encode(x, 0)
    assert torch.equal(fields["low"][:3], cst(10).encode(whole, 0)["low"][:3])
    assert (cst(10).decode(fields, 37, 0) - x).abs().max() < 0.2 * x.abs().max()


@given(st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**64), max_value=2.0**64))
def test_lowest_values_are_rounded_down_and_steps_up(value: float) -> None:
    x = torch.tensor([value])
    if abs(value) >= 2.0**-120:
        below = _bfloat_below(x)
        assert torch.equal(below.bfloat16().float(), below)
        assert below <= x <= below + 2**-7 * x.abs()
        above = _bfloat_above(x.abs())
        assert torch.equal(above.bfloat16().float(), above)
        assert x.abs() <= above <= (1 + 2**-7) * x.abs()
    else:
        assert _bfloat_below(x) == 0


def test_saliency_does_not_favour_the_tokens_that_all_can_see() -> None:
    attention = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.4, 0.3, 0.3, 0], [0.1, 0.1, 0.1, 0.7]])
    rows = torch.tensor([1, 2, 3])
    # Columns sum to 1.0, 0.9, 0.4, 0.7; the fourth is seen by one row only.
    assert salient_tokens(attention[rows], rows, 0.25).tolist() == [False, False, False, True]
    assert salient_tokens(attention[rows], rows, 0.3).tolist() == [True, False, False, True]
    assert salient_tokens(attention[rows], rows, 0).tolist() == [False] * 4
    assert salient_tokens(attention[rows], rows, 1).tolist() == [True] * 4


def test_tokens_taken_apart_are_put_together() -> None:
    x, chosen = _cache(9, 5).view(-1), torch.arange(9) % 3 == 0
    parts = split_tokens(x, 5, chosen)
    assert [len(part) for part in parts] == [15, 30]
    assert torch.equal(join_tokens(*parts, 5, chosen), x)
    assert torch.equal(parts[0], x.view(9, 5)[[0, 3, 6]].view(-1))


@pytest.mark.parametrize("channels", [0, -1, 2.0, True, "8", None])
def test_what_is_no_number_of_channels_is_refused(channels: object) -> None:
    with pytest.raises(ConfigError, match=r"cst is to have .* channels\n  expected  a whole number of at least 1"):
        CST(channels)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [1, 3, 16, True, "4", None])
def test_widths_it_does_not_have_are_refused(bits: object) -> None:
    with pytest.raises(ConfigError, match=r"cst is to have codes of .* bits\n  expected  2, 4 or 8"):
        CST(8, bits)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [("channel", -1.0), ("channel", torch.inf), ("step", torch.nan), ("step", -1.0), ("low", torch.inf), ("low", 1e30)],
)
def test_scales_that_no_encoder_writes_are_refused(name: str, value: float) -> None:
    fields = dict(cst(4).encode(_cache(3, 4).view(-1), 0))
    fields[name] = torch.full_like(fields[name], value)
    with pytest.raises(PacketError, match=f"field '{name}' holds a"):
        cst(4).decode(fields, 12, 0)
