"""SlowMo's outer step, with inner learning rates that stay, move, and are 0."""

from __future__ import annotations

import pytest
import torch

from thinwire.errors import ConfigError
from thinwire.outer import SGD, Now, SlowMo


def walk(outer, rates: list[float]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    anchor, memory, seen = torch.randn(20, generator=generator, dtype=torch.float64), {}, []
    for rate in rates:
        update = torch.randn(20, generator=generator, dtype=torch.float64) * (rate or 1.0)
        anchor, memory = outer.step(anchor, update, memory, Now(lr=rate))
        seen.append(anchor)
    return seen


@pytest.mark.parametrize(("lr", "momentum"), [(1.0, 0.0), (1.0, 0.5), (0.6, 0.8)])
def test_a_learning_rate_that_stays_makes_it_heavy_ball_to_the_bit(lr, momentum):
    ours, plain = walk(SlowMo(lr, momentum), [0.1] * 6), walk(SGD(lr, momentum), [0.1] * 6)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_against_the_papers_rule():
    """u in units of gradients, divided by each round's own learning rate. Tolerance: float64."""
    rates = [0.01, 0.1, 0.1, 0.03, 0.003]
    generator = torch.Generator().manual_seed(1)
    a, u = torch.randn(20, generator=generator, dtype=torch.float64), torch.zeros(20, dtype=torch.float64)
    for rate, ours in zip(rates, walk(SlowMo(0.9, 0.6), rates), strict=True):
        u = 0.6 * u + torch.randn(20, generator=generator, dtype=torch.float64) * rate / rate
        a = a - 0.9 * rate * u
        assert torch.allclose(ours, a, atol=1e-14, rtol=1e-13)


def test_at_a_learning_rate_of_zero_momentum_begins_anew():
    outer = SlowMo(1.0, 0.5)
    anchor, memory = outer.step(torch.zeros(2), torch.tensor([1.0, 2.0]), {}, Now(lr=0.1))
    anchor, memory = outer.step(anchor, torch.tensor([0.5, 0.0]), memory, Now(lr=0.0))
    assert anchor.tolist() == [-1.5, -2.0], "what members did counts, without momentum"
    anchor, memory = outer.step(anchor, torch.tensor([0.0, 1.0]), memory, Now(lr=0.1))
    assert anchor.tolist() == [-1.5, -3.0]
    anchor, _ = outer.step(anchor, torch.zeros(2), memory, Now(lr=0.2))
    assert anchor.tolist() == [-1.5, -4.0], "from there on as ever: half of 1, at twice the rate"


def test_the_outer_scale_counts():
    assert SlowMo(1.0).step(torch.zeros(1), torch.ones(1), {}, Now(scale=0.5))[0].item() == -0.5


@pytest.mark.parametrize(("lr", "momentum", "text"), [(0.0, 0.5, "outer lr=0.0"), (1.0, 1.0, "outer momentum=1.0")])
def test_refusals(lr, momentum, text):
    with pytest.raises(ConfigError, match=text):
        SlowMo(lr, momentum)
