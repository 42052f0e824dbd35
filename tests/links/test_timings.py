"""Timings: medians of logarithms, bounded, and the noise they say they have."""

from __future__ import annotations

import math
import random
import statistics

import torch

from thinwire.links.local import run
from thinwire.links.network import Network
from thinwire.links.timings import Timings


def test_the_median_of_the_last_messages_of_each_peer():
    timings = Timings(window=3, least_bytes=10)
    for seconds in (100.0, 1.0, 4.0, 2.0):
        timings.took(1, 10, seconds)
    timings.took(2, 20, 8.0)
    assert timings.paces() == {1: math.log(2.0 / 10), 2: math.log(8.0 / 20)}


def test_small_messages_and_no_time_tell_nothing():
    timings = Timings(least_bytes=10)
    timings.took(1, 9, 1.0)
    timings.took(1, 10, 0.0)
    assert timings.paces() == {}
    assert timings.noise() == 0


def test_the_noise_is_that_of_medians():
    """Over many links; 15 % is what 2000 of them leave of chance."""
    drawn, medians, told = random.Random(0), [], []
    for _ in range(100):
        timings = Timings(least_bytes=1)
        for peer in range(20):
            for _ in range(20):
                timings.took(peer, 1, math.exp(drawn.gauss(0, 0.3)))
        medians += timings.paces().values()
        told.append(timings.noise())
    assert abs(statistics.median(told) / statistics.pstdev(medians) - 1) < 0.15
    one = Timings(least_bytes=1)
    one.took(1, 1, 1.0)
    assert one.noise() == 0


def test_the_simulated_link_measures_the_transmission_alone():
    """Whoever sends: 8 seconds / rate for a byte, however late it began."""

    def work(link):
        channel, others = link.open("data"), [rank for rank in link.members if rank != link.rank]
        for _ in range(link.rank):
            link.local_step()
        buffer = torch.zeros(1000, dtype=torch.uint8)
        channel.exchange(dict.fromkeys(others, buffer), dict.fromkeys(others, 1000), "data")
        return link.timings.paces()

    paces = run(3, work, Network(up_bits_per_s=[8e4, 8e5, 8e5], latency_s=0.1, step_s=5.0))
    for rank, found in enumerate(paces):
        expected = {peer: math.log(1e-4 if peer == 0 else 1e-5) for peer in range(3) if peer != rank}
        assert found.keys() == expected.keys()
        assert all(math.isclose(found[peer], expected[peer], rel_tol=1e-6) for peer in found)


def test_small_messages_of_the_simulated_link_are_left_out():
    def work(link):
        buffer = torch.zeros(576, dtype=torch.uint8)
        link.open("data").exchange({1 - link.rank: buffer}, {1 - link.rank: 576}, "data")
        return link.timings.paces()

    assert run(2, work, Network(up_bits_per_s=8e4)) == [{}, {}]
