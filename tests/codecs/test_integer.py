"""Golden vectors and options of the blockwise integers; their bounds are in the conformance suite."""

from __future__ import annotations

import re
from typing import get_args

import pytest
import torch

from thinwire.codecs import Codec, Integer, e3m0, int2, int3, int4, int6, int8
from thinwire.codecs.blocks import Rounding
from thinwire.errors import ConfigError, PacketError
from written import again

X = torch.tensor([7, -7, 3.5, -3.4, 0, 1, -1, 0.49])


def test_int4_golden() -> None:
    fields = int4(block=8).encode(X, 0)
    assert fields["scale"].tolist() == [1.0]
    assert bytes(fields["code"].tolist()) == bytes.fromhex("8F 91 7C 85")  # planar: 15|8<<4, 1|9<<4, 12|7<<4, 5|8<<4
    assert int4(block=8).decode(fields, 8, 0).tolist() == [7, -7, 4, -3, 0, 1, -1, 0]  # 3.5 is half way: to even


def test_int8_golden() -> None:
    fields = int8(block=8).encode(X * 127 / 7, 0)
    assert fields["scale"].tolist() == [1.0]
    assert fields["code"].tolist() == [127, -127, 64, -62, 0, 18, -18, 9]


def test_sizes() -> None:
    """Counted by hand: 3907 blocks of 256, the last of 67; 15 626 of 64, the last of 3."""
    assert {name: size for name, (_, size) in int8.layout(1_000_003).items()} == {"scale": 3907, "code": 1_000_003}
    assert {name: size for name, (_, size) in int4.layout(1_000_003).items()} == {"scale": 15_626, "code": 500_002}


def test_a_tail_of_odd_length_is_packed_on_its_own() -> None:
    fields = int4(block=4).encode(torch.tensor([1.0, 2, 3, 7, 7, -7, 1]), 0)
    assert bytes(fields["code"].tolist()) == bytes(
        [9 | 11 << 4, 10 | 15 << 4, 15 | 9 << 4, 1 | 8 << 4]
    )  # the last: pad


def test_results_do_not_depend_on_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from thinwire.codecs import blocks

    x = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    codecs: list[Codec] = [c(block=64, rounding=r) for c in (int8, int4, e3m0) for r in get_args(Rounding)]
    codecs += [int2, int3(grid="zero"), int6(block=64, grid="minmax")]
    whole = [codec.encode(x, 3) for codec in codecs]
    monkeypatch.setitem(blocks._PIECE, "cpu", 128)
    for codec, fields in zip(codecs, whole, strict=True):
        pieced = codec.encode(x, 3)
        assert all(torch.equal(fields[name], pieced[name]) for name in fields)
        assert torch.equal(codec.decode(pieced, 5000, 0), codec.decode(fields, 5000, 0))


def test_a_smaller_block_loses_less() -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) ** 3
    errors = [(int4(block=b).decode(int4(block=b).encode(x, 0), 4096, 0) - x).norm() for b in (32, 256, 4096)]
    assert errors == sorted(errors)


def test_stochastic_rounding_goes_to_a_neighbour_and_depends_on_the_key() -> None:
    codec = int8(block=256, rounding="stochastic")
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    fields = codec.encode(x, 1)
    step = fields["scale"].repeat_interleave(256)[:1000]
    assert ((codec.decode(fields, 1000, 0) - x).abs() <= step * (1 + 2.0**-16)).all()
    assert not torch.equal(fields["code"], codec.encode(x, 2)["code"])
    assert not torch.equal(fields["code"], int8.encode(x, 1)["code"])


def test_small_elements_are_sent_now_and_then() -> None:
    """An 8-bit dither would never send what is below 2^-9 of a step, however often it is asked."""
    codec = int8(rounding="stochastic")
    x = torch.full((256,), 2.0**-10)
    x[0] = 127.0
    sent = sum(codec.decode(codec.encode(x, key), 256, 0)[1:].sum().item() for key in range(400))
    expected = 400 * 255 * 2.0**-10  # a Poisson count of about 100
    assert abs(sent - expected) < 5 * expected**0.5


