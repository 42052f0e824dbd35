"""Pacers: pure functions of what was told, and runs that go at their pace."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

import thinwire
from small import batch, loss_of, make_model
from thinwire import ConfigError, Network, diloco, every_step, local_sgd
from thinwire.aggregators import WeightedMean
from thinwire.links.base import Link
from thinwire.links.local import run
from thinwire.method import Method
from thinwire.pace import PACERS, ByLink, ByNoise, ByRate, ByShares, BySpeed, Pace, Pacing, Told, disagreement
from thinwire.schedules import Every, Paced
from thinwire.topologies import RandomPairs


def told(*step_s: float, **facts: Any) -> dict[int, Told]:
    return {rank: Told(**{"step_s": s, "samples": 8.0, "lr": 0.1, **facts}) for rank, s in enumerate(step_s)}


# --- decisions -------------------------------------------------------------------------------------------------------


def test_steps_by_speed():
    """H_w = floor(H v_w / v), at least one."""
    pace = BySpeed(smooth=0).decide(Pace(20), told(0.1, 0.2, 0.3, 100.0))
    assert pace.local == {0: 20, 1: 10, 2: 6, 3: 1}
    assert pace.steps == 20


def test_speed_is_smoothed():
    by_speed = BySpeed(smooth=0.5)
    before = by_speed.decide(Pace(16), told(0.1, 0.1))
    assert by_speed.decide(before, told(0.1, 0.3)).local == {0: 16, 1: 8}, "0.3 and 0.1 before it: 0.2"
    assert BySpeed(smooth=0).decide(before, told(0.1, 0.4)).local == {0: 16, 1: 4}


def test_rounds_by_link():
    """A round of 1 s may cost a tenth on top of steps of 0.1 s: every 100 steps, in doublings."""
    pacer, pace, seen = ByLink(0.1), Pace(10), []
    for _ in range(6):
        pace = pacer.decide(pace, told(0.1, 0.1, round_s=1.0, size2=1.0, update2=1.0))
        seen.append(pace.steps)
    assert seen == [20, 40, 80, 100, 100, 100]
    assert pacer.decide(Pace(10), told(0.1)).steps == 10, "no round has ended"
    assert ByLink(0.1, most=30).decide(Pace(20), told(0.1, round_s=1.0, update2=1.0)).steps == 30
    assert ByLink(0.1, least=7).decide(Pace(20), told(1.0, round_s=0.01, update2=1.0)).steps == 7


def test_the_link_is_measured_by_whom_waits_least():
    facts = {rank: Told(0.1, 8.0, 0.1, round_s=s, size2=1.0, update2=1.0) for rank, s in enumerate((9.0, 1.0, 5.0))}
    assert ByLink(0.5).decide(Pace(100), facts).steps == 20


def test_members_that_drift_apart_meet_more_often():
    """Two members that send orthogonal vectors: mean 1/2 of |x|^2 against 1/4: disagreement 1."""
    x = torch.eye(2)
    size2, update2 = 1.0, float(x.mean(dim=0).square().sum())
    facts = told(0.1, 0.1, round_s=100.0, size2=size2, update2=update2)
    assert disagreement(facts) == pytest.approx(1.0)
    assert ByLink(0.1, drift=0.9).decide(Pace(20), facts).steps == 10
    assert ByLink(0.1, drift=1.1).decide(Pace(20), facts).steps == 40
    assert disagreement(told(0.1, size2=1.0, update2=0.0)) == math.inf
    left_out = {**facts, 2: Told(0.1, 8.0, 0.1, size2=-1.0, update2=update2)}
    assert disagreement(left_out) == pytest.approx(1.0)


def test_rounds_by_learning_rate():
    """H = floor((alpha / lr)^2) once the rate falls; `least` while it rises and while it is constant."""
    pacer, pace, seen = ByRate(0.4, least=2), Pace(2), []
    for lr in (0.05, 0.1, 0.2, 0.2, 0.1, 0.05, 0.04, 0.0):
        pace = pacer.decide(pace, {0: Told(0.1, 8.0, lr), 1: Told(0.1, 8.0, lr)})
        seen.append(pace.steps)
    assert seen == [2, 2, 2, 2, 16, 64, 100, 2]
    assert ByRate(0.4, least=2, most=50).decide(Pace(2, memory={"highest": 1.0}), told(0.1)).steps == 16
    assert ByRate(1e-9, least=3).decide(Pace(3, memory={"highest": 1.0}), told(0.1)).steps == 3


def test_shares_of_a_batch_by_speed():
    """Speeds 3 : 1 of a batch of 64 in micro-batches of 8: six and two."""
    assert ByShares(64).decide(Pace(1), told(0.1, 0.3)).parts == {0: 6, 1: 2}
    pace = Pace(1, parts={0: 6, 1: 2})
    facts = {0: Told(0.6, 48.0, 0.1), 1: Told(0.6, 16.0, 0.1)}
    assert ByShares(64).decide(pace, facts).parts == {0: 6, 1: 2}, "the same speeds, told with other parts"
    assert sum(ByShares(100).decide(Pace(1), told(0.1, 0.1, 0.1)).parts.values()) * 8 >= 100
    assert ByShares(8).decide(Pace(1), told(0.1, 10.0)).parts == {0: 1, 1: 1}, "everybody takes part"
    assert ByShares(64).decide(Pace(1), told(0.0, 0.0)).parts == {}, "no time has passed: as before"


def test_positions_meet_exactly_at_the_round():
    pacing = Pacing(Pace(20, local={1: 7}), since=40)
    seen = []
    for _ in range(7):
        pacing = pacing.moved()
        seen.append(pacing.step(1))
    assert seen == [42, 45, 48, 51, 54, 57, 60]
    assert pacing.step(0) == 47, "a member that is not named makes every step"


# --- runs ------------------------------------------------------------------------------------------------------------


def go(link: Link, method: Method, steps: int, *, lr: float = 0.05, save_at: int | None = None) -> dict[str, Any]:
    """Train to shared step `steps`; with `save_at`, stop and resume there."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    made, outcomes, number = [], [], 0
    sync = thinwire.synchronize(model, optimizer, method, link, observer=outcomes.append)
    sync.__enter__()
    while sync.step < steps:
        for _ in range(sync.parts or 1):
            x, y = batch(number, link.rank)
            number += 1
            (loss_of(model, x, y) / (sync.parts or 1)).backward()
            sync.count(len(x))
        optimizer.step()
        optimizer.zero_grad()
        made.append((sync.step, sync.parts))
        if save_at is not None and sync.step >= save_at:
            save_at = None
            saved, weights = sync.state_dict(), {k: v.clone() for k, v in model.state_dict().items()}
            inner = optimizer.state_dict()
            for hook in sync._hooks:
                hook.remove()
            model = make_model()
            optimizer = torch.optim.SGD(model.parameters(), lr=lr)
            sync = thinwire.synchronize(model, optimizer, method, link, observer=outcomes.append)
            sync.__enter__()
            model.load_state_dict(weights)
            optimizer.load_state_dict(inner)
            sync.load_state_dict(saved)
    sync.__exit__(None, None, None)
    return {
        "made": made, "seconds": link.now(), "consensus": sync.consensus(), "begins": [o.step for o in outcomes],
        "waited": sync.timing.wait_s, "pace": sync._pacing.pace,
    }  # fmt: skip


