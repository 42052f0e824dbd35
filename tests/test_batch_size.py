"""Batch sizes from gradient noise: the tests against their formulas, the estimate between members against the truth."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor

from thinwire import ConfigError
from thinwire.batch_size import (
    Moments,
    Noise,
    between_members,
    inner_product_test,
    next_batch_size,
    norm_test,
    orthogonality_test,
)

N = 20
MEAN = torch.arange(1.0, N + 1) / 10  # |mean|^2 = 28.7
SPREAD = torch.linspace(0.5, 6.0, N)  # trace of the covariance 267


def draw(samples: int, seed: int) -> Tensor:
    """Gradients with a known mean and a diagonal covariance.  [samples, n]"""
    return MEAN + SPREAD * torch.randn(samples, N, generator=torch.Generator().manual_seed(seed))


# --- per-sample tests -----------------------------------------------------------------------------------------------


def test_three_samples_by_hand():
    """Two dimensions: mean (2, 0); deviations along (-1, 0, 1), across (1, -2, 1)."""
    gradients = torch.tensor([[1.0, 1.0], [2.0, -2.0], [3.0, 1.0]])
    assert norm_test(gradients, eta=0.5) == pytest.approx((2 + 6) / 2 / (0.25 * 4))
    assert inner_product_test(gradients, theta=0.5) == pytest.approx((4 + 4) / 2 / (0.25 * 16))  # <g_j, mean> = 2, 4, 6
    assert orthogonality_test(gradients, nu=2.0) == pytest.approx(6 / 2 / (4 * 4))


TESTS = {"norm": norm_test, "inner product": inner_product_test, "orthogonality": orthogonality_test}


@pytest.mark.parametrize("name", TESTS)
def test_identical_samples_leave_the_batch_as_it_is(name):
    gradients = torch.tensor([[0.5, -1.25, 2.0]]).repeat(8, 1)
    assert TESTS[name](gradients) == 0.0
    assert next_batch_size(32, TESTS[name](gradients), largest=1000) == 32


@pytest.mark.parametrize("name", TESTS)
def test_how_samples_are_divided_among_members_does_not_matter(name):
    """All samples of one process, or gathered from four."""
    gradients = draw(64, 0)
    gathered = torch.cat([gradients[rank::4] for rank in range(4)])
    assert TESTS[name](gathered) == pytest.approx(TESTS[name](gradients), rel=1e-6)


def test_the_parts_of_the_noise_add_up():
    """Along and across the mean is all of it: |.|^2 of the inner-product test's part is Var(<g_j, g>) / |g|^2."""
    gradients = draw(50, 1)
    along, across = inner_product_test(gradients, theta=1.0), orthogonality_test(gradients, nu=1.0)
    assert along + across == pytest.approx(norm_test(gradients, eta=1.0), rel=1e-9)


def test_the_norm_test_finds_the_batch_size_within_a_tenth():
    """Known mean and covariance, each of 200 repeats. With 8000 samples the error of |mean|^2 is 2 % (one sigma)."""
    true = float(SPREAD.square().sum()) / (0.25 * float(MEAN.square().sum()))
    found = [norm_test(draw(8000, seed)) for seed in range(200)]
    assert statistics.mean(found) == pytest.approx(true, rel=0.01)
    assert max(abs(each / true - 1) for each in found) < 0.1


def test_tighter_tests_ask_for_more():
    gradients = draw(50, 2)
    assert norm_test(gradients, eta=0.1) == pytest.approx(25 * norm_test(gradients, eta=0.5))
    assert inner_product_test(gradients, theta=0.1) == pytest.approx(25 * inner_product_test(gradients, theta=0.5))
    assert orthogonality_test(gradients, nu=0.1) == pytest.approx(100 * orthogonality_test(gradients, nu=1.0))


@pytest.mark.parametrize("name", TESTS)
def test_without_a_mean_every_batch_is_too_small(name):
    gradients = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    asked = TESTS[name](gradients)
    assert asked == (math.inf if name != "inner product" else 0.0)  # nothing lies along a mean of zero
    assert next_batch_size(8, asked, largest=64) == (64 if name != "inner product" else 8)


@pytest.mark.parametrize("shape", [(1, 3), (3,), (2, 2, 2)])
def test_one_sample_has_no_variance(shape):
    with pytest.raises(ConfigError, match=r"gradients of shape .*\n.*two samples at least.*\n.*use Noise"):
        norm_test(torch.ones(shape))


# --- between members --------------------------------------------------------------------------------------------------


