"""Golden vector, boundaries and options of the floats without mantissa."""

from __future__ import annotations

import pytest
import torch

from thinwire.codecs import Codec, Log, e2m0, e3m0, e4m0, int4
from thinwire.errors import ConfigError, PacketError

X = torch.tensor([7, -7, 3.5, -3.4, 0, 1, -1, 0.49])


def test_golden() -> None:
    fields = e3m0(block=8).encode(X, 0)
    assert fields["scale"].tolist() == [7.0]
    # nibbles 7 15 6 14 | 0 4 12 3, the second half of the block in the upper halves of the bytes
    assert bytes(fields["code"].tolist()) == bytes.fromhex("07 4F C6 3E")
    assert e3m0(block=8).decode(fields, 8, 0).tolist() == [7, -7, 3.5, -3.5, 0, 0.875, -0.875, 0.4375]


def _decoded(*ratios: float) -> list[float]:
    x = torch.tensor([1.0, *ratios])
    return e3m0.decode(e3m0.encode(x, 0), len(x), 0)[1:].tolist()


def test_boundaries_are_half_way_in_linear_distance() -> None:
    """At 1.5 times a power of two, not at its geometric mean; one float below goes down."""
    for exponent in range(-6, 0):
        half_way = torch.tensor(1.5 * 2.0**exponent)
        below = torch.nextafter(half_way, torch.tensor(0.0))
        assert _decoded(half_way.item(), below.item()) == [2.0 ** (exponent + 1), 2.0**exponent]


def test_zero_begins_half_way_below_the_smallest_level() -> None:
    below = torch.nextafter(torch.tensor(2.0**-7), torch.tensor(0.0)).item()
    assert _decoded(2.0**-7, below, -(2.0**-7), -below) == [2.0**-6, 0, -(2.0**-6), 0]


def test_it_is_the_nearest_of_the_fifteen_numbers() -> None:
    x = (torch.randn(4096, generator=torch.Generator().manual_seed(0)) ** 3).clamp(-30, 30)
    x[::64] = 30.0  # each block's maximum
    magnitudes = 30.0 * torch.tensor([0.0, *(2.0**-i for i in range(7))])
    nearest = (x[:, None] - torch.cat([magnitudes, -magnitudes])).abs().amin(dim=1)
    codec = e3m0(block=64)
    assert torch.equal((codec.decode(codec.encode(x, 0), 4096, 0) - x).abs(), nearest)


def test_stochastic_rounding_goes_to_a_neighbour_with_its_probability() -> None:
    codec = e3m0(block=1 << 16, rounding="stochastic")
    for ratio, lower, upper in ((0.3, 0.25, 0.5), (1 / 100, 0.0, 1 / 64), (0.5, 0.5, 0.5)):
        x = torch.full((1 << 16,), ratio)
        x[0] = 1.0
        decoded = codec.decode(codec.encode(x, 1), len(x), 0)[1:]
        assert set(decoded.tolist()) <= {lower, upper}
        standard_error = (upper - lower) / 2 / 2**8
        assert abs(decoded.double().mean().item() - torch.tensor(ratio).item()) <= 5 * standard_error


def test_heavy_tails_are_where_it_beats_int4() -> None:
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(1 << 14, generator=g)
    heavy = normal.sign() * (2 * torch.randn(1 << 14, generator=g)).exp()

    def error(codec: Codec, x: torch.Tensor) -> float:
        return ((codec.decode(codec.encode(x, 0), len(x), 0) - x).norm() / x.norm()).item() ** 2

    assert error(e3m0, heavy) < 0.5 * error(int4(block=256), heavy)
    assert error(e3m0, normal) > 2 * error(int4(block=256), normal)


def test_minus_zero_is_reserved() -> None:
    fields = dict(e3m0(block=8).encode(torch.tensor([-0.0, 1, -1e-9, 1, 1, 1, 1, 1]), 0))
    assert fields["code"].tolist()[::2] == [0x70, 0x70]
    fields["code"][0] = 0x78
    with pytest.raises(PacketError, match="field 'code' holds the reserved code 8"):
        e3m0(block=8).decode(fields, 8, 0)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0])
def test_impossible_scales_are_refused(scale: float) -> None:
    fields = dict(e3m0(block=8).encode(X, 0))
    fields["scale"] = torch.tensor([scale])
    with pytest.raises(PacketError, match="scale that is negative, not finite"):
        e3m0(block=8).decode(fields, 8, 0)


def test_options_are_checked_and_change_the_result() -> None:
    with pytest.raises(ConfigError, match="e3m0 is to have blocks of 7"):
        e3m0(block=7)
    with pytest.raises(ConfigError, match="e3m0 is to round 'down'"):
        e3m0(rounding="down")  # type: ignore[arg-type]
    x = torch.randn(512, generator=torch.Generator().manual_seed(0))
    results = [c.decode(c.encode(x, 0), 512, 0) for c in (e3m0, e3m0(block=32), e3m0(rounding="stochastic"))]
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert e3m0() == e3m0 == Log(3)


@pytest.mark.parametrize(("codec", "top"), [(e2m0, 3), (e3m0, 7), (e4m0, 15)])
def test_the_levels_are_the_powers_of_two_below_the_maximum(codec: Log, top: int) -> None:
    levels = [0.0, *(2.0**-i for i in range(top))]
    x = torch.tensor([*levels, *(-level for level in levels)]) * 3
    assert torch.equal(codec.decode(codec.encode(x, 0), len(x), 0), x)
    half_way = torch.tensor([3.0, 3 * 2.0**-top, 3 * 2.0**-top * (1 - 2.0**-23)])
    assert codec.decode(codec.encode(half_way, 0), 3, 0).tolist() == [3, 3 * 2.0 ** (1 - top), 0]


def test_the_smallest_level_keeps_all_its_digits_or_is_zero() -> None:
    x = torch.tensor([1.1 * 2.0**-112, 1.1 * 2.0**-126])
    assert torch.equal(e4m0.decode(e4m0.encode(x, 0), 2, 0), x)
    assert not e4m0.decode(e4m0.encode(x / 2, 0), 2, 0).any()


def test_more_exponent_bits_reach_further_down() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1 << 14, generator=g).sign() * (3 * torch.randn(1 << 14, generator=g)).exp()
    zeros = [(c.decode(c.encode(x, 0), len(x), 0) == 0).float().mean().item() for c in (e4m0, e3m0, e2m0)]
    assert zeros == sorted(zeros)
    assert zeros[0] < 0.4 * zeros[1]


def test_other_numbers_of_exponent_bits_are_refused() -> None:
    with pytest.raises(ConfigError, match="Log of 5 exponent bits\n  expected  2, 3 or 4"):
        Log(5)
    with pytest.raises(ConfigError, match="e2m0 is to have blocks of 4\n  expected  a whole number, a multiple of 8:"):
        e2m0(block=4)
