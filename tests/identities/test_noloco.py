"""NoLoCo: its rule in one vector, what it is among all, and how far members stay apart."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

import thinwire
from small import batch, loss_of, make_model, sgd, train
from thinwire import ConfigError, diloco, noloco
from thinwire.links.base import Link
from thinwire.links.local import run
from thinwire.method import Method
from thinwire.outer import SGD, Average, Nesterov, NoStep, Towards
from thinwire.payloads import Parameters
from thinwire.schedules import Every
from thinwire.topologies import Everyone, RandomPairs


class Free(torch.nn.Module):
    """Parameters without a loss."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(values.clone())


def drift(link: Link, method: Method, rounds: int, n: int = 64) -> list[Tensor]:
    """Members that learn nothing, set apart once after the start; their anchors after every round."""
    model = Free(torch.zeros(n))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    seen = []
    with thinwire.synchronize(model, optimizer, method, link) as sync:
        for step in range(rounds):
            noise = torch.randn(n, generator=torch.Generator().manual_seed(link.rank))
            model.weight.grad = -noise if step == 0 else torch.zeros(n)
            optimizer.step()
            seen.append(sync._states[0].anchor.clone())
    return seen


def test_one_vector_gives_both_means():
    """v <- alpha v - beta mean D - gamma (a - mean a), written out in float64, beside what two members do."""
    alpha, beta, gamma = 0.5, 0.7, 0.4
    method = noloco(every=2, outer_lr=beta, momentum=alpha, pull=gamma)

    def member(link: Link) -> list[tuple[Tensor, Tensor]]:
        model = make_model()
        optimizer = sgd(model)
        seen = []
        with thinwire.synchronize(model, optimizer, method, link):
            for step in range(8):
                loss_of(model, *batch(step, link.rank)).backward()
                before = torch.cat([p.detach().flatten() for p in model.parameters()])
                grad = torch.cat([p.grad.flatten() for p in model.parameters()])
                optimizer.step()
                optimizer.zero_grad()
                after = torch.cat([p.detach().flatten() for p in model.parameters()])
                seen.append((before - 0.1 * grad, after))
        return seen

    a, b = run(2, member)
    start = torch.cat([p.detach().flatten() for p in make_model().parameters()]).double()
    anchors, v = [start.clone(), start.clone()], [torch.zeros_like(start), torch.zeros_like(start)]
    for number in range(4):
        theta = [each[2 * number + 1][0].double() for each in (a, b)]
        delta = sum(anchor - live for anchor, live in zip(anchors, theta, strict=True)) / 2
        middle = sum(anchors) / 2
        for rank in range(2):
            v[rank] = alpha * v[rank] - beta * delta - gamma * (anchors[rank] - middle)
        anchors = [anchor + step for anchor, step in zip(anchors, v, strict=True)]
        for rank, each in enumerate((a, b)):
            assert torch.allclose(each[2 * number + 1][1].double(), anchors[rank], atol=1e-5)


def test_among_all_members_it_is_diloco_with_heavy_ball():
    """theta - mean theta against mean (a - theta): the same sums in another order."""
    everyone = noloco(every=3, outer_lr=0.6, momentum=0.5, pull=0.6).but(topology=Everyone())
    reference = diloco(every=3).but(outer=SGD(0.6, 0.5))
    ours, theirs = (run(3, lambda link, m=m: train(link, m, 9)) for m in (everyone, reference))
    for a, b in zip(ours, theirs, strict=True):
        assert all(torch.allclose(x, y, atol=2e-5) for x, y in zip(a.live, b.live, strict=True))


def test_towards_any_outer_step_is_that_step_on_deltas():
    towards = Method(schedule=Every(3), payload=Parameters(), outer=Towards(Nesterov(0.7, 0.9)))
    ours, theirs = (run(2, lambda link, m=m: train(link, m, 9)) for m in (towards, diloco(every=3)))
    for a, b in zip(ours, theirs, strict=True):
        assert all(torch.allclose(x, y, atol=2e-5) for x, y in zip(a.live, b.live, strict=True))
    plain = Method(schedule=Every(3), payload=Parameters(), outer=Towards(SGD(1.0)))
    average = Method(schedule=Every(3), payload=Parameters(), outer=Average())
    ours, theirs = (run(2, lambda link, m=m: train(link, m, 9)) for m in (plain, average))
    for a, b in zip(ours, theirs, strict=True):
        assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a.live, b.live, strict=True))


