"""The budget's arithmetic against trying everything, and what must hold of any allocation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from thinwire.codecs.allocation import allocate, in_proportion


def tables(seed: int, layers: int = 5, options: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Errors that fall and bytes that grow with the option, at random."""
    g = np.random.default_rng(seed)
    errors = np.sort(g.exponential(size=(layers, options)), axis=1)[:, ::-1] * g.exponential(size=(layers, 1))
    return errors.copy(), np.sort(g.integers(1, 1000, size=(layers, options)), axis=1).astype(float)


def sum_of(table: np.ndarray, choice) -> float:
    return float(table[np.arange(len(table)), choice].sum())


def brute(weight: np.ndarray, value: np.ndarray, limit: float) -> float:
    choices = itertools.product(range(weight.shape[1]), repeat=len(weight))
    return min(sum_of(value, list(c)) for c in choices if sum_of(weight, list(c)) <= limit)


@pytest.mark.parametrize("seed", range(40))
def test_it_is_as_good_as_trying_everything(seed):
    """With weights of whole steps nothing is rounded, so that equality is exact."""
    errors, sizes = tables(seed)
    whole = np.ceil(errors * 200)
    for like in range(4):
        limit = sum_of(whole, np.full(5, like))
        choice = allocate(whole, sizes, limit, steps=int(limit))
        assert sum_of(whole, choice) <= limit
        assert sum_of(sizes, choice) == brute(whole, sizes, limit)


@pytest.mark.parametrize("seed", range(20))
def test_rounding_keeps_to_the_limit_and_costs_little(seed):
    errors, sizes = tables(seed, layers=12)
    limit = sum_of(errors, np.full(12, 1))
    choice = allocate(errors, sizes, limit)
    assert sum_of(errors, choice) <= limit
    tighter = allocate(errors, sizes, limit, steps=100_000)
    assert sum_of(sizes, choice) >= sum_of(sizes, tighter) - 1e-9
    assert sum_of(sizes, choice) <= sum_of(sizes, np.full(12, 1)) * 1.02, "dearer by rounding alone"


def test_a_larger_limit_never_costs_more():
    errors, sizes = tables(3)
    limits = np.linspace(errors.min(axis=1).sum(), 12, 60)  # from the smallest error that is to be had
    feasible = [sum_of(sizes, allocate(errors, sizes, limit)) for limit in limits]
    assert feasible == sorted(feasible, reverse=True)
    assert feasible[0] > feasible[-1]


def test_equal_layers_may_choose_alike_and_impossible_limits_give_the_lightest():
    errors, sizes = np.tile([[4.0, 2.0, 1.0]], (6, 1)), np.tile([[1.0, 2.0, 3.0]], (6, 1))
    assert allocate(errors, sizes, 12.0, steps=12).tolist() == [1] * 6
    assert allocate(errors, sizes, 0.5).tolist() == [2] * 6
    assert allocate(errors, sizes, 0.0).tolist() == [2] * 6
    assert allocate(np.zeros((2, 2)), np.ones((2, 2)), 0.0).tolist() == [0, 0]


def test_options_beyond_the_limit_are_never_chosen():
    """Were they counted as if they just met it, the cheap one would be taken for either layer."""
    errors, sizes = np.array([[100.0, 1.0], [100.0, 1.0]]), np.array([[1.0, 10.0], [1.0, 10.0]])
    assert allocate(errors, sizes, 5.0).tolist() == [1, 1]


def test_the_control_shares_the_limit_out_in_proportion():
    errors = np.array([[8.0, 4.0, 1.0], [8.0, 4.0, 1.0]])
    sizes = np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    assert in_proportion(errors, sizes, 10.0, np.array([9.0, 1.0])).tolist() == [0, 2]
    assert in_proportion(errors, sizes, 10.0, np.array([1.0, 1.0])).tolist() == [1, 1]
    assert in_proportion(errors, sizes, 9.0, np.array([2.0, 1.0])).tolist() == [1, 2], "what is left is not used"
    assert in_proportion(errors, sizes, 0.5, np.array([1.0, 1.0])).tolist() == [2, 2], "nothing fits: the lightest"


def test_it_is_never_worse_than_the_control_and_mostly_better():
    better = 0
    for seed in range(30):
        errors, sizes = tables(seed, layers=8)
        limit = sum_of(errors, np.full(8, 1))
        control = in_proportion(errors, sizes, limit, errors[:, 0])
        assert sum_of(errors, control) <= limit
        chosen = allocate(errors, sizes, limit)
        assert sum_of(sizes, chosen) <= sum_of(sizes, control) * 1.005, "but for the rounding of steps"
        better += sum_of(sizes, chosen) < sum_of(sizes, control)
    assert better > 15