@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 2.0**-121])
def test_blocks_of_almost_nothing_are_zero(magnitude: float) -> None:
    for codec in (int8(block=4), int4(block=4)):
        x = torch.tensor([magnitude] * 4 + [1.0])
        assert codec.decode(codec.encode(x, 0), 5, 0).tolist() == [0, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("code", -128, "field 'code' holds the reserved code -128"),
        ("scale", float("nan"), "scale that is negative, not finite or too large"),
        ("scale", float("inf"), "scale that is negative, not finite or too large"),
        ("scale", -1.0, "scale that is negative, not finite or too large"),
        ("scale", 3e38, "scale that is negative, not finite or too large"),
    ],
)
def test_what_no_encoder_writes_is_refused(field: str, value: float, said: str) -> None:
    fields = dict(int8(block=8).encode(X, 0))
    fields[field] = fields[field].clone()
    fields[field][0] = value
    with pytest.raises(PacketError, match=said):
        int8(block=8).decode(fields, 8, 0)


def test_the_reserved_nibble_is_refused() -> None:
    fields = dict(int4(block=8).encode(X, 0))
    fields["code"] = fields["code"] & 0xF0
    with pytest.raises(PacketError, match="field 'code' holds the reserved code -8"):
        int4(block=8).decode(fields, 8, 0)


@pytest.mark.parametrize("block", [0, -2, 3, 2.5, True, "64", None])
def test_odd_blocks_are_refused(block: object) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"int4 is to have blocks of {block!r}\n  expected  an even whole")):
        Integer(4, block)  # type: ignore[arg-type]


def test_other_options_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"int8 is to round 'up'\n  expected  rounding='nearest' or"):
        int8(rounding="up")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="int8 is to have blocks of 0"):
        int8(block=0)
    with pytest.raises(ConfigError, match="Integer of 5 bits\n  expected  8, 6, 4, 3 or 2 bits"):
        Integer(5, 64)
    with pytest.raises(ConfigError, match=r"int3 is to have blocks of 4\n  expected  a whole number, a multiple of 8:"):
        int3(block=4)
    with pytest.raises(
        ConfigError, match=r"int4 is to have the grid 'log'\n  expected  grid='symmetric', grid='minmax'"
    ):
        int4(grid="log")  # type: ignore[arg-type]


def test_bare_names_and_calls_are_the_same() -> None:
    assert int8() == int8 == int8(256) == Integer(8, 256)
    assert int4() == int4 == int4(block=64, rounding="nearest")
    assert int8(block=64)(rounding="stochastic") == int8(block=64, rounding="stochastic")
    assert int8(block=64).spec == "int8(block=64)"
    assert int4(grid="zero").spec == "int4(grid='zero')"


# Fewer bits, other grids ----------------------------------------------------------------------------------------------


def test_golden_at_few_bits() -> None:
    """By hand. int3 of 3 2 1 0 -1 -2 -3 0: codes 7 6 5 4 3 2 1 4; their lower two bits 3 2 | 1 0 | 3 2 | 1 0 side by
    side in two bytes (j, j + 2, j + 4, j + 6), their upper ones 1 1 1 1 0 0 0 1 in one."""
    fields = int3(block=8).encode(torch.tensor([3.0, 2, 1, 0, -1, -2, -3, 0]), 0)
    assert fields["code"].tolist() == [3 | 1 << 2 | 3 << 4 | 1 << 6, 2 | 0 << 2 | 2 << 4 | 0 << 6, 0b10001111]
    fields = int2(block=4).encode(torch.tensor([1.0, -1, 0.4, -0.6]), 0)  # 3 1 2 1
    assert fields["code"].tolist() == [3 | 1 << 2 | 2 << 4 | 1 << 6]
    fields = int6(block=4).encode(torch.tensor([31.0, -31, 0, 16]), 0)  # 63 1 32 48
    assert fields["code"].tolist() == [15 | 0 << 4, 1 | 0 << 4, 3 | 0 << 2 | 2 << 4 | 3 << 6]


@pytest.mark.parametrize("codec", [int6(block=12), int3(block=8), int2(block=4)])
def test_tails_of_every_length_come_back(codec: Integer) -> None:
    """Whole numbers up to the largest code, which is there: no rounding at all."""
    largest = 2 ** (codec.bits - 1) - 1
    for n in range(1, 40):
        x = (torch.arange(n) * 5 % (2 * largest + 1) - largest).float()
        x[:: codec.block] = largest
        assert torch.equal(again(codec, x), x)


