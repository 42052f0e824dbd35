"""Float casts against the framework's own, and at the ends of their ranges."""

from __future__ import annotations

import pytest
import torch

from thinwire.codecs import Codec, bf16, fp16, fp32


@pytest.mark.parametrize(("codec", "dtype"), [(bf16, torch.bfloat16), (fp16, torch.float16)])
def test_in_range_the_bits_are_the_frameworks_cast(codec: Codec, dtype: torch.dtype) -> None:
    x = torch.randn(300_001, generator=torch.Generator().manual_seed(0))  # more than one piece
    assert torch.equal(codec.encode(x, 0)["value"], x.to(dtype))
    assert torch.equal(codec.decode(codec.encode(x, 0), len(x), 0), x.to(dtype).float())


@pytest.mark.parametrize(("codec", "largest"), [(bf16, torch.finfo(torch.bfloat16).max), (fp16, 65504.0)])
def test_no_finite_number_becomes_infinite(codec: Codec, largest: float) -> None:
    x = torch.tensor([1.0, -1.0]) * torch.finfo(torch.float32).max
    assert codec.decode(codec.encode(x, 0), 2, 0).tolist() == [largest, -largest]


def test_halves_go_to_even() -> None:
    x = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8])
    assert bf16.decode(bf16.encode(x, 0), 2, 0).tolist() == [1.0, 1 + 2.0**-6]


def test_fp32_copies_nothing() -> None:
    x = torch.randn(4)
    assert fp32.decode(fp32.encode(x, 0), 4, 0) is x
