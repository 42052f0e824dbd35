"""What follows a finding."""

from __future__ import annotations

import pytest

from thinwire.errors import ConfigError
from thinwire.watch.findings import Finding, Kind
from thinwire.watch.policy import Isolation, Policy, Strikes

SLOW = Finding(Kind.SLOW_SENDER, ("b",), "sends slowly", {})
LINK = Finding(Kind.SLOW_LINK, ("b", "c"), "is slow", {})
MEMBERS = "abcd"


def isolations(policy, found_at, calls, finding=SLOW, members=MEMBERS):
    """The isolations that a member brings about who is found at these calls."""
    strikes, all_ = Strikes(), []
    for call in range(calls):
        strikes, new = policy.decide(strikes, call, [finding] if call in found_at else [], members)
        all_ += new
    return all_


def test_by_default_nothing_follows():
    assert isolations(Policy(), range(100), 100) == []


def test_three_in_ten_calls_isolate_and_every_time_for_twice_as_long():
    found = isolations(Policy(isolate=True), range(200), 200)
    assert [(each.since, each.until, each.times) for each in found] == [
        (3, 13, 1), (16, 36, 2), (39, 79, 3), (82, 162, 4), (165, 325, 5),
    ]  # fmt: skip
    assert found[0].because == ("slow sender: member b sends slowly",)
    assert str(found[0]) == ("member b is isolated from call 3 to 13 (once so far): slow sender: member b sends slowly")
    assert "(2 times so far)" in str(found[1])


def test_three_in_eleven_do_not():
    assert isolations(Policy(isolate=True), {0, 5, 10}, 20) == []
    assert isolations(Policy(isolate=True), {0, 5, 9}, 20)
    assert isolations(Policy(isolate=True, within=11), {0, 5, 10}, 20)
    assert isolations(Policy(isolate=True, strikes=4), {0, 5, 9}, 20) == []


def test_the_times_apart_have_a_first_and_a_most():
    found = isolations(Policy(isolate=True, first=2, most=5), range(40), 40)
    assert [each.until - each.since for each in found][:4] == [2, 4, 5, 5]


def test_lines_isolate_nobody_and_kinds_are_chosen():
    assert isolations(Policy(isolate=True), range(20), 20, LINK) == []
    assert isolations(Policy(isolate=True, kinds={Kind.SLOW_LINK}), range(20), 20, LINK) == [], "it has two ends"
    assert isolations(Policy(isolate=True, kinds={Kind.IDLE}), range(20), 20) == []


def test_half_of_the_members_always_stay():
    policy, strikes = Policy(isolate=True, strikes=1), Strikes()
    found = [Finding(Kind.NOT_FINITE, (name,), "", {}) for name in MEMBERS]
    strikes, new = policy.decide(strikes, 0, found, MEMBERS)
    assert [each.who for each in new] == ["a", "b"]
    _, later = policy.decide(strikes, 1, found, MEMBERS)
    assert later == ()
    _, most = Policy(isolate=True, strikes=1, keep=0.1).decide(Strikes(), 0, found, MEMBERS)
    assert len(most) == 3, "one stays whatever is to be kept"
    assert policy.decide(Strikes(), 0, found[:1], "a")[1] == ()


def test_who_left_is_not_isolated():
    assert Policy(isolate=True, strikes=1).decide(Strikes(), 0, [SLOW], "acd")[1] == ()


def test_who_is_apart_at_a_call():
    each = Isolation("b", 3, 13, 1, ())
    strikes = Strikes(apart={"b": each})
    assert [bool(strikes.isolated(call)) for call in (2, 3, 12, 13)] == [False, True, True, False]


@pytest.mark.parametrize("options", [{"strikes": 0}, {"strikes": 11}, {"first": 0}, {"most": 9}, {"keep": 0}])
def test_policies_that_make_no_sense(options):
    with pytest.raises(ConfigError, match="1 <= strikes <= within"):
        Policy(**options)
