"""Slow senders, receivers, lines and compute: the rule, its accuracy on drawn matrices, what it must not see."""

from __future__ import annotations

import importlib.util
import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from thinwire.watch.findings import Kind
from thinwire.watch.judging import Settings, judge, since
from thinwire.watch.slowness import (
    Limits,
    Series,
    matrix_of,
    series,
    slow_beside_peers,
    slow_lines,
    slowed_down,
)
from thinwire.watch.words import Word

LIMITS = Limits()
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "watch.py"


@pytest.fixture(scope="module")
def script():
    found = importlib.util.spec_from_file_location("watch_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    yield module
    del sys.modules[found.name]


def matrix(members, slow=lambda i, j: 0.0):
    names = [str(rank) for rank in range(members)]
    return {(i, j): -10 + slow(i, j) for i in names for j in names if i != j}


def keys(found):
    return [each.key for each in found]


@pytest.mark.parametrize("members", [3, 4, 5, 16])
def test_a_row_is_a_sender_and_a_column_a_receiver(members):
    over = math.log(3)
    sender = slow_lines(matrix(members, lambda i, j: over * (i == "1")), 0.0, LIMITS)
    assert keys(sender) == [(Kind.SLOW_SENDER, ("1",))]
    receiver = slow_lines(matrix(members, lambda i, j: over * (j == "1")), 0.0, LIMITS)
    assert keys(receiver) == [(Kind.SLOW_RECEIVER, ("1",))]
    assert receiver[0].evidence == pytest.approx({"factor": 3.0, "z": over / 0.02, "peers": members - 1})
    assert "receives from its" in str(receiver[0])
    assert "at 3.0 times the usual time for a byte" in str(receiver[0])


@pytest.mark.parametrize("members", [4, 6, 16])
def test_a_node_that_is_slow_both_ways_is_named_twice_and_its_lines_not_at_all(members):
    found = slow_lines(matrix(members, lambda i, j: math.log(4) * ("2" in (i, j))), 0.0, LIMITS)
    assert keys(found) == [(Kind.SLOW_SENDER, ("2",)), (Kind.SLOW_RECEIVER, ("2",))]


@pytest.mark.parametrize("members", [4, 16])
def test_one_cell_is_a_line(members):
    found = slow_lines(matrix(members, lambda i, j: math.log(2) * ((i, j) == ("0", "2"))), 0.0, LIMITS)
    assert keys(found) == [(Kind.SLOW_LINK, ("0", "2"))]
    assert str(found[0]) == ("slow link: the line from member 0 to member 2 takes 2.0 times the usual time for a byte")


def test_two_faults_at_once_are_both_named():
    def slow(i, j):
        return math.log(3) * (i == "5") + math.log(4) * ((i, j) == ("1", "2"))

    assert keys(slow_lines(matrix(8, slow), 0.0, LIMITS)) == [(Kind.SLOW_SENDER, ("5",)), (Kind.SLOW_LINK, ("1", "2"))]


def test_equal_lines_two_members_and_little_more_are_nothing():
    assert slow_lines(matrix(5), 0.0, LIMITS) == []
    assert slow_lines(matrix(2, lambda i, j: 5.0 * (i == "0")), 0.0, LIMITS) == []
    assert slow_lines({}, 0.0, LIMITS) == []
    little = matrix(5, lambda i, j: math.log(1.19) * (i == "0"))
    assert slow_lines(little, 0.0, LIMITS) == []
    assert keys(slow_lines(little, 0.0, replace(LIMITS, least_factor=1.18))) == [(Kind.SLOW_SENDER, ("0",))]


def test_every_limit_of_lines_changes_what_is_found():
    row, cell = (matrix(8, slow) for slow in (lambda i, j: 0.3 * (i == "0"), lambda i, j: 0.3 * ((i, j) == ("0", "1"))))
    assert slow_lines(row, 0.0, LIMITS)
    assert slow_lines(row, 0.0, replace(LIMITS, node_z=16.0, link_z=16.0)) == []
    assert slow_lines(cell, 0.0, LIMITS)
    assert slow_lines(cell, 0.0, replace(LIMITS, link_z=16.0)) == []
    assert slow_lines(cell, 0.0, replace(LIMITS, least_scale=0.1)) == []
    assert slow_lines(cell, 0.1, LIMITS) == [], "the noise that members measured is a floor"


def test_a_ring_measures_few_cells_and_they_are_judged():
    ring = {(str(i), str((i + 1) % 8)): -10 + math.log(5) * (i == 3) for i in range(8)}
    assert {name for each in slow_lines(ring, 0.0, LIMITS) for name in each.who} == {"3", "4"}


def test_what_a_member_that_left_did_is_not_judged():
    told = {name: Word(1, paces={"a": 1.0, "b": 1.0, "gone": 9.0}) for name in "ab"}
    assert matrix_of(told) == {("a", "b"): 1.0, ("b", "a"): 1.0}


@pytest.mark.parametrize(
    ("noise", "factor", "fault", "least"),
    [
        (0.1, 2.0, "sender", 1.0), (0.1, 2.0, "receiver", 1.0), (0.1, 2.0, "node", 1.0), (0.1, 2.0, "link", 1.0),
        (0.2, 2.0, "link", 0.95), (0.2, 1.5, "node", 0.95), (0.2, 1.5, "link", 0.7), (0.4, 2.0, "node", 0.95),
        (0.4, 2.0, "link", 0.35), (0.2, 1.0, "none", 1.0), (0.4, 1.0, "none", 1.0),
    ],
)  # fmt: skip
def test_accuracy_on_drawn_matrices(script, noise, factor, fault, least):
    """Of 20 here, of 200 in benchmarks/results/watch.md."""
    drawn = random.Random(1)
    right = sum(script.drawn(fault, factor, noise, 16, drawn)[0] for _ in range(20))
    assert right >= 20 * least


def test_weak_faults_in_much_noise_are_missed_without_blaming_others(script):
    drawn = random.Random(1)
    ended = [script.drawn("node", 1.5, 0.4, 16, drawn) for _ in range(20)]
    assert sum(right for right, _ in ended) <= 4
    assert sum(others for _, others in ended) <= 2


def words(*steps, **more):
    return [{str(rank): Word(1, step_s=each, **more) for rank, each in enumerate(told)} for told in steps]


def test_slow_compute_beside_peers():
    past = words(*[(0.1, 0.101, 0.3, 0.099)] * 4)
    found = slow_beside_peers(series(past, "step_s"), Kind.SLOW_COMPUTE, "a local step", LIMITS)
    assert keys(found) == [(Kind.SLOW_COMPUTE, ("2",))]
    assert str(found[0]) == "slow compute: member 2 takes 0.3 s for a local step, 3.0 times the usual"
    assert slow_beside_peers(series(past[1:], "step_s"), Kind.SLOW_COMPUTE, "", LIMITS) == [], "too few words"
    assert slow_beside_peers(series(words(*[(0.1, 0.3)] * 9), "step_s"), Kind.SLOW_COMPUTE, "", LIMITS) == []
    once = words(*[(0.1, 0.1, 0.1, 0.1)] * 3, (0.1, 0.1, 0.3, 0.1))
    assert slow_beside_peers(series(once, "step_s"), Kind.SLOW_COMPUTE, "", LIMITS) == [], "one slow word is none"
    assert slow_beside_peers(series(once, "step_s"), Kind.SLOW_COMPUTE, "", replace(LIMITS, recent=1))


def test_single_words_that_differ_are_the_scale_of_medians():
    """A median a quarter over the others is not sure where words of one member differ by more."""
    usual = {"a": 0.0, "b": 0.001, "c": 0.25}
    noisy = [Series(name, [log - 0.5, log + 0.5, log - 0.5, log + 0.5, log]) for name, log in usual.items()]
    quiet = [Series(name, [log] * 20) for name, log in usual.items()]
    assert slow_beside_peers(noisy, Kind.SLOW_COMPUTE, "", LIMITS) == []
    assert keys(slow_beside_peers(quiet, Kind.SLOW_COMPUTE, "", LIMITS)) == [(Kind.SLOW_COMPUTE, ("c",))]


def test_a_member_that_became_slower_than_it_was():
    logs = [0.01 * (-1) ** k for k in range(20)]
    assert slowed_down(Series("a", logs), LIMITS) is None
    slower = [*logs[:-4], *(log + math.log(1.5) for log in logs[-4:])]
    found = slowed_down(Series("a", slower), LIMITS)
    assert found.key == (Kind.SLOWED_DOWN, ("a",))
    assert found.evidence["factor"] == pytest.approx(1.5, rel=0.03)
    assert "1.5 times its own usual" in str(found)
    assert slowed_down(Series("a", slower[-15:]), LIMITS) is None, "too few words to know what is usual"
    assert slowed_down(Series("a", slower), replace(LIMITS, alarm=1000.0)) is None
    assert slowed_down(Series("a", slower), replace(LIMITS, slack=50.0)) is None
    assert slowed_down(Series("a", slower), replace(LIMITS, least_factor=1.6)) is None
    back = [*logs[:10], *(log + math.log(1.5) for log in logs[10:13]), *[-1.0] * 7]
    assert slowed_down(Series("a", back), LIMITS) is None, "it is over"


def test_no_false_alarm_among_equals_for_three_hundred_calls():
    drawn, past, alarms = random.Random(5), [], 0
    for _ in range(300):
        past = [*past, {str(rank): Word(1, step_s=math.exp(drawn.gauss(-2, 0.1)), norm=1.0) for rank in range(4)}][-64:]
        alarms += len(judge(past, Settings()))
    assert alarms == 0


def test_a_late_sender_is_told_of_as_slow_compute_alone():
    paces = {str(rank): -10.0 for rank in range(4)}
    told = {str(rank): Word(1, step_s=0.1, paces={**paces, "3": -8.0}) for rank in range(4)}
    assert keys(judge([told] * 4, Settings())) == [(Kind.SLOW_SENDER, ("3",))]
    told["3"] = replace(told["3"], step_s=0.5)
    assert keys(judge([told] * 4, Settings())) == [(Kind.SLOW_COMPUTE, ("3",))]


def test_slow_encoding_is_judged_apart():
    told = {str(rank): Word(1, step_s=0.1, encode_s=0.5 if rank == 2 else 0.01) for rank in range(4)}
    assert keys(judge([told] * 4, Settings())) == [(Kind.SLOW_ENCODING, ("2",))]


def test_since_is_the_call_without_a_break():
    told = {str(rank): Word(1, encode_s=0.5 if rank == 2 else 0.01) for rank in range(4)}
    first = since(judge([told] * 4, Settings()), (), 7)
    assert [each.since for each in first] == [7]
    assert [each.since for each in since(judge([told] * 4, Settings()), first, 8)] == [7]
    assert [each.since for each in since(judge([told] * 4, Settings()), (), 9)] == [9]
    assert str(first[0]).endswith("(since call 7)")


def test_only_the_window_is_judged():
    away = [{"a": Word(1)}, {"b": Word(1)}] * 4
    assert judge(away, Settings())
    assert judge(away, Settings(window=2)) == []
    assert judge([], Settings()) == []
