"""Merging rules."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from thinwire.aggregators import AGGREGATORS, Majority, Mean, Median, Signs, TrimmedMean, WeightedMean
from thinwire.errors import ConfigError

#: Rules whose result is a value between the members' values.
AVERAGES = {"mean": Mean(), "weighted_mean": WeightedMean(), "trimmed_mean": TrimmedMean(0.25), "median": Median()}
RULES = {**AVERAGES, "majority": Majority(), "signs": Signs()}

rows_of = st.integers(1, 7).flatmap(
    lambda m: arrays("float32", (m, 5), elements=st.floats(-1e3, 1e3, width=32)).map(torch.from_numpy)
)


def weights(rows: Tensor) -> Tensor:
    return torch.arange(1, len(rows) + 1, dtype=torch.float64)


def test_every_rule_of_the_table_is_tested_here():
    assert {name: type(rule) for name, rule in RULES.items()} == AGGREGATORS


@pytest.mark.parametrize("name", RULES)
@given(rows=rows_of)
def test_a_rule_is_pure_and_keeps_shape(name, rows):
    rule, before = RULES[name], rows.clone()
    combined = rule.combine(rows, weights(rows))
    assert torch.equal(rows, before)
    assert combined.shape == (5,)
    assert combined.dtype == torch.float32


@pytest.mark.parametrize("name", AVERAGES)
@given(rows=rows_of)
def test_a_single_row_is_returned_as_it_is(name, rows):
    assert torch.equal(AVERAGES[name].combine(rows[:1], weights(rows[:1])), rows[0])


@pytest.mark.parametrize("name", AVERAGES)
@given(rows=rows_of)
def test_a_result_lies_within_the_range_of_the_rows(name, rows):
    """Means by up to m roundings of sums of at most m |x|."""
    combined = AVERAGES[name].combine(rows, weights(rows))
    slack = 2.0**-23 * len(rows) * rows.abs().amax(dim=0) + 2.0**-126
    assert bool((combined >= rows.amin(dim=0) - slack).all())
    assert bool((combined <= rows.amax(dim=0) + slack).all())


@given(rows=rows_of)
def test_trimming_nothing_is_the_mean(rows):
    """Within the rounding of m sums in another order."""
    slack = 2.0**-23 * len(rows) * rows.abs().amax().item() + 2.0**-126
    a, b = TrimmedMean(0.0).combine(rows, weights(rows)), Mean().combine(rows, weights(rows))
    assert torch.allclose(a, b, rtol=0, atol=slack)


@given(rows=rows_of)
def test_equal_weights_are_the_mean(rows):
    slack = 2.0**-22 * len(rows) * rows.abs().amax().item() + 2.0**-126  # below it floats have fewer digits
    ours = WeightedMean().combine(rows, torch.full((len(rows),), 3.0, dtype=torch.float64))
    assert torch.allclose(ours, Mean().combine(rows, weights(rows)), rtol=0, atol=slack)


@pytest.mark.parametrize("rule", [Median(), TrimmedMean(0.4)], ids=repr)
@given(data=st.data(), liars=st.integers(0, 2))
def test_robust_rules_stay_within_the_honest_range(rule, data, liars):
    """Five members; at most two lie, with whatever they like."""
    honest = data.draw(arrays("float32", (5 - liars, 3), elements=st.floats(-10, 10, width=32)))
    lies = data.draw(arrays("float32", (liars, 3), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
    rows = torch.from_numpy(honest), torch.from_numpy(lies)
    combined = rule.combine(torch.cat(rows), torch.ones(5, dtype=torch.float64))
    assert bool((combined >= rows[0].amin(dim=0)).all())
    assert bool((combined <= rows[0].amax(dim=0)).all())


def test_one_lie_moves_the_mean_anywhere():
    rows = torch.tensor([[0.0], [0.0], [0.0], [0.0], [1e30]])
    assert Mean().combine(rows, weights(rows)).item() > 1e29


def test_a_vote_is_won_by_half():
    """Ties and zeros are positive; how large a vote is makes no difference."""
    rows = torch.tensor([[1.0, -1e30, 0.0, -1.0], [-2.0, 1e-30, -0.0, -1.0], [3.0, 1.0, -1.0, 0.0]])
    assert Majority().combine(rows, weights(rows)).tolist() == [1, 1, 1, -1]
    assert Majority().combine(rows[:2], weights(rows[:2])).tolist() == [1, 1, 1, -1]


@given(rows=rows_of)
def test_a_vote_is_the_sign_of_the_sum_of_signs(rows):
    signs = torch.where(rows >= 0, 1.0, -1.0)
    due = torch.where(signs.sum(dim=0) >= 0, 1.0, -1.0)
    assert torch.equal(Majority().combine(rows, weights(rows)), due)
    assert torch.equal(Majority().combine(signs, weights(rows)), due), "signs alone say as much"


def test_values_by_hand():
    rows = torch.tensor([[1.0, 8.0], [5.0, 2.0], [3.0, 4.0], [100.0, -100.0]])
    assert Median().combine(rows[:3], weights(rows[:3])).tolist() == [3.0, 4.0]
    assert Median().combine(rows, weights(rows)).tolist() == [4.0, 3.0]
    assert TrimmedMean(0.25).combine(rows, weights(rows)).tolist() == [4.0, 3.0]
    assert TrimmedMean(0.24).combine(rows, weights(rows)).tolist() == [27.25, -21.5], "trims floor(0.96) = 0"
    assert Mean().combine(rows, weights(rows)).tolist() == [27.25, -21.5]
    assert WeightedMean().combine(rows[:2], torch.tensor([3.0, 1.0], dtype=torch.float64)).tolist() == [2.0, 6.5]


def test_weights_matter_where_they_are_said_to():
    rows = torch.tensor([[0.0], [1.0], [5.0]])
    for rule in RULES.values():
        a = rule.combine(rows, torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64))
        b = rule.combine(rows, torch.tensor([1.0, 2.0, 9.0], dtype=torch.float64))
        assert torch.equal(a, b) != rule.weighs


@pytest.mark.parametrize("share", [0.5, -0.1, 1.0, float("nan")])
def test_a_share_that_leaves_no_value_is_refused(share):
    with pytest.raises(
        ConfigError, match=r"leaves no value\n.*share in \[0, 0.5\).*\n.*median to withstand nearly half"
    ):
        TrimmedMean(share)


@given(rows=rows_of)
def test_signs_are_those_of_the_mean(rows):
    combined = Signs().combine(rows, weights(rows))
    assert torch.equal(combined, Mean().combine(rows, weights(rows)).sign())
    assert set(combined.tolist()) <= {-1.0, 0.0, 1.0}