def spread(rows: list[Tensor]) -> float:
    stacked = torch.stack(rows).double()
    return float((stacked - stacked.mean(dim=0)).square().sum())


def factor(gamma: float, alpha: float, members: int) -> float:
    """The disagreement's mean factor a round: second moments of (a, v) under random pairs, by their matrix."""
    # 1 - P takes half of the partner's distance out of both; it is symmetric and idempotent. A partner is any other
    # member alike, so on what sums to zero its mean is q times the identity, and products of it with itself are it.
    q = members / (2 * (members - 1))
    moments = torch.tensor(
        [  # of xx, xv, vv
            [1 - 2 * gamma * q + gamma**2 * q, 2 * (alpha - alpha * gamma * q), alpha**2],
            [-gamma * q + gamma**2 * q, alpha - 2 * alpha * gamma * q, alpha**2],
            [gamma**2 * q, -2 * alpha * gamma * q, alpha**2],
        ],
        dtype=torch.float64,
    )
    return float(torch.linalg.eigvals(moments).abs().max())


@pytest.mark.parametrize(("gamma", "alpha"), [(0.7, 0.5), (0.3, 0.5), (1.0, 0.2)])
def test_disagreement_dies_out_as_its_second_moments_say(gamma: float, alpha: float):
    """Eight members, 40 rounds, 64 coordinates: the mean factor within what 64 draws of one matching sequence allow."""
    method = noloco(every=1, outer_lr=gamma, momentum=alpha, pull=gamma)
    results = run(8, lambda link: drift(link, method, 41))
    first, last = (spread([each[at] for each in results]) for at in (1, 40))
    predicted = factor(gamma, alpha, 8) ** 39
    assert last / first < 1e2 * predicted
    assert last / first > 1e-5 * predicted, "a sequence of matchings may do better than the mean"


def test_above_the_bound_they_move_apart():
    method = noloco(every=1, momentum=0.5).but(outer=Towards(SGD(2.0, 0.5)))
    results = run(8, lambda link: drift(link, method, 41))
    assert spread([each[40] for each in results]) > 10 * spread([each[1] for each in results])
    assert factor(2.0, 0.5, 8) > 1 > factor(0.7, 0.5, 8)


def test_the_spread_stays_bounded_while_members_learn():
    def member(link: Link) -> list[float]:
        model = make_model()
        optimizer = sgd(model)
        seen = []
        with thinwire.synchronize(model, optimizer, noloco(every=2), link) as sync:
            for step in range(60):
                loss_of(model, *batch(step, link.rank)).backward()
                optimizer.step()
                optimizer.zero_grad()
                if step % 10 == 9:
                    seen.append(sync.spread())
        return seen

    seen = run(4, member)[0]
    assert max(seen[3:]) < 2 * max(seen[:3])
    assert max(seen) < 0.2


def test_nobody_meets_more_than_one():
    sent = run(6, lambda link: (train(link, noloco(every=2), 4), link.meter.by_purpose()["rounds"].messages_sent)[1])
    assert sent == [4] * 6, "a vector and a verdict a round"


def test_refusals():
    with pytest.raises(ConfigError, match=r"pull=0.7 and momentum=0.9: .* apart.*\n.*0.38, which is 2.*\n.*pull=0.19"):
        noloco(momentum=0.9)
    with pytest.raises(ConfigError, match=r"pull=0\.0 and"):
        noloco(pull=0.0)
    told = re.escape("NoStep() towards parameters: it is made for gradient")
    with pytest.raises(ConfigError, match=told):
        Towards(NoStep())
    with pytest.raises(ConfigError, match="parameters stretched by 0"):
        Parameters(stretch=0.0)
    assert noloco().topology == RandomPairs()
