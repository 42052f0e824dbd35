"""Time limits follow from what was measured."""

import pytest

from thinwire import ConfigError
from thinwire.elastic.settings import UNMEASURED_PERIOD_S, Limits


def test_before_a_round_was_made_they_are_long():
    assert Limits() == Limits(period_s=None)
    assert Limits().join_s == 1.5 * UNMEASURED_PERIOD_S
    assert Limits().heart_s == 3 * UNMEASURED_PERIOD_S + 20


def test_they_follow_from_period_and_exchange():
    limits = Limits(exchange_s=10.0, period_s=100.0, connect_s=7.0)
    assert limits.join_s == 150
    assert limits.meeting_s == 200 + 150 + 30 + 7 + 30
    assert limits.heart_s == 300 + 30


def test_a_lighthouse_waits_longer_than_a_crash_takes_to_be_noticed():
    assert Limits(period_s=0.01, heartbeat_s=4.0).join_s == 8
    assert Limits(period_s=0.01).heart_s == 60


def test_overrides_win():
    assert Limits(meet_s=3.0).meeting_s == 3
    assert Limits(hang_s=2.0).heart_s == 2


@pytest.mark.parametrize("name", ["heartbeat_s", "connect_s", "meet_s", "hang_s", "period_s"])
def test_no_limit_is_zero(name):
    with pytest.raises(ConfigError, match=f"{name} is 0\n  expected  seconds above 0"):
        Limits(**{name: 0})