def members_of_a_step(sizes: list[int], seed: int) -> tuple[Moments, float]:
    """All members' moments, and |g|^2 of what they combine to."""
    means = [draw(size, 1000 * seed + rank).double().mean(dim=0) for rank, size in enumerate(sizes)]
    told = [Moments(size, size * float(mean @ mean)) for size, mean in zip(sizes, means, strict=True)]
    combined = sum(size * mean for size, mean in zip(sizes, means, strict=True)) / sum(sizes)
    return sum(told[1:], told[0]), float(combined @ combined)


def test_two_members_by_hand():
    """g_1 = (1, 0) of 2 samples, g_2 = (0, 1) of 6: g = (1/4, 3/4), sigma^2 = 2 * 9/8 + 6 * 1/8 = 3."""
    total = Moments(2, 2.0) + Moments(6, 6.0)
    assert total == Moments(8, 8.0, 2)
    variance, signal = between_members(total, 1 / 16 + 9 / 16)
    assert variance == pytest.approx(3.0)
    assert signal == pytest.approx(5 / 8 - 3 / 8)


@pytest.mark.parametrize("sizes", [[8, 8, 8, 8], [2, 8, 20]])
def test_the_estimate_between_members_is_right_in_the_mean(sizes):
    """2000 steps; within 4 standard errors of the true trace and of the true squared length."""
    found = [between_members(*members_of_a_step(sizes, seed)) for seed in range(2000)]
    for values, true in zip(
        zip(*found, strict=True), (float(SPREAD.square().sum()), float(MEAN.square().sum())), strict=True
    ):
        error = statistics.stdev(values) / math.sqrt(len(values))
        assert statistics.mean(values) == pytest.approx(true, abs=4 * error)
        assert 4 * error < 0.1 * true, "and that says something"


def test_smoothed_it_asks_for_the_true_batch_size():
    """A mean of 100 steps of 4 members: within a fifth; a single step misses by more than that, as a rule."""
    true = float(SPREAD.square().sum()) / (0.25 * float(MEAN.square().sum()))
    noise, single = Noise(), []
    for seed in range(600):
        total, square = members_of_a_step([8, 8, 8, 8], seed)
        noise = noise.after(total, square, decay=0.99)
        single.append(Noise().after(total, square, decay=0.0).asks_for())
    assert noise.asks_for() == pytest.approx(true, rel=0.2)
    assert statistics.median(abs(each / true - 1) for each in single) > 0.2


def test_the_first_step_counts_in_full():
    """The running means begin at nothing, but their ratio does not know it."""
    total, square = members_of_a_step([8, 8], 0)
    first = Noise().after(total, square, decay=0.9)
    assert first.weight == pytest.approx(0.1)
    assert first.asks_for() == pytest.approx(Noise().after(total, square, decay=0.0).asks_for())
    assert Noise().asks_for() == 0.0


def test_a_tighter_test_asks_for_more_and_no_signal_for_all():
    total, square = members_of_a_step([8, 8], 0)
    noise = Noise().after(total, square)
    assert noise.asks_for(eta=0.1) == pytest.approx(25 * noise.asks_for(eta=0.5))
    assert Noise(1.0, -0.1, 1.0).asks_for() == math.inf
    assert Noise(-1.0, 0.5, 1.0).asks_for() == 0.0, "members differ less than chance would have it: no noise seen"


def test_decay_counts_and_is_checked():
    one, other = members_of_a_step([8, 8], 0), members_of_a_step([8, 8], 1)
    assert Noise().after(*one).after(*other) != Noise().after(*one).after(*other, decay=0.5)
    with pytest.raises(ConfigError, match=r"decay=1\n.*in \[0, 1\)\n.*ten steps"):
        Noise().after(*one, decay=1)


def test_one_member_alone_is_told_what_to_do():
    text = r"noise between 1 member\(s\)\n.*two at least.*\n.*use norm_test"
    with pytest.raises(ConfigError, match=text):
        Noise().after(Moments(8, 1.0), 0.1)


# --- the next batch -------------------------------------------------------------------------------------------------


def test_a_batch_never_shrinks_and_never_passes_the_largest():
    assert next_batch_size(32, 10.2, largest=100) == 32
    assert next_batch_size(32, 32.0001, largest=100) == 33
    assert next_batch_size(32, [10.0, 57.5, 3.0], largest=100) == 58
    assert next_batch_size(32, math.inf, largest=100) == 100
    assert next_batch_size(32, 1e300, largest=100) == 100
    with pytest.raises(ConfigError, match=r"a batch of 200 samples where the largest is 100\n.*now <= largest"):
        next_batch_size(200, 1.0, largest=100)