def test_a_slow_member_makes_fewer_steps_and_keeps_nobody_waiting():
    network = Network(step_s=[0.1, 0.1, 0.2], latency_s=0.001)
    method = local_sgd(every=10)
    plain = run(3, lambda link: go(link, method, 60), network)
    paced = run(3, lambda link: go(link, method.paced(BySpeed()), 60), network)
    assert [len(each["made"]) for each in plain] == [60, 60, 60]
    assert [len(each["made"]) for each in paced] == [60, 60, 10 + 5 * 5], "one round to find out"
    assert max(each["seconds"] for each in paced) < 0.65 * max(each["seconds"] for each in plain)
    assert paced[0]["waited"] < 0.2 * plain[0]["waited"]
    for each in paced:
        assert all(map(torch.equal, each["consensus"], paced[0]["consensus"]))


def test_equal_speeds_change_nothing():
    network = Network(step_s=0.1, latency_s=0.001)
    plain = run(2, lambda link: go(link, diloco(every=5), 20), network)
    paced = run(2, lambda link: go(link, diloco(every=5).paced(BySpeed()), 20), network)
    assert all(map(torch.equal, plain[0]["consensus"], paced[0]["consensus"]))


def test_rounds_become_rarer_on_a_slow_link():
    network = Network(step_s=0.1, latency_s=0.2)
    results = run(2, lambda link: go(link, diloco(every=2).paced(ByLink(0.1)), 100), network)
    begins = results[0]["begins"]
    gaps = [after - before for before, after in pairwise(begins)]
    assert gaps[0] < gaps[-1]
    assert results[0]["pace"] == results[1]["pace"]


