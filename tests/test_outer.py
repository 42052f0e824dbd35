"""Outer steps: against the rules by hand, and pure."""

from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from thinwire.errors import ConfigError
from thinwire.outer import SGD, Adam, Average, Mine, Mix, Nesterov, NoStep, Now, Rebase

OUTERS = [
    SGD(1.0), SGD(0.5, 0.9), Nesterov(0.7, 0.9), Adam(), Mix(Nesterov(0.4, 0.9), 0.3), Rebase(SGD(0.7, 0.5)), Average(),
    NoStep(),
]  # fmt: skip


def vectors(count: int, n: int = 50) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(n, generator=generator) for _ in range(count)]


def run(outer, anchor: Tensor, updates: list[Tensor]) -> list[Tensor]:
    memory, anchors = {}, []
    for update in updates:
        anchor, memory = outer.step(anchor, update, memory, Now())
        anchors.append(anchor)
    return anchors


def test_nesterov_is_the_rule_by_hand_and_its_constant_rate_form():
    """b <- mu b + D, a <- a - lr (D + mu b); and u <- mu u + lr D, a <- a - mu u - lr D. In float64, to 1e-6."""
    start, *updates = vectors(7)
    lr, mu = 0.7, 0.9
    a, b = start.double(), torch.zeros(50, dtype=torch.float64)
    c, u = start.double(), torch.zeros(50, dtype=torch.float64)
    for ours, update in zip(run(Nesterov(lr, mu), start, updates), updates, strict=True):
        d = update.double()
        b = mu * b + d
        a = a - lr * (d + mu * b)
        u = mu * u + lr * d
        c = c - mu * u - lr * d
        assert torch.allclose(ours.double(), a, atol=1e-6 * 20)  # anchors reach about 20: relative 1e-6
        assert torch.allclose(a, c, atol=1e-12)


def test_heavy_ball_is_the_rule_by_hand():
    start, *updates = vectors(6)
    a, b = start.double(), torch.zeros(50, dtype=torch.float64)
    for ours, update in zip(run(SGD(0.5, 0.8), start, updates), updates, strict=True):
        b = 0.8 * b + update.double()
        a = a - 0.5 * b
        assert torch.allclose(ours.double(), a, atol=1e-5)


def test_first_step_gain_and_steady_state_gain():
    """lr (1 + mu) = 1.33 at first, lr / (1 - mu) = 7 in the long run, for DiLoCo's values."""
    ones = [torch.ones(1)] * 300
    anchors = run(Nesterov(0.7, 0.9), torch.zeros(1), ones)
    assert anchors[0].item() == pytest.approx(-1.33)
    assert (anchors[-2] - anchors[-1]).item() == pytest.approx(7.0, rel=1e-3)


