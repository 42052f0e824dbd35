"""Partitions of a model's state to tiers: the best of all, by another account of what each costs."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis.strategies import floats, integers, lists, tuples

from thinwire.codecs import fp32
from thinwire.errors import ConfigError
from thinwire.plan import Costs, Tier, islands, partition
from thinwire.topologies import Everyone, Islands

TIERS = [Tier("package", 2, 1.6e12), Tier("node", 4, 4e11), Tier("site", 8, 1e11)]
P = 20_000_000_000


def brute_force(tiers, parameters, capacity, costs):
    """(time, memory, sizes) of the best of all triples, rank by rank and tier by tier."""
    sizes = [tier.size for tier in tiers]
    devices = math.prod(sizes)
    w, g, o = (parameters * each for each in (costs.weight_bytes, costs.gradient_bytes, costs.optimizer_bytes))

    def level(a, b):
        """The outermost tier at which two devices differ."""
        found, unit = -1, 1
        for index, size in enumerate(sizes):
            unit *= size
            if a // (unit // size) % size != b // (unit // size) % size:
                found = index
        return found

    def seconds(total, ranks):
        """A ring's: everybody sends (n-1)/n of it at the pace of the slowest tier between any two."""
        if len(ranks) == 1:
            return 0.0
        between = {level(a, b) for a, b in itertools.combinations(ranks, 2)}
        slowest = min(tiers[index].rate_bits_per_s for index in between)
        return 8 * total * (len(ranks) - 1) / len(ranks) / slowest

    best = None
    ends = [math.prod(sizes[:k]) for k in range(len(sizes) + 1)]
    for kept, reduced, stepped in itertools.product(ends, repeat=3):
        if not kept <= reduced <= stepped:
            continue
        memory = w / kept + g / reduced + o / stepped
        if memory > capacity:
            continue
        time = 2 * seconds(w, range(kept)) + seconds(g, range(reduced))
        time += 2 * seconds(g / reduced, range(0, devices, reduced))
        time += seconds(w / kept, range(0, stepped, kept))
        if best is None or (time, memory) < best[:2]:
            best = (time, memory, (kept, reduced, stepped))
    return best


@pytest.mark.parametrize("capacity", [4e11, 1e11, 6e10, 2e10, 6e9])
def test_the_planner_finds_what_brute_force_finds_on_2_4_8(capacity):
    found = partition(TIERS, P, capacity, engines=("ideal",))
    time, memory, sizes = brute_force(TIERS, P, capacity, Costs())
    assert (found.weights, found.gradients, found.optimizer) == sizes
    assert found.time_s == pytest.approx(time, rel=1e-12)
    assert found.memory_bytes == pytest.approx(memory, rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    lists(tuples(integers(1, 3), floats(1e6, 1e12)), min_size=1, max_size=3),
    tuples(integers(1, 8), integers(1, 8), integers(1, 16)),
    floats(0.05, 1.0),
)
def test_the_planner_finds_what_brute_force_finds(shapes, costs, share):
    tiers = [Tier(f"tier {index}", size, rate) for index, (size, rate) in enumerate(shapes)]
    costs = Costs(*costs)
    capacity = share * 1e6 * (costs.weight_bytes + costs.gradient_bytes + costs.optimizer_bytes)
    best = brute_force(tiers, 10**6, capacity, costs)
    if best is None:
        with pytest.raises(ConfigError, match="1000000 parameters in"):
            partition(tiers, 10**6, capacity, costs=costs, engines=("ideal",))
        return
    found = partition(tiers, 10**6, capacity, costs=costs, engines=("ideal",))
    assert found.time_s == pytest.approx(best[0], rel=1e-9)
    assert found.memory_bytes <= capacity


def test_more_memory_is_never_slower_and_ideal_is_never_slower_than_an_engine():
    times = []
    for capacity in (4e11, 1e11, 6e10, 2e10, 6e9):
        ideal, real = (partition(TIERS, P, capacity, engines=(name,)).time_s for name in ("ideal", "fsdp2"))
        assert ideal <= real
        times.append(real)
    assert times == sorted(times)


def test_partitions_come_as_what_fully_shard_takes():
    """Sums between nodes are of shards, so that sharding in the node is worth it even where memory is plenty."""
    plenty = partition(TIERS, P, 4e11)
    assert (plenty.engine, plenty.mesh, plenty.reshard_after_forward) == ("fsdp2", (8, 8), False)
    assert plenty.memory_bytes == 2 * P + 14 * P / 8
    less = partition(TIERS, P, 6e10)
    assert (less.mesh, less.reshard_after_forward) == ((8, 8), 2), "weights stay in the package between passes"
    assert less.memory_bytes == 2 * P / 2 + 14 * P / 8
    tight = partition(TIERS, P, 6e9)
    assert (tight.mesh, tight.reshard_after_forward) == ((64,), True)
    assert tight.memory_bytes == 16 * P / 64


def test_zero_1_is_for_zero_and_its_bytes_are_one_half_more_than_the_stage_takes_in_theory():
    tiers = [Tier("node", 8, 1e11)]
    found = partition(tiers, 1000, 1e9, engines=("zero",))
    assert (found.weights, found.gradients, found.optimizer) == (1, 1, 8)
    assert found.sent_bytes == {"node": 3 * 2000 * 7 / 8}
    assert found.memory_bytes == 4 * 1000 + 12 * 1000 / 8
    with pytest.raises(ConfigError, match="a partition for zero"):
        _ = found.reshard_after_forward


def test_bytes_are_told_by_the_tier_that_they_cross():
    found = partition(TIERS, 1000, 1e9, engines=("fsdp2",), costs=Costs(2, 4, 12))
    assert (found.weights, found.optimizer) == (1, 8)
    assert found.sent_bytes == {"package": 0, "node": (2000 + 4000) * 7 / 8, "site": 2 * 500 * 7 / 8}
    spread = partition(TIERS[:2], 1000, 7.1e3, engines=("ideal",), costs=Costs(2, 4, 12))
    assert (spread.weights, spread.gradients, spread.optimizer) == (2, 8, 8)
    assert spread.sent_bytes == {"package": 2 * 2000 / 2, "node": 4000 * 7 / 8 + 1000 * 3 / 4}


def test_islands_match_the_tiers():
    assert islands(TIERS) == Islands(2, between=Islands(4))
    assert islands(TIERS[:2]) == Islands(2)
    assert islands(TIERS[:1]) == Everyone()
    alike = [Tier("socket", 2, 1.2e11), Tier("node", 4, 1e11), Tier("site", 8, 1e9)]
    assert islands(alike) == Islands(8), "tiers of nearly one rate are one"
    assert islands([Tier("alone", 1, 1e12), *TIERS]) == islands(TIERS)
    assert islands(TIERS).inside == fp32


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Tier("node", 0, 1e9), r"tier 'node' of 0 at 1e\+09 bit/s"),
        (lambda: Tier("node", 2, 0.0), "tier 'node' of 2 at 0 bit/s"),
        (lambda: partition(TIERS, P, 1e9), r"20000000000 parameters in 1e\+09 bytes on each of 64 devices"),
        (lambda: partition(TIERS, P, 1e12, engines=("deepspeed",)), "engine 'deepspeed'"),
        (lambda: partition(TIERS, P, 1e12, engines=()), "no engine"),
        (lambda: partition([], P, 1e12), "no tier"),
    ],
)
def test_requests_that_cannot_be_met(make, text):
    with pytest.raises(ConfigError, match=text):
        make()
