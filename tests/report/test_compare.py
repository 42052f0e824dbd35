import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_samples import member, record

from thinwire.report import Row, common_loss, comparison_rows, seconds_to_loss


@pytest.mark.parametrize(
    ("losses", "target", "seconds"),
    [
        ((4.0, 2.0, 1.0), 3.0, 5.0),  # half way between the evaluations at 0 s and 10 s
        ((4.0, 2.0, 1.0), 2.0, 10.0),
        ((4.0, 2.0, 1.0), 1.25, 17.5),
        ((4.0, 2.0, 1.0), 4.0, 0.0),
        ((4.0, 2.0, 1.0), 0.9, None),
        ((4.0, None, 2.0), 3.0, 10.0),  # the point without an evaluation is passed over
        ((4.0, 1.0, 5.0, 1.0), 1.0, 10.0),  # the first time counts
        ((math.nan, 2.0, 1.0), 3.0, 10.0),  # no line can be drawn from nan
        ((math.inf, 2.0), 3.0, 10.0),
        ((4.0, math.nan), 3.0, None),
        ((None, None), 3.0, None),
        ((), 3.0, None),
    ],
)
def test_seconds_to_loss(losses, target, seconds):
    assert seconds_to_loss(record(losses=losses), target) == seconds


@given(st.lists(st.floats(0, 100), min_size=1, max_size=6).map(tuple))
def test_every_run_reached_the_common_loss(losses):
    runs = [record(losses=losses), record(losses=(50.0, 20.0))]
    target = common_loss(runs)
    assert all(seconds_to_loss(run, target) is not None for run in runs)


def test_common_loss_is_the_worst_of_the_best():
    assert common_loss([record(losses=(4.0, 1.0, 3.0)), record(losses=(5.0, 2.0))]) == 2.0
    assert common_loss([record(losses=(4.0, 1.0)), record(losses=(math.nan, None))]) == 1.0
    assert common_loss([record(losses=(None,))]) is None


def test_comparison_rows():
    slow = record("slow", (4.0, 2.0, 1.0))
    fast = record("fast", (4.0, 2.5, 1.5), every_s=1.0, members=(member(sent_bytes=100), member(sent_bytes=301)))
    assert comparison_rows([slow, fast]) == [
        Row("slow", 1.0, 1.0, 100, 1_000_000, 20.0, 15.0, 1.0, 1.0),
        Row("fast", 1.5, 1.5, 100, 200, 2.0, 2.0, 7.5, 0.0002),
    ]


def test_rows_of_runs_that_cannot_be_compared():
    silent = record("alone", (4.0, math.nan), members=(member(sent_bytes=0),))
    blind = record("blind", (None, None))
    first, second = comparison_rows([silent, blind])
    assert math.isnan(first.final_loss)
    assert (first.best_loss, first.seconds_to_common, first.speedup, first.bytes_ratio) == (4.0, 0.0, None, None)
    assert (second.final_loss, second.best_loss, second.seconds_to_common, second.speedup) == (None,) * 4