def test_adam_by_hand():
    start, *updates = vectors(5)
    outer = Adam(0.1, (0.8, 0.95), 1e-2)
    a = start.double()
    m, v = torch.zeros(50, dtype=torch.float64), torch.zeros(50, dtype=torch.float64)
    for t, (ours, update) in enumerate(zip(run(outer, start, updates), updates, strict=True), start=1):
        d = update.double()
        m, v = 0.8 * m + 0.2 * d, 0.95 * v + 0.05 * d * d
        a = a - 0.1 * (m / (1 - 0.8**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-2)
        assert torch.allclose(ours.double(), a, atol=1e-5)


def test_lr_one_without_momentum_subtracts_exactly():
    start, update = vectors(2)
    assert torch.equal(SGD(1.0).step(start, update, {}, Now())[0], start - update)
    assert SGD(1.0).step(start, update, {}, Now())[1] == {}
    assert Nesterov(0.7, 0) == SGD(0.7)


@pytest.mark.parametrize("outer", OUTERS, ids=repr)
def test_nothing_given_is_changed(outer):
    anchor, update, live, sent = vectors(4)
    _, memory = outer.step(anchor, update, {}, Now())
    given_ = [anchor, update, live, sent, *memory.values()]
    before = [value.clone() for value in given_]
    again = [outer.step(anchor, update, memory, Now()) for _ in range(2)]
    outer.merge(Mine(live, sent), anchor, {}, Now())[0]
    assert all(torch.equal(value, copy) for value, copy in zip(given_, before, strict=True))
    assert torch.equal(again[0][0], again[1][0])
    assert all(torch.equal(again[0][1][name], again[1][1][name]) for name in memory)


def test_gradients_are_not_overwritten_by_batched_optimizers(monkeypatch):
    """On GPUs torch batches by default, which writes into the gradient; as if this were one."""
    for module in ("torch.optim.sgd", "torch.optim.adam"):
        monkeypatch.setattr(import_module(module), "_default_to_fused_or_foreach", lambda *_, **__: (False, True))
    for outer in (Nesterov(0.7, 0.9), Adam()):
        test_nothing_given_is_changed(outer)


@given(seed=st.integers(0, 1000))
def test_mix_is_exact_at_both_ends(seed):
    live, anchor, sent = torch.randn(3, 20, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(Mix(SGD(), 0.0).merge(Mine(live, sent), anchor, {}, Now())[0], anchor)
    assert torch.equal(Mix(SGD(), 1.0).merge(Mine(live, sent), anchor, {}, Now())[0], live)


def test_mix_and_rebase_by_hand():
    live, anchor, sent = (torch.tensor([value]) for value in (8.0, 4.0, 6.0))
    assert Mix(SGD(), 0.25).merge(Mine(live, sent), anchor, {}, Now())[0].item() == 0.25 * 8 + 0.75 * 4
    assert Rebase(SGD()).merge(Mine(live, sent), anchor, {}, Now())[0].item() == 4 + (8 - 6)
    assert torch.equal(Rebase(SGD()).merge(Mine(live, live), anchor, {}, Now())[0], anchor), (
        "no step under way: the anchor"
    )
    assert Mix(Rebase(SGD()), 0.5).merge(Mine(live, sent), anchor, {}, Now())[0].item() == 7, (
        "wrappers see what the inner part gives"
    )


@pytest.mark.parametrize("wrapper", [Mix, Rebase])
def test_wrappers_step_as_the_part_inside(wrapper):
    anchor, update = vectors(2)
    inner = Nesterov(0.3, 0.5)
    assert torch.equal(wrapper(inner).step(anchor, update, {}, Now())[0], inner.step(anchor, update, {}, Now())[0])
    assert wrapper(inner).accepts == inner.accepts == "delta"
    assert wrapper(Average()).accepts == "parameters"


def test_average_and_no_step():
    anchor, update, live = vectors(3)
    assert torch.equal(Average().step(anchor, update, {}, Now())[0], update)
    assert torch.equal(Average().merge(Mine(live, live), anchor, {}, Now())[0], anchor)
    assert torch.equal(NoStep().step(anchor, update, {}, Now())[0], anchor)
    assert torch.equal(NoStep().merge(Mine(live, live), anchor, {}, Now())[0], live)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: SGD(0.0), "outer lr=0.0\n.*a number above 0\n.*0.7 for DiLoCo, 1.0 to average"),
        (lambda: SGD(-1.0), "outer lr=-1.0"),
        (lambda: SGD(math.nan), "outer lr=nan"),
        (lambda: SGD(1.0, 1.0), r"outer momentum=1.0\n.*in \[0, 1\)\n.*0.9 for DiLoCo"),
        (lambda: SGD(1.0, 0.0, nesterov=True), "Nesterov's step without momentum\n.*above 0\n.*momentum=0.9"),
        (lambda: Adam(0.1, (0.9, 1.0)), "outer momentum=1.0"),
        (lambda: Adam(0.1, (-0.9, 0.5)), "outer momentum=-0.9"),
        (lambda: Adam(0.0), "outer lr=0.0"),
        (lambda: Adam(eps=-1.0), "eps=-1.0"),
        (lambda: Mix(SGD(), 1.5), r"keep=1.5\n.*in \[0, 1\]\n.*0.5 is the paper's value"),
    ],
)
def test_refusals(make, text):
    with pytest.raises(ConfigError, match=text):
        make()