@pytest.mark.parametrize("overlap", [0, 2, 10])
@pytest.mark.parametrize("pacer", [BySpeed(), ByLink(0.3, drift=2.0, least=10)])
def test_a_stopped_run_goes_on_to_the_bit(pacer: Any, overlap: int):
    """Saved as members pass step 13: between rounds, with one under way if they overlap."""
    network = Network(step_s=[0.1, 0.1, 0.25], latency_s=0.3)
    outer = thinwire.outer.SGD(0.5)
    method = diloco(every=10).but(schedule=Paced(Every(10, overlap), pacer), outer=outer)
    whole = run(3, lambda link: go(link, method, 50), network)
    parted = run(3, lambda link: go(link, method, 50, save_at=13), network)
    for one, other in zip(whole, parted, strict=True):
        assert one["made"] == other["made"]
        assert all(map(torch.equal, one["consensus"], other["consensus"]))


def test_a_batch_is_shared_out_by_speed_and_is_one_batch_all_the_same():
    """Two members 3 : 1; the combined gradient is that of all samples together (weighted means of means)."""
    network = Network(step_s=[0.1, 0.3], latency_s=0.0)
    method = every_step().but(aggregator=WeightedMean()).paced(ByShares(64))
    results = run(2, lambda link: go(link, method, 8), network)
    assert [parts for _, parts in results[0]["made"]][1:] == [6] * 7
    assert [parts for _, parts in results[1]["made"]][1:] == [2] * 7
    assert results[0]["waited"] < 0.3, "after the first step both come at the same time"
    assert all(map(torch.equal, results[0]["consensus"], results[1]["consensus"]))

    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    numbers = [0, 0]
    for step in range(8):
        shares = (1, 1) if step == 0 else (6, 2)
        pieces = []
        for rank, share in enumerate(shares):
            pieces += [batch(numbers[rank] + part, rank) for part in range(share)]
            numbers[rank] += share
        loss_of(model, torch.cat([x for x, _ in pieces]), torch.cat([y for _, y in pieces])).backward()
        optimizer.step()
        optimizer.zero_grad()
    alone = torch.cat([p.detach().flatten() for p in model.parameters()])
    together = results[0]["consensus"][0]
    assert torch.allclose(alone, together, atol=2e-6), "8 steps of float32 sums in another order"


# --- refusals --------------------------------------------------------------------------------------------------------


