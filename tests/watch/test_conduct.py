"""Members that flap, idle or send nonsense; those that are stuck; and how sure it is that one is gone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from thinwire.errors import ConfigError
from thinwire.watch.conduct import Bounds, damage, flapping, idle
from thinwire.watch.findings import Kind
from thinwire.watch.liveness import GONE_PHI, SUSPECT_PHI, Heartbeats
from thinwire.watch.stuck import Waiting, limit_s, stuck
from thinwire.watch.words import Word

BOUNDS = Bounds()


def present(*calls):
    """A call a string: who is here, a letter each."""
    return [{name: Word(1) for name in here} for here in calls]


def test_a_member_that_left_three_times_flaps_wherever_it_is_now():
    assert flapping(present("ab", "a", "ab", "a", "ab"), BOUNDS) == []
    found = flapping(present("ab", "a", "ab", "a", "ab", "a"), BOUNDS)
    assert [each.key for each in found] == [(Kind.FLAPPING, ("b",))]
    assert str(found[0]) == "flapping: member b left 3 times in 6 calls"
    assert [each.who for each in flapping(present("ab", "a", "ab", "a"), Bounds(leaves=2))] == [("b",)]


def test_a_member_that_stays_away_does_not_flap():
    assert flapping(present("ab", *["a"] * 20), BOUNDS) == []


def steps(*told, counted=True):
    return [{"a": Word(5), "b": Word(each, counted=counted)} for each in told]


def test_no_step_for_five_calls_is_idle():
    assert idle(steps(0, 0, 0, 0), BOUNDS) == []
    assert idle(steps(0, 0, 0, 1, 0), BOUNDS) == []
    found = idle(steps(3, 0, 0, 0, 0, 0), BOUNDS)
    assert [each.key for each in found] == [(Kind.IDLE, ("b",))]
    assert str(found[0]) == "idle: member b made no step for 5 calls"
    assert idle(steps(0, 0), Bounds(idle=2))


def test_steps_in_vain_are_idle_too():
    found = idle(steps(1, 1, 1, 1, 1, counted=False), BOUNDS)
    assert "makes steps and was not counted in any round" in str(found[0])
    assert idle([*steps(1, 1, 1, 1, counted=False), *steps(1)], BOUNDS) == []


def test_a_newcomer_is_not_idle_yet():
    assert idle([*present("a", "a", "a"), *steps(0, 0)], BOUNDS) == []


def norms(**told):
    return {name: Word(1, norm=norm) for name, norm in told.items()}


def test_values_that_are_not_finite_are_named_at_once():
    found = damage([{"a": Word(1), "b": Word(1, finite=False)}], BOUNDS)
    assert [each.key for each in found] == [(Kind.NOT_FINITE, ("b",))]


def test_a_norm_ten_times_the_running_median():
    past = [norms(a=1.0, b=1.1)] * 3
    assert damage([*past, norms(a=1.0, b=9.9)], BOUNDS) == []
    found = damage([*past, norms(a=1.0, b=33.0)], BOUNDS)
    assert [each.key for each in found] == [(Kind.TOO_LARGE, ("b",))]
    assert found[0].evidence == {"norm": 33.0, "usual": 1.05}
    assert "a vector of norm 33, 31 times the usual" in str(found[0])
    assert damage([*past, norms(a=1.0, b=9.9)], replace(BOUNDS, too_large=5.0))
    assert damage([past[0], norms(a=1.0, b=33.0)], BOUNDS) == [], "nothing is usual yet"
    assert damage([past[0], norms(a=1.0, b=33.0)], replace(BOUNDS, least=2))


def test_norms_of_all_may_grow_at_once():
    assert damage([*[norms(a=1.0, b=1.0)] * 3, norms(a=50.0, b=50.0)], BOUNDS) == []
    assert damage([*[norms(a=0.0, b=0.0)] * 3, norms(a=0.0, b=1.0)], BOUNDS) == [], "times nothing says nothing"


ALL = frozenset("abc")


def waits(*names, seconds=20.0, entered=True):
    return Waiting(entered, frozenset(names), seconds)


def test_a_member_that_has_not_come_is_stuck_itself():
    found = stuck({"a": waits("c"), "b": waits("c"), "c": Waiting(False)}, ALL)
    assert [each.key for each in found] == [(Kind.STUCK, ("c",))]
    assert "has not come to the exchange and still computes; 2 members wait for it, 20 s by now" in str(found[0])
    silent = stuck({"a": waits("c"), "b": waits("c")}, ALL)
    assert "does not answer" in str(silent[0])


def test_members_that_both_came_have_a_stuck_line():
    found = stuck({"a": waits("c"), "b": waits(), "c": waits("a")}, ALL)
    assert [each.key for each in found] == [(Kind.STUCK_LINK, ("c", "a")), (Kind.STUCK_LINK, ("a", "c"))]
    assert str(found[0]).startswith("stuck link: the line from member c to member a moves nothing for 20 s")


def test_nothing_is_stuck_before_its_time():
    assert stuck({"a": waits("c", seconds=9.9)}, ALL) == []
    assert stuck({"a": waits("c", seconds=20.0)}, ALL, predicted_s=4.1) == []
    assert (limit_s(1.0), limit_s(4.0)) == (10.0, 20.0)
    assert stuck({"a": waits("gone")}, ALL) == [], "it is no member any more"
    assert stuck({"a": waits("c", entered=False)}, ALL) == [], "who computes waits for nobody"


def beats(intervals, **options):
    heart, at = Heartbeats(**options), 0.0
    heart.beat("a", at)
    for each in intervals:
        at += each
        heart.beat("a", at)
    return heart, at


def test_phi_is_the_tail_of_the_intervals():
    heart, at = beats([0.9, 1.1] * 10)
    mean, deviation = 1.0, 0.1
    for silent in (0.5, 1.0, 1.2, 1.5):
        tail = math.erfc((silent - mean) / deviation / math.sqrt(2)) / 2
        assert heart.phi("a", at + silent) == pytest.approx(-math.log10(tail))
    assert heart.phi("a", at + 1e9) == 300.0


def test_who_is_silent_for_long_is_suspected_and_then_gone():
    heart, at = beats([1.0] * 10)
    assert heart.suspects(at + 1.2) == {}
    assert heart.phi("a", at + 1.57) > SUSPECT_PHI > heart.phi("a", at + 1.55)
    assert heart.suspects(at + 1.6, GONE_PHI) == {}
    assert heart.suspects(at + 1.8, GONE_PHI).keys() == {"a"}
    patient, _ = beats([1.0] * 10, least_sd_s=1.0)
    assert patient.suspects(at + 1.8) == {}


def test_a_rhythm_needs_three_signs_and_forgets_old_ones():
    heart, at = beats([1.0])
    assert heart.phi("a", at + 100) == heart.phi("nobody", at) == 0.0
    changed, at = beats([100.0] * 5 + [1.0] * 5, window=5)
    assert changed.suspects(at + 3).keys() == {"a"}
    changed.forget("a")
    assert changed.suspects(at + 300) == {}


def test_a_clock_that_goes_back_tells_nothing():
    heart, at = beats([1.0] * 5)
    heart.beat("a", at - 3)
    assert heart.phi("a", at + 1.0) == pytest.approx(-math.log10(0.5))


@pytest.mark.parametrize("options", [{"window": 1}, {"least_sd_s": 0.0}])
def test_no_rhythm_of_nothing(options):
    with pytest.raises(ConfigError, match=r"Heartbeats\(window="):
        Heartbeats(**options)
