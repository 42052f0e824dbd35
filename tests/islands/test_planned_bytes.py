"""Planned bytes are those that torch's engines ask for, tier by tier: two pairs of devices."""

from __future__ import annotations

import pytest
from collective_counts import ENGINES, model

from thinwire.plan import Costs, Tier, partition
from thinwire.plan.partition import ENGINES as PLANS
from thinwire.plan.partition import _priced

pytestmark = pytest.mark.slow

TIERS = [Tier("pair", 2, 1e9), Tier("site", 2, 1e8)]
PARAMETERS = sum(p.numel() for p in model().parameters())
FLOAT32 = Costs(weight_bytes=4, gradient_bytes=4, optimizer_bytes=8)


def planned(name):
    """The plan that a mesh and an option of fully_shard come from."""
    engine = "zero" if ENGINES[name] is None else "fsdp2"
    for groups, carried in PLANS[engine]([1, 2, 4], PARAMETERS, FLOAT32):
        plan = _priced(engine, groups, carried, TIERS, PARAMETERS, FLOAT32)
        if engine == "zero" or (plan.mesh, plan.reshard_after_forward) == ENGINES[name]:
            return plan
    raise AssertionError(f"no plan is {name}")


@pytest.mark.parametrize("name", ENGINES)
def test_planned_bytes_are_those_that_the_engine_asks_for(quad, name):
    plan = planned(name)
    for member in quad:
        found = member["collectives"][name]
        assert {tier: found[tier] for tier in ("pair", "site")} == plan.sent_bytes


@pytest.mark.parametrize("name", ENGINES)
def test_planned_state_is_what_the_optimizer_keeps(quad, name):
    """ZeRO-1 deals whole parameters, so that its share is P/n on the average only."""
    kept = [member["collectives"][name]["optimizer"] for member in quad]
    assert sum(kept) / 4 == 8 * PARAMETERS / planned(name).optimizer
    if ENGINES[name] is not None:
        assert len(set(kept)) == 1
        assert {member["collectives"][name]["weights"] for member in quad} == {4 * PARAMETERS / planned(name).optimizer}


def test_what_the_planner_chooses_is_among_what_was_counted():
    best = partition(TIERS, PARAMETERS, 1e9, costs=FLOAT32)
    assert best.sent_bytes == planned("replicas, zero 2").sent_bytes