def test_refusals():
    with pytest.raises(ConfigError, match=r"pacer BySpeed.*Delta\(fragments=2.*\n.*whole model.*\n.*one fragment"):
        diloco().but(payload=thinwire.payloads.Delta(2)).paced(BySpeed())
    with pytest.raises(ConfigError, match=r"pacer BySpeed.*RandomPairs"):
        local_sgd().but(topology=RandomPairs()).paced(BySpeed())
    with pytest.raises(ConfigError, match=r"pacer ByShares.*it changes the parts\n.*by_shares and by_noise"):
        diloco().paced(ByShares(64))
    with pytest.raises(ConfigError, match=r"pacer BySpeed.*it changes the steps"):
        every_step().paced(BySpeed())
    with pytest.raises(ConfigError, match=r"pacer ByShares.*Mean\(\).*unlike sizes\n.*\n.*WeightedMean\(\), and call"):
        every_step().paced(ByShares(64))
    with pytest.raises(ConfigError, match=r"pacer BySpeed.*with scallion.*\n.*as many local steps"):
        Method(schedule=Every(5), payload=thinwire.payloads.Delta(), outer=thinwire.outer.SGD(),
               codec=thinwire.codecs.parse("scallion(randk(0.5, scaled=True))")).paced(BySpeed())  # fmt: skip
    with pytest.raises(ConfigError, match=r"with schedule Paced.*\n.*even distances"):
        diloco().paced(BySpeed()).paced(BySpeed())
    with pytest.raises(ConfigError, match=r"by_speed: smooth = 1\n.*\[0, 1\)"):
        BySpeed(smooth=1)
    with pytest.raises(ConfigError, match="by_link: share = 0"):
        ByLink(0)
    with pytest.raises(ConfigError, match="by_link: drift = -1"):
        ByLink(drift=-1)
    with pytest.raises(ConfigError, match="by_link: between 5 and 4"):
        ByLink(least=5, most=4)
    with pytest.raises(ConfigError, match="by_rate: alpha = 0"):
        ByRate(0)
    with pytest.raises(ConfigError, match="by_rate: between 0 and 9"):
        ByRate(0.1, least=0, most=9)
    with pytest.raises(ConfigError, match="by_shares: batch = 0"):
        ByShares(0)
    assert set(PACERS) >= {"by_speed", "by_link", "by_rate", "by_shares"}


# --- a batch that grows with the noise -------------------------------------------------------------------------------


def noisy(samples: float, size2: float, update2: float) -> dict[int, Told]:
    return {rank: Told(0.1, samples, 0.1, size2=size2, update2=update2) for rank in range(4)}


def test_a_batch_grows_when_the_noise_asks_for_it():
    """Four members of 8: sigma^2 = 8 (4 |g_i|^2 - 4 |g|^2) / 3, b' = sigma^2 / (eta^2 (|g|^2 - sigma^2 / 32))."""
    pacer = ByNoise(32, eta=0.5, decay=0.0)
    first = pacer.decide(Pace(1), noisy(8, 0.0, 0.0))
    assert first.parts == dict.fromkeys(range(4), 1), "nothing is known yet"
    variance = 8 * (4 * 2.0 - 4 * 1.0) / 3
    asked = variance / (0.25 * (1.0 - variance / 32))
    second = pacer.decide(first, noisy(8, 2.0, 1.0))
    assert second.memory["batch"] == pytest.approx(-(-asked // 1))
    assert sum(second.parts.values()) * 8 >= asked
    again = pacer.decide(second, noisy(16, 1.0, 1.0))
    assert again.memory["batch"] == second.memory["batch"], "it never shrinks"
    assert ByNoise(32, most=40, decay=0.0).decide(first, noisy(8, 2.0, 1.0)).memory["batch"] == 40
    assert ByNoise(32, eta=5.0, decay=0.0).decide(first, noisy(8, 2.0, 1.0)).memory["batch"] == 32
    assert ByNoise(32, decay=0.9).decide(second, noisy(16, 1.0, 1.0)).memory != again.memory


def test_without_noise_the_batch_stays():
    pacer = ByNoise(32)
    pace = pacer.decide(Pace(1), noisy(8, 0.0, 0.0))
    for _ in range(5):
        pace = pacer.decide(pace, noisy(8, 1.0, 1.0))
    assert pace.memory["batch"] == 32


def test_a_run_whose_batch_grows():
    method = every_step().but(aggregator=WeightedMean()).paced(ByNoise(16, eta=0.3, most=96))
    results = run(2, lambda link: go(link, method, 12), Network(step_s=0.1))
    parts = [each[1] or 1 for each in results[0]["made"]]
    assert parts == sorted(parts)
    assert parts[-1] > 1
    assert all(map(torch.equal, results[0]["consensus"], results[1]["consensus"]))


def test_refusals_of_a_growing_batch():
    with pytest.raises(ConfigError, match=r"by_noise: from 0 to 50000 samples"):
        ByNoise(0)
    with pytest.raises(ConfigError, match="by_noise: eta = 0"):
        ByNoise(8, eta=0)
    with pytest.raises(ConfigError, match="by_noise: decay = 1"):
        ByNoise(8, decay=1)
