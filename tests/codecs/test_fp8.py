"""8-bit floats against the framework's own, at every boundary, and their options."""

from __future__ import annotations

import re

import pytest
import torch

from thinwire.codecs import FP8, fp8
from thinwire.errors import ConfigError, PacketError

FORMATS = [("e4m3", torch.float8_e4m3fn, 448.0), ("e5m2", torch.float8_e5m2, 57344.0)]


@pytest.mark.parametrize(("format", "dtype", "largest"), FORMATS)
def test_the_bits_are_the_frameworks_cast(format: str, dtype: torch.dtype, largest: float) -> None:
    """Every finite number, every middle between neighbours, and the floats around both; then random ones."""
    grid = torch.arange(128, dtype=torch.uint8).view(dtype).float()
    grid = grid[grid <= largest].unique()
    grid = grid[grid.isfinite()]
    points = torch.cat([grid, (grid[1:] + grid[:-1]) / 2])
    near = [torch.nextafter(points, torch.tensor(end)).clamp(max=largest) for end in (0.0, largest)]
    wide = (6 * torch.randn(20_000, generator=torch.Generator().manual_seed(0)) - 3).exp2().clamp(max=largest)
    x = torch.cat([torch.tensor([largest]), points, *near, wide])
    x = torch.cat([x, -x]) + 0.0  # no minus zero: it is written as zero
    codec = fp8(format, block=2 * len(x))  # one block, whose scale is 1
    fields = codec.encode(x, 0)
    assert fields["scale"].tolist() == [1.0]
    assert torch.equal(fields["code"], x.to(dtype).view(torch.uint8))
    assert torch.equal(codec.decode(fields, len(x), 0), x.to(dtype).float())


@pytest.mark.parametrize(("format", "dtype", "largest"), FORMATS)
def test_every_finite_code_is_read_and_no_other(format: str, dtype: torch.dtype, largest: float) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    value = codes.view(dtype).float()
    codec = fp8(format, block=2)
    for code, due in zip(codes, value, strict=True):
        fields = {"scale": torch.ones(1), "code": code.reshape(1)}
        if due.isfinite():
            assert codec.decode(fields, 1, 0).item() == due
        else:
            with pytest.raises(PacketError, match=r"field 'code' holds 0x7., which is no finite number"):
                codec.decode(fields, 1, 0)


def test_errors_on_normal_numbers() -> None:
    x = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    errors = [((c.decode(c.encode(x, 0), len(x), 0) - x).norm() / x.norm()).item() ** 2 for c in (fp8, fp8("e5m2"))]
    assert errors == pytest.approx([7.0e-4, 2.8e-3], rel=0.1)


def test_a_block_of_its_own_keeps_small_numbers() -> None:
    x = torch.tensor([1e6, 1.0, 1e-3, 1e-3])
    assert fp8(block=4).decode(fp8(block=4).encode(x, 0), 4, 0)[2:].tolist() == [0, 0]
    assert fp8(block=2).decode(fp8(block=2).encode(x, 0), 4, 0)[2:].tolist() == pytest.approx([1e-3, 1e-3])


def test_options() -> None:
    assert fp8() == fp8 == FP8("e4m3", 256)
    assert fp8("e5m2", block=64).spec == "fp8(format='e5m2', block=64)"
    with pytest.raises(ConfigError, match=re.escape("fp8 is to have the format 'e3m4'\n  expected  format='e4m3' or")):
        fp8("e3m4")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="fp8 is to have blocks of 7"):
        fp8(block=7)


def test_impossible_scales_are_refused() -> None:
    fields = dict(fp8(block=4).encode(torch.ones(4), 0))
    for scale in (float("nan"), -1.0, 1e36):
        with pytest.raises(PacketError, match="scale that is negative, not finite or too large"):
            fp8(block=4).decode({**fields, "scale": torch.tensor([scale])}, 4, 0)
