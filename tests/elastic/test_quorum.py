"""The lighthouse's rules, one by one."""

from __future__ import annotations

import pytest

from thinwire.elastic.quorum import Quorum, Request, Rules, healthy, quorum
from thinwire.errors import ConfigError

RULES = Rules(2, join_timeout_s=30.0, heartbeat_timeout_s=5.0)


def asked(names, since_s=0.0, **options):
    return {name: Request(since_s, **options) for name in names.split()}


def beating(names, at_s=0.0):
    return dict.fromkeys(names.split(), at_s)


def test_names_are_in_order_and_the_first_id_is_1():
    assert quorum(beating("c a b"), asked("c a b"), None, RULES, 0.0) == Quorum(1, ("a", "b", "c"))


def test_the_previous_members_are_enough_whatever_else_holds():
    """Neither as many as are wanted, nor a majority, nor waiting."""
    found = quorum(beating("a b c d"), asked("a"), Quorum(4, ("a",)), Rules(3), 0.0)
    assert found == Quorum(4, ("a",))


def test_whoever_asks_beside_the_previous_members_is_taken_at_once():
    assert quorum(beating("a b c d"), asked("a c"), Quorum(4, ("a",)), RULES, 0.0) == Quorum(5, ("a", "c"))


def test_too_few():
    assert quorum(beating("a"), asked("a"), None, RULES, 0.0) == "1 members are there, 2 are needed"


@pytest.mark.parametrize(("alive", "enough"), [("a b c", True), ("a b c d", False), ("a b c d e", False)])
def test_more_than_half_of_the_beating_hearts(alive, enough):
    found = quorum(beating(alive, 100.0), asked("a b"), None, RULES, 100.0)
    assert found == (Quorum(1, ("a", "b")) if enough else found)
    assert isinstance(found, Quorum) == enough
    if not enough:
        assert found == f"2 members are there of {len(alive.split())} whose hearts beat: more than half are needed"


def test_one_who_computes_is_waited_for_from_the_first_request_on():
    """The second request does not begin the wait anew."""
    requests = asked("a", 10.0) | asked("b", 39.0)
    waits = "2 members wait for 1 more whose hearts beat"
    assert quorum(beating("a b c", 39.9), requests, None, RULES, 39.9) == waits
    assert quorum(beating("a b c", 40.0), requests, None, RULES, 40.0) == Quorum(1, ("a", "b"))


def test_one_whose_heart_stopped_is_not_waited_for():
    heartbeats = beating("a b", 5.0) | beating("c", 0.0)
    assert quorum(heartbeats, asked("a b"), Quorum(3, ("a", "b", "c")), RULES, 4.9) != Quorum(4, ("a", "b"))
    assert quorum(heartbeats, asked("a b"), Quorum(3, ("a", "b", "c")), RULES, 5.0) == Quorum(4, ("a", "b"))


def test_a_request_without_a_heartbeat_does_not_count():
    heartbeats = beating("a b", 9.0) | beating("c", 0.0)
    assert quorum(heartbeats, asked("a b c"), None, RULES, 9.0) == Quorum(1, ("a", "b"))
    assert healthy(heartbeats, RULES, 9.0) == {"a", "b"}


def test_the_same_names_keep_the_id_and_a_failure_changes_it():
    previous = Quorum(7, ("a", "b"))
    assert quorum(beating("a b"), asked("a b"), previous, RULES, 0.0) == previous
    one_failed = asked("a") | asked("b", failed=True)
    assert quorum(beating("a b"), one_failed, previous, RULES, 0.0) == Quorum(8, ("a", "b"))


def test_a_change_and_a_failure_are_one_step():
    assert quorum(beating("a b c"), asked("a b c", failed=True), Quorum(7, ("a", "b")), RULES, 0.0).id == 8


def test_one_wish_to_shrink_keeps_newcomers_out():
    requests = asked("a b c") | asked("b", shrink_only=True)
    assert quorum(beating("a b c"), requests, Quorum(2, ("a", "b")), RULES, 0.0) == Quorum(2, ("a", "b"))
    shrinking = asked("a b d", shrink_only=True)
    assert quorum(beating("a b d"), shrinking, Quorum(2, ("a", "b", "c")), RULES, 0.0) == Quorum(3, ("a", "b"))


def test_a_restarted_lighthouse_begins_its_ids_again():
    """So that another group gets the id that one still holds: an id alone does not tell groups apart."""
    assert (
        quorum(beating("a b c"), asked("a b c"), None, RULES, 0.0).id
        == quorum(beating("a b"), asked("a b"), None, RULES, 0.0).id
    )


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"min_replicas": 0}, r"a quorum of 0 members\n.*at least 1\n.*raise min_replicas"),
        ({"min_replicas": 1, "join_timeout_s": -1.0}, r"join_timeout_s is -1\n.*0 s or more\n.*raise join_timeout_s"),
        ({"min_replicas": 1, "heartbeat_timeout_s": -2.0}, r"heartbeat_timeout_s is -2"),
    ],
)
def test_rules_that_make_no_sense(options, error):
    with pytest.raises(ConfigError, match=error):
        Rules(**options)
