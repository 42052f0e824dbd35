"""When rounds begin."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinwire.errors import ConfigError
from thinwire.schedules import At, Every, Once

schedules = st.integers(1, 40).flatmap(lambda steps: st.builds(Every, st.just(steps), st.integers(0, steps - 1)))
fragments = st.integers(1, 12)


@given(schedule=schedules, count=fragments, start=st.integers(41, 200))
def test_every_fragment_begins_once_in_any_window(schedule, count, start):
    """In any H steps after the first H: each fragment exactly once."""
    window = [f for step in range(start, start + schedule.steps) for f in schedule.begins(step, count)]
    assert sorted(window) == list(range(count))


@given(schedule=schedules, count=fragments)
def test_nothing_begins_before_the_first_step_and_everything_within_the_first_window(schedule, count):
    assert schedule.begins(0, count) == ()
    first = [f for step in range(1, schedule.steps + 1) for f in schedule.begins(step, count)]
    assert sorted(first) == list(range(count))


@given(schedule=schedules, count=fragments, step=st.integers(1, 100))
def test_what_begins_is_ascending_and_a_pure_function(schedule, count, step):
    begun = schedule.begins(step, count)
    assert list(begun) == sorted(set(begun))
    assert begun == schedule.begins(step, count)


def test_fragments_rotate_evenly():
    log = [(step, f) for step in range(1, 25) for f in Every(12).begins(step, 4)]
    assert log == [(3, 0), (6, 1), (9, 2), (12, 3), (15, 0), (18, 1), (21, 2), (24, 3)]


def test_one_fragment_is_every_so_many_steps():
    assert [step for step in range(1, 13) if Every(4).begins(step, 1)] == [4, 8, 12]


def test_more_fragments_than_steps_share_steps():
    assert [Every(2).begins(step, 5) for step in (1, 2, 3, 4)] == [(0, 1, 2, 3), (4,), (0, 1, 2, 3), (4,)]


def test_at_is_those_steps_and_no_other():
    at = At((3, 5, 9))
    assert [step for step in range(20) if at.begins(step, 2)] == [3, 5, 9]
    assert at.begins(5, 3) == (0, 1, 2)
    assert (at.period, at.overlap) == (2, 0)
    assert Once(7) == At((7,))
    assert Once(7).period == 7


@pytest.mark.parametrize("steps", [(), (0,), (3, 3), (5, 3)])
def test_steps_that_are_none_are_refused(steps):
    with pytest.raises(ConfigError, match=r"rounds at the steps \(.*\)\n.*in ascending order\n.*or Once\(1000\) for"):
        At(steps)


def test_refusals():
    with pytest.raises(ConfigError, match=r"a round every 0 steps\n.*every 1 step or more\n.*every=1 is every step"):
        Every(0)
    with pytest.raises(ConfigError, match=r"overlap of 5 steps with a round every 4\n.*from 0 to 4: .*\n.*lower the"):
        Every(4, overlap=5)
    with pytest.raises(ConfigError, match="overlap of -1"):
        Every(4, overlap=-1)
