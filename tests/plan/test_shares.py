"""Shares of a vector on lines of unlike speed: the programme against its closed form, and rounds that keep to it."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

import thinwire
from small import train
from thinwire import ConfigError, Network, diloco
from thinwire.plan import shares
from thinwire.topologies import Everyone
from thinwire.ways import shards

pytest.importorskip("scipy")


def seconds(w: tuple[float, ...], up: list[float], down: list[float]) -> float:
    """Of the two halves of a round, for a vector of one bit."""
    n = len(w)
    there = max(max((1 - w[i]) / up[i], (n - 1) * w[i] / down[i]) for i in range(n))
    return there + max(max((n - 1) * w[i] / up[i], (1 - w[i]) / down[i]) for i in range(n))


def test_equal_lines_have_equal_shares():
    found = shares([1e7] * 5, [1e7] * 5, 1_000_000)
    assert found.shares == pytest.approx([0.2] * 5)
    assert found.seconds == pytest.approx(2 * 4 / 5 * 0.8)
    assert found.even == pytest.approx(found.seconds)


def test_no_other_shares_are_better():
    """Against all shares of three members in hundredths, on lines of all kinds."""
    random.seed(4)
    grid = [(a / 100, b / 100, (100 - a - b) / 100) for a in range(101) for b in range(101 - a)]
    for _ in range(12):
        up, down = ([10 ** random.uniform(5, 8) for _ in range(3)] for _ in range(2))
        found = shares(up, down, 125_000)
        least = min(seconds(w, up, down) for w in grid) * 1e6
        assert found.seconds <= least * (1 + 1e-9)
        assert found.seconds >= 0.97 * least, "hundredths come close"
        assert found.seconds == pytest.approx(seconds(found.shares, up, down) * 1e6, rel=1e-6)
        assert found.even == pytest.approx(seconds((1 / 3,) * 3, up, down) * 1e6)
        assert sum(found.shares) == pytest.approx(1)


def test_a_line_that_is_slow_upwards_combines_little():
    """Four members, one at home: it sends its vector once, and hardly a result."""
    found = shares([1e9, 1e9, 1e9, 1e6], [1e9] * 4, 1_000_000)
    assert found.shares[3] < 0.01
    assert found.seconds == pytest.approx(8.0, rel=0.01)
    assert found.even == pytest.approx(1.5 * 8.0, rel=0.01)


def test_shards_keep_to_shares():
    assert [end - begin for begin, end in shards(256 * 10, 3, (0.5, 0.3, 0.2))] == [1280, 768, 512]
    assert [end - begin for begin, end in shards(256 * 10, 3, (1, 0, 0))] == [2560, 0, 0]
    assert shards(1000, 4, (1, 1, 1, 1)) == shards(1000, 4)
    for n in (0, 1, 255, 256, 5000):
        cut = shards(n, 3, (0.1, 0.7, 0.2))
        assert cut[0][0] == 0
        assert cut[-1][1] == n
        assert all(a[1] == b[0] for a, b in pairwise(cut))


def test_unlike_shares_change_when_a_round_ends_and_nothing_else():
    """Four members, one line a twentieth as fast up as down: the same bits, in the time that was planned."""
    up, down = [4e6, 4e6, 4e6, 2e5], [4e6] * 4
    n = 12 * 400 + 400 + 400 * 5 + 5
    plan = shares(up, down, 4 * n)

    def build() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(12, 400), torch.nn.Tanh(), torch.nn.Linear(400, 5))

    def go(topology: Everyone) -> list:
        method, network = diloco(every=2).but(topology=topology), Network(up_bits_per_s=up, down_bits_per_s=down)
        return thinwire.run(4, lambda link: train(link, method, 4, build=build), network)

    even, planned = go(Everyone()), go(Everyone(plan.shares))
    assert torch.equal(even[0].consensus[0], planned[0].consensus[0])
    saved = even[0].seconds - planned[0].seconds
    assert saved == pytest.approx(2 * (plan.even - plan.seconds), rel=0.2), "two rounds; blocks and headers"


def test_refusals():
    with pytest.raises(ConfigError, match=r"1 rates up and 1 down"):
        shares([1.0], [1.0], 1)
    with pytest.raises(ConfigError, match=r"rates \(0.0, 1.0, 1.0, 1.0, 1.0, 1.0\)"):
        shares([0.0, 1.0, 1.0], [1.0] * 3, 1)
    with pytest.raises(ConfigError, match=r"shares \(0.0, 0.0\)"):
        Everyone((0.0, 0.0))
    with pytest.raises(ConfigError, match=r"2 shares for 3 members"):
        Everyone((0.5, 0.5)).route(0, (0, 1, 2), 0)
