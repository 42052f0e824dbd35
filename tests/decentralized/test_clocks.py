"""Poisson clocks: everybody reads them alike, and they are Poisson."""

from __future__ import annotations

import math
from itertools import islice, pairwise, takewhile

import pytest

from thinwire.decentralized import Gossip, events, path, ring
from thinwire.decentralized.clocks import poisson

GOSSIP = Gossip(ring(5), (0.5, 1.0, 2.0, 0.0, 4.0))


def test_each_node_reads_its_own_part_of_the_whole():
    everything = events(GOSSIP, 3, 20.0)
    for node in range(5):
        assert events(GOSSIP, 3, 20.0, node=node) == [event for event in everything if node in event.nodes]


def test_events_are_in_one_order_and_counted_for_each_clock():
    everything = events(GOSSIP, 3, 20.0)
    assert [event.time for event in everything] == sorted({event.time for event in everything})
    for clock in range(10):
        mine = [event for event in everything if event.clock == clock]
        assert [event.turn for event in mine] == list(range(len(mine)))
        assert {event.nodes for event in mine} <= {(clock,) if clock < 5 else GOSSIP.graph.edges[clock - 5]}


def test_a_longer_horizon_goes_on_where_a_shorter_one_ends():
    short, long = events(GOSSIP, 3, 7.0), events(GOSSIP, 3, 20.0)
    assert long[: len(short)] == short
    assert short[-1].time < 7.0 <= long[len(short)].time


def test_seed_and_rates_change_the_times():
    assert events(GOSSIP, 3, 5.0) != events(GOSSIP, 4, 5.0)
    slow, quick = (list(islice(poisson(9, rate), 50)) for rate in (1.0, 4.0))
    assert [time / 4 for time in slow] == quick, "a power of two: exact"


def test_an_edge_of_rate_0_never_rings():
    assert not [event for event in events(GOSSIP, 3, 200.0) if event.clock == 5 + 3]


@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_waiting_times_are_exponential(key):
    times = list(islice(poisson(key, 1.0), 20_000))
    waits = [later - sooner for sooner, later in pairwise([0.0, *times])]
    # four standard deviations of a mean of 20000, whose terms have deviation 1 (the number) and at most 1/2 (the share)
    assert math.fsum(waits) / len(waits) == pytest.approx(1.0, abs=4 / math.sqrt(20_000))
    for beyond in (0.1, 0.5, 1.0, 2.5):
        share = sum(wait > beyond for wait in waits) / len(waits)
        assert share == pytest.approx(math.exp(-beyond), abs=2 / math.sqrt(20_000))
    again = [next_ > 1.0 for wait, next_ in pairwise(waits) if wait > 1.0]
    assert sum(again) / len(again) == pytest.approx(math.exp(-1), abs=2 / math.sqrt(len(again))), "no memory"


@pytest.mark.parametrize("rate", [0.3, 5.0])
def test_as_many_as_the_rate_says(rate):
    rung = len(list(takewhile(lambda time: time < 2000, poisson(5, rate))))
    assert rung == pytest.approx(2000 * rate, abs=4 * math.sqrt(2000 * rate))


def test_the_same_bits_everywhere():
    """Written down once: members on other machines and versions have to read these times."""
    assert [time.hex() for time in islice(poisson(7, 3.0), 4)] == TIMES
    assert [(event.clock, event.time.hex()) for event in events(Gossip(path(2), (1.0,)), 0, 1.0)] == EVENTS


TIMES = ["0x1.4060c88f09599p-1", "0x1.42f513dbd282ap+0", "0x1.79bf99c573525p+0", "0x1.9afd4a4f5a6e8p+0"]
EVENTS = [
    (2, "0x1.4125509092238p-4"),
    (1, "0x1.e65519c2732bap-2"),
    (0, "0x1.6842a33d29331p-1"),
    (0, "0x1.cd1d636d7f700p-1"),
]
