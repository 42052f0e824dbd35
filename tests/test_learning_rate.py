"""What waits in an error memory, and a learning rate that changes meanwhile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import thinwire
from small import adamw, make_model, same, sgd, train
from thinwire.codecs import dgc, ef21, feedback, fp32, int8, topk
from thinwire.links.local import run
from thinwire.methods import diloco, every_step
from thinwire.payloads import GradientStep

DIM, CHANGE, STEPS = 16, 4, 8
RATES = [0.5] * CHANGE + [0.05] * (STEPS - CHANGE)


def given(step: int, rank: int) -> Tensor:
    """A gradient that does not depend on the model, [DIM]."""
    return torch.randn(DIM, generator=torch.Generator().manual_seed(10 * step + rank))


def owed(method, rates: list[float], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two members over `count` steps: the model, the mean of what waits, and where SGD without loss stands.  [DIM]"""

    def member(link):
        model = nn.Linear(DIM, 1, bias=False)
        nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=rates[0])
        with thinwire.synchronize(model, optimizer, method, link) as sync:
            for step in range(count):
                optimizer.param_groups[0]["lr"] = rates[step]
                model.weight.grad = given(step, link.rank).view(1, -1)
                optimizer.step()
            carried = sync.state_dict()["fragments"][0]["carried"]
        return model.weight.detach().view(-1).clone(), carried["own"]["residual"]

    (model, first), (_, second) = run(2, member)
    exact = -sum((rates[step] * (given(step, 0) + given(step, 1)) / 2 for step in range(count)), torch.zeros(DIM))
    return model, (first + second) / 2, exact


@pytest.mark.parametrize("count", range(1, STEPS + 1))
def test_model_and_what_waits_are_sgd_across_a_change_of_the_learning_rate(count):
    """x - e is where SGD stands, at every step. Tolerance: float32 sums of eight steps, and a product and quotient."""
    model, waits, exact = owed(every_step(codec=feedback(topk(1 / 8))).but(payload=GradientStep()), RATES, count)
    assert torch.allclose(model - waits, exact, atol=2e-6)
    assert waits.abs().max() > 0.05


def test_what_waits_as_gradient_is_worth_a_tenth_after_the_change():
    """Gradient() remembers gradients: x - lr e is SGD until the rate falls, and is off by 0.9 of what waited then."""
    method = every_step(codec=feedback(topk(1 / 8)))
    model, waits, exact = owed(method, RATES, CHANGE)
    assert torch.allclose(model - RATES[0] * waits, exact, atol=2e-6)
    _, before, _ = owed(method, RATES, CHANGE)
    model, waits, exact = owed(method, RATES, CHANGE + 1)
    jump = (RATES[0] - RATES[CHANGE]) * before
    assert torch.allclose(model - RATES[CHANGE] * waits - exact, jump, atol=2e-6)
    assert jump.abs().max() > 0.05


def test_deltas_are_steps_already():
    """The same identity for pseudo-gradients, whatever the learning rate does."""
    model, waits, exact = owed(
        diloco(every=1, outer_lr=1.0, momentum=0.0, codec=feedback(topk(1 / 8))), RATES, STEPS
    )  # fmt: skip
    assert torch.allclose(model - waits, exact, atol=2e-6)


@pytest.mark.parametrize("codec", [fp32, feedback(topk(1 / 4)), feedback(int8), dgc(topk(1 / 4)), ef21(topk(1 / 4))])
def test_a_constant_rate_changes_nothing(codec):
    """To the bit, for a power of two: products by it do not round."""

    def with_rate(model):
        return torch.optim.SGD(model.parameters(), lr=0.125)

    method = every_step(codec=codec)
    plain, steps = (
        run(3, lambda link, m=m: train(link, m, 6, make_optimizer=with_rate))
        for m in (method, method.but(payload=GradientStep()))
    )
    assert all(same(a.live, b.live) for a, b in zip(plain, steps, strict=True))


def test_groups_have_rates_of_their_own():
    """Lossless: as without. Tolerance: a product and a quotient a step; the momentum's seven steps."""

    def groups(model):
        weights = [p for p in model.parameters() if p.ndim > 1]
        rest = [p for p in model.parameters() if p.ndim < 2]
        return torch.optim.SGD([{"params": weights, "lr": 0.3}, {"params": rest[1:], "lr": 0.07}], lr=1.0, momentum=0.5)

    plain, steps = (
        run(2, lambda link, m=m: train(link, m, 7, make_optimizer=groups))
        for m in (every_step(), every_step().but(payload=GradientStep()))
    )
    assert same(plain[0].live[1:2], [make_model()[0].bias]), "the optimizer does not have it"
    for a, b in zip(plain[0].live, steps[0].live, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert not same(plain[0].live, steps[0].live)


def test_a_rate_of_zero_moves_nothing_and_breaks_nothing():
    def member(link, rate):
        model = make_model()
        optimizer = sgd(model)
        optimizer.param_groups[0]["lr"] = rate
        method = every_step(codec=topk(1 / 4)).but(payload=GradientStep())
        with thinwire.synchronize(model, optimizer, method, link):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()], max(
            float(p.grad.abs().max()) for p in model.parameters()
        )

    for live, gradient in run(2, lambda link: member(link, 0.0)):
        assert same(live, [p.detach() for p in make_model().parameters()])
        assert gradient == 0
    assert not same(run(2, lambda link: member(link, 0.1))[0][0], [p.detach() for p in make_model().parameters()])


def test_it_is_an_answer_and_members_agree():
    method = every_step(codec=topk(1 / 4)).but(payload=GradientStep())
    assert method.answers()["payload"] == "GradientStep()"
    results = run(3, lambda link: train(link, method, 5, make_optimizer=adamw))
    assert all(same(results[0].live, other.live) for other in results)