@pytest.mark.parametrize(("bits", "worst"), [(8, 3.6e-5), (6, 7e-4), (4, 0.012), (3, 0.065), (2, 0.53)])
def test_errors_on_normal_numbers(bits: int, worst: float) -> None:
    x = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    error = ((again(Integer(bits, 64), x) - x).norm() / x.norm()).item() ** 2
    assert 0.8 * worst < error < worst


def test_a_grid_to_both_ends_loses_less_of_what_leans_to_one_side() -> None:
    x = torch.rand(1 << 14, generator=torch.Generator().manual_seed(0)) + 3
    errors = {grid: (again(int4(grid=grid), x) - x).norm().item() for grid in ("minmax", "zero", "symmetric")}
    assert list(errors) == sorted(errors, key=errors.__getitem__)
    assert errors["minmax"] < 0.3 * errors["zero"]


def test_both_ends_of_minmax_are_exact_and_so_is_a_constant() -> None:
    x = torch.tensor([-1.0, 3, 0.1, 2.9, 0.3, 0.3, 0.3, 0.3])
    decoded = again(int2(block=4, grid="minmax"), x)
    assert decoded.tolist() == [-1, 3, pytest.approx(1 / 3), 3, *[x[4].item()] * 4]


def test_zero_stays_zero_on_the_grid_that_has_it() -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) + 0.7
    x[::3] = 0
    for rounding in get_args(Rounding):
        assert not again(int3(grid="zero", rounding=rounding), x)[::3].any()
    fields = int4(block=4, grid="zero").encode(torch.tensor([-1.0, 14, 0, 5]), 0)
    assert fields["scale"].tolist() == [1.0]
    assert fields["zero"].tolist() == [1 - 8]


def test_minmax_gives_energy_to_sparse_blocks_and_claims_nothing_there() -> None:
    x = torch.zeros(256)
    x[:2] = torch.tensor([1.0, -1.0])
    for bits, energy in ((2, 14.1), (3, 2.6), (4, 0.56)):
        minmax = Integer(bits, 256, grid="minmax")
        assert ((again(minmax, x) - x).square().sum() / 2).item() == pytest.approx(energy, rel=0.02)
        assert (minmax.contraction(256) is None) == (energy > 1)
        for grid in ("symmetric", "zero"):
            assert torch.equal(again(Integer(bits, 256, grid=grid), x)[2:], x[2:])
            assert Integer(bits, 256, grid=grid).contraction(256) is not None


def test_no_end_is_cut_at_random() -> None:
    """Rounding at random is right in the mean only if the last level is not below the last number."""
    x = torch.tensor([-1.0, 1.4, 0, 0]).repeat(200)
    codec = int2(block=4, grid="zero", rounding="stochastic")
    mean = torch.stack([again(codec, x, key) for key in range(50)]).double().mean(dim=0).view(-1, 4).mean(dim=0)
    assert mean.tolist() == pytest.approx([-1, 1.4, 0, 0], abs=5 * 0.6 / 100)
    assert again(int2(block=4, grid="zero"), x)[:2].tolist() == pytest.approx([-0.8, 1.6])


def test_spreads_beyond_the_largest_float() -> None:
    x = torch.tensor([1.0, -1, 0.5, 0]) * torch.finfo(torch.float32).max
    for grid in ("minmax", "zero"):
        for codec in (int8(block=4, grid=grid), int2(block=4, grid=grid)):
            decoded = again(codec, x)
            assert decoded.isfinite().all()
            assert bool(((decoded / 2 - x / 2).abs() <= 0.5001 * x[0] / codec._steps).all())


def test_what_no_encoder_writes_of_other_grids_is_refused() -> None:
    fields = dict(int4(block=8, grid="minmax").encode(X, 0))
    for centre, scale in ((float("nan"), 1.0), (float("inf"), 1.0), (-3e38, 1e37)):
        wrong = {"centre": torch.tensor([centre]), "scale": torch.tensor([scale])}
        with pytest.raises(PacketError, match="field 'centre' holds a centre that is not finite or too large"):
            int4(block=8, grid="minmax").decode({**fields, **wrong}, 8, 0)
    with pytest.raises(PacketError, match="scale that is negative, not finite or too large"):
        int4(block=8, grid="minmax").decode({**fields, "scale": torch.tensor([-1.0])}, 8, 0)
