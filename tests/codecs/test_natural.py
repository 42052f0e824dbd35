"""Powers of two at random: exact where there is nothing to round, and as noisy as is claimed."""

from __future__ import annotations

import pytest
import torch

from thinwire.codecs import Natural, natural, zstd
from written import again, size

LARGEST = torch.finfo(torch.float32).max


def test_powers_of_two_are_exact() -> None:
    x = torch.tensor([0.0, 1, -1, 2.0**-126, -(2.0**127), 1024, -0.5])
    for key in range(20):
        assert torch.equal(again(natural, x, key), x)
    assert natural.encode(x, 0)["exponent"].tolist() == [0, 127, 127, 1, 254, 137, 126]
    assert natural.encode(x, 0)["sign"].tolist() == [0b1010100]


def test_others_go_to_a_neighbour() -> None:
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    ratio = again(natural, x) / x
    assert ((ratio > 0.5) & (ratio <= 2)).all()
    assert torch.equal(again(natural, x).frexp().mantissa.abs().unique(), torch.tensor([0.5]))
    assert not torch.equal(again(natural, x, 1), again(natural, x, 2))


def test_the_variance_is_an_eighth_at_four_thirds() -> None:
    for mantissa, omega in ((4 / 3, 1 / 8), (1.5, 1 / 9), (1.0, 0.0)):
        x = torch.full((200_000,), mantissa)
        found = (again(natural, x) - x).double().square().mean().item() / mantissa**2
        assert found == pytest.approx(omega, abs=0.003)


def test_what_is_below_the_normal_range_and_at_its_end() -> None:
    for value, levels in ((2.0**-128, {0.0, 2.0**-126}), (0.75 * LARGEST, {2.0**127, LARGEST})):
        x = torch.full((100_000,), value)
        decoded = again(natural, x)
        assert set(decoded.tolist()) == levels
        low, high = sorted(levels)
        up = (value - low) / (high - low)
        assert (decoded == high).double().mean().item() == pytest.approx(up, abs=5 * (up * (1 - up) / 1e5) ** 0.5)


def test_exponents_are_much_alike() -> None:
    x = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    assert size(natural.encode(x, 0)) == (1 << 16) * 9 // 8
    assert size((natural | zstd).encode(x, 0)) < 0.5 * size(natural.encode(x, 0))


def test_bare_names_and_calls_are_the_same() -> None:
    assert natural() == natural == Natural()
