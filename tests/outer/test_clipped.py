"""CO2's outer step: heavy ball where it does nothing, and each of its options where it does."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinwire.errors import ConfigError
from thinwire.outer import SGD, ClippedMomentum, Gap, Now
from thinwire.outer.clipped import length


def steps(outer, count: int = 6, *, seed: int = 0):
    """Anchors and memories after each of some steps."""
    generator = torch.Generator().manual_seed(seed)
    anchor, memory, seen = torch.randn(50, generator=generator), {}, []
    for number in range(count):
        anchor, memory = outer.step(anchor, torch.randn(50, generator=generator), memory, Now(number))
        seen.append((anchor, memory))
    return seen


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_without_clip_and_penalty_it_is_heavy_ball_to_the_bit(momentum):
    ours, plain = steps(ClippedMomentum(0.7, momentum)), steps(SGD(0.7, momentum))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(ours, plain, strict=True))


def test_what_is_applied_is_clipped_and_what_is_remembered_is_not():
    outer = ClippedMomentum(2.0, 0.5, clip=0.1)
    anchor, memory = outer.step(torch.zeros(3), torch.tensor([1.0, 0.04, -1.0]), {}, Now())
    assert torch.allclose(anchor, torch.tensor([-0.2, -0.08, 0.2]))
    assert memory["m"].tolist() == pytest.approx([1.0, 0.04, -1.0])
    anchor, memory = outer.step(anchor, torch.zeros(3), memory, Now())
    assert torch.allclose(anchor, torch.tensor([-0.4, -0.12, 0.4]))


def test_a_constant_penalty_divides_updates():
    anchor, memory = ClippedMomentum(1.0, 0.5, penalty=4.0).step(torch.zeros(2), torch.tensor([1.0, 2.0]), {}, Now())
    assert anchor.tolist() == [-0.25, -0.5]
    assert list(memory) == ["m"]


def test_the_gap_by_hand():
    """First nothing has moved; then the anchor's last move is twice, then a ninth, of what members went."""
    outer = ClippedMomentum(1.0, 0.0, penalty=Gap())
    anchor, memory = outer.step(torch.zeros(2), torch.tensor([3.0, 4.0]), {}, Now())
    assert anchor.tolist() == [-3.0, -4.0]
    assert memory["moved"].item() == pytest.approx(5.0, rel=1e-5)
    anchor, memory = outer.step(anchor, torch.tensor([1.5, 2.0]), memory, Now())
    assert anchor.tolist() == pytest.approx([-3.5, -4 - 2 / 3], rel=1e-5), "a third as far as without"
    moved = 2.5 / 3
    anchor, _ = outer.step(anchor, torch.tensor([0.0, 9 * moved]), memory, Now())
    assert anchor.tolist() == pytest.approx([-3.5, -4 - 2 / 3 - 9 * moved / (1 + 1 / 9)], rel=1e-5)
    assert Gap(2.0).at(6.0, 2.0) == 7.0
    assert Gap().at(1.0, 0.0) == 1.0


def test_the_gap_holds_back_what_momentum_throws_to_and_fro():
    """Late heavy ball above its bound: with the gap it swings less far."""

    def swing(outer) -> float:
        anchor, memory, late, most = torch.ones(4), {}, torch.zeros(4), 0.0
        for number in range(60):
            sent = 0.7 * anchor
            anchor, memory = outer.step(anchor, late, memory, Now(number))
            late, most = sent, max(most, float(anchor.abs().max()))
        return most

    assert swing(ClippedMomentum(1.0, 0.5)) > 100
    assert swing(ClippedMomentum(1.0, 0.5, penalty=Gap())) == 1.0, "never further than where it began"


@given(seed=st.integers(0, 1000), scale=st.sampled_from([1e-30, 1e-6, 1.0, 1e30]))
def test_lengths_do_not_depend_on_order(seed, scale):
    x = torch.randn(3000, generator=torch.Generator().manual_seed(seed)) * scale
    turned = x[torch.randperm(3000, generator=torch.Generator().manual_seed(seed + 1))]
    assert length(x) == length(turned)
    assert length(x) == pytest.approx(float(x.double().norm()), rel=1e-5)


def test_lengths_at_the_edges():
    assert length(torch.zeros(3)) == length(torch.zeros(0)) == 0.0
    assert length(torch.tensor([math.inf, 1.0])) == math.inf
    assert length(torch.full(((1 << 20) + 5,), 2.0)) == pytest.approx(2 * math.sqrt((1 << 20) + 5))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ClippedMomentum(0.0), "outer lr=0.0"),
        (lambda: ClippedMomentum(1.0, 1.0), "outer momentum=1.0"),
        (lambda: ClippedMomentum(clip=0.0), "outer clip=0.0\n.*above 0\n.*leave it out"),
        (lambda: ClippedMomentum(penalty=0.5), r"outer penalty=0.5\n.*at least 1\n.*1.0 for none, or Gap\(\)"),
        (lambda: Gap(-1.0), "gap weight=-1.0\n.*at least 0\n.*0 is no penalty"),
    ],
)
def test_refusals(make, text):
    with pytest.raises(ConfigError, match=text):
        make()
