"""Schedules: what a person writes, what a seed draws."""

from __future__ import annotations

from itertools import pairwise

import pytest

from thinwire.chaos.schedule import VERBS, Fault, drawn, end_s, parse
from thinwire.errors import ConfigError

SCRIPT = """
# faults of every kind
12s kill host2
2min part host1 host2 for 20s
30s kill lighthouse          # wherever it runs
45s down host0 for 20s
50s down host0
70s stop host1 for 15s
90s cut host3 for 20s
3min throttle host2 1mbit for 30s
4min fill host1 for 20s
"""


def test_every_verb_is_read_in_order_of_time():
    found = parse(SCRIPT, 4)
    assert [each.at_s for each in found] == [12, 30, 45, 50, 70, 90, 120, 180, 240]
    assert {each.verb for each in found} == set(VERBS)
    assert found[0] == Fault(12, "kill", (2,))
    assert found[1] == Fault(30, "kill")
    assert found[6] == Fault(120, "part", (1, 2), 20)
    assert found[7] == Fault(180, "throttle", (2,), 30, 1e6)
    assert end_s(found) == 260
    assert end_s(()) == 0


def test_a_fault_is_written_as_it_is_read():
    assert parse("\n".join(map(str, parse(SCRIPT, 4))), 4) == parse(SCRIPT, 4)
    lines = drawn(3, 5, 30.0, 3600.0)
    assert parse("\n".join(map(str, lines)), 5) == lines


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("12s", "no fault ''"), ("12s burn host1", "no fault 'burn'"), ("soon kill host1", "soon"),
        ("12s kill", "kill "), ("12s kill host4", "no host 'host4'"), ("12s kill alice", "no host 'alice'"),
        ("12s kill host1 host2", "kill host1 host2"), ("12s part host1", "part host1"),
        ("12s part host1 host1", "part host1 host1"), ("12s kill host1 for 3s", "kill for 3s"),
        ("12s cut host1 for 0s", "cut for 0.0s"), ("12s throttle host1", "host1"),
        ("12s throttle host1 1bit", "a rate of 1 bit/s"), ("12s cut lighthouse", "no host 'lighthouse'"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_fault_is_named(line, why):
    with pytest.raises(ConfigError) as caught:
        parse(f"1s kill host0\n{line}", 4)
    assert caught.value.wrong.startswith(f"line 2, {line!r}: ")
    assert why in caught.value.wrong


def test_a_schedule_has_a_fault():
    with pytest.raises(ConfigError, match="a schedule without a fault"):
        parse("# nothing\n", 4)


def test_a_seed_draws_the_same_faults_and_all_kinds_of_them():
    found = drawn(7, 4, 30.0, 6000.0)
    assert found == drawn(7, 4, 30.0, 6000.0)
    assert found != drawn(8, 4, 30.0, 6000.0)
    assert {each.verb for each in found} == set(VERBS)
    assert Fault(0, "kill") in {Fault(0, each.verb, each.hosts) for each in found if each.verb == "kill"}
    gaps = [after.at_s - before.at_s for before, after in pairwise(found)]
    assert 25 < sum(gaps) / len(gaps) < 35


@pytest.mark.parametrize("hosts", [2, 3, 6])
def test_half_of_the_hosts_are_always_well_and_all_are_in_the_end(hosts):
    for seed in range(20):
        found = drawn(seed, hosts, 10.0, 300.0)
        assert end_s(found) < 300
        for now in found:
            lasting = [each for each in found if each.at_s <= now.at_s < each.at_s + (each.for_s or 0)]
            assert len({number for each in (*lasting, now) for number in each.hosts}) <= max(1, hosts // 2)
            assert (now.for_s is None) == (now.verb == "kill")


@pytest.mark.parametrize(("hosts", "every_s", "length_s"), [(1, 10, 100), (4, 0, 100), (4, 100, 100)])
def test_nothing_can_be_drawn(hosts, every_s, length_s):
    with pytest.raises(ConfigError, match="faults every"):
        drawn(0, hosts, every_s, length_s)
