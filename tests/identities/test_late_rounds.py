"""Methods whose rounds take all of the time to the next one, against recursions by hand and against each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_methods import _dyadic_training
from torch import nn

import thinwire
from small import adamw, local_steps, make_model, same, train
from thinwire import co2, delayed, diloco, eager, local_sgd, slowmo
from thinwire.codecs import ErrorFeedback, int4, topk
from thinwire.links.local import run
from thinwire.method import Method
from thinwire.outer import SGD, ClippedMomentum, Eager, Nesterov
from thinwire.schedules import Every

H = 4


class Scalar(nn.Module):
    """One parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([8.0]))


def follow(method: Method, members: int, steps: int) -> list[tuple[list[float], float]]:
    """Members pull a scalar towards their rank; parameters after each step, and the anchor after finish()."""

    def member(link: Any) -> tuple[list[float], float]:
        model = Scalar()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
        seen = []
        with thinwire.synchronize(model, optimizer, method, link) as sync:
            for _ in range(steps):
                (0.5 * (model.weight - link.rank) ** 2).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                seen.append(model.weight.item())
            sync.finish()
            assert model.weight.item() == pytest.approx(sync.consensus()[0].item(), abs=1e-6)
            return seen, sync.consensus()[0].item()

    return run(members, member)


def eager_by_hand(members: int, rounds: int, lr: float, mu: float) -> tuple[list[list[float]], float]:
    """The papers' form in Python's floats; where phases begin, and all members' anchor after the last round."""
    a, b = [8.0] * members, [0.0] * members
    old = [0.0] * members
    common, velocity = 8.0, 0.0
    begins = []
    for _ in range(rounds):
        new = []
        for rank in range(members):
            live = a[rank]
            for _ in range(H):
                live = 0.75 * live + 0.25 * rank
            new.append(a[rank] - live)
        mean = sum(old) / members
        velocity = mu * velocity + mean
        common -= lr * (mean + mu * velocity)
        for rank in range(members):
            d = (new[rank] + sum(old) - old[rank]) / members
            b[rank] = mu * b[rank] + d
            a[rank] -= lr * (d + mu * b[rank])
        old = new
        begins.append(list(a))
    mean = sum(old) / members
    velocity = mu * velocity + mean
    return begins, common - lr * (mean + mu * velocity)


@pytest.mark.parametrize("members", [1, 2, 4])
@pytest.mark.parametrize(("lr", "mu"), [(0.7, 0.0), (0.4, 0.9)])
def test_eager_is_the_papers_form_by_hand(members, lr, mu):
    """Tolerance: float32 over six rounds of a scalar of size 8."""
    results = follow(eager(every=H, outer_lr=lr, momentum=mu), members, 6 * H)
    begins, last = eager_by_hand(members, 6, lr, mu)
    for rank, (seen, anchor) in enumerate(results):
        for number, begin in enumerate(begins):
            assert seen[(number + 1) * H - 1] == pytest.approx(begin[rank], abs=2e-5)
        assert anchor == pytest.approx(last, abs=2e-5)
    assert len({anchor for _, anchor in results}) == 1


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_one_eager_member_is_diloco_to_the_bit_at_every_step(momentum):
    def every_step_of(method: Method) -> list[list[torch.Tensor]]:
        def member(link: Any) -> list[list[torch.Tensor]]:
            model = make_model()
            optimizer = adamw(model)
            seen = []
            with thinwire.synchronize(model, optimizer, method, link):
                for number in range(10):
                    local_steps(model, optimizer, 0, range(number, number + 1))
                    seen.append([p.detach().clone() for p in model.parameters()])
            return [*seen, [p.detach().clone() for p in model.parameters()]]

        return run(1, member)[0]

    ours = every_step_of(eager(every=3, outer_lr=0.7, momentum=momentum))
    plain = every_step_of(diloco(every=3, outer_lr=0.7, momentum=momentum))
    assert all(same(a, b) for a, b in zip(ours[:-1], plain[:-1], strict=True))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours[-1], plain[-1], strict=True)), "finish in mid-phase"


def test_after_finish_eager_members_hold_one_model():
    results = run(3, lambda link: train(link, eager(every=3), 9))
    assert all(same(results[0].live, other.live) for other in results)
    apart = run(3, lambda link: train(link, eager(every=3), 10, finish=False))
    assert not same(apart[0].live, apart[1].live)


@pytest.mark.parametrize("codec", [int4(), topk(1 / 8), ErrorFeedback(int4())], ids=lambda c: c.spec)
def test_what_a_codec_drops_does_not_drive_eager_members_apart(codec):
    """Over 40 rounds on a quadratic; what a member took in advance is given back whole."""

    def member(link: Any) -> list[torch.Tensor]:
        model = nn.Linear(64, 1, bias=False)
        nn.init.ones_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
        target = torch.randn(1, 64, generator=torch.Generator().manual_seed(link.rank))
        begins = []
        with thinwire.synchronize(model, optimizer, eager(every=2, codec=codec), link):
            for number in range(80):
                model.weight.grad = model.weight.detach() - target
                optimizer.step()
                if number % 2:
                    begins.append(model.weight.detach().clone())
        return begins

    a, b = run(2, member)
    spread = [float((x - y).norm()) for x, y in zip(a, b, strict=True)]
    assert max(spread[20:]) < 1.5 * max(spread[:20])


def test_eager_knows_more_than_delayed():
    a = run(2, lambda link: train(link, eager(every=3, outer_lr=0.7, momentum=0.0), 9))
    b = run(2, lambda link: train(link, delayed(every=3), 9))
    assert not same(a[0].live, b[0].live)


def test_co2_without_clip_and_penalty_is_delayed_heavy_ball_to_the_bit():
    plain = delayed(every=3, outer_lr=0.6).but(outer=SGD(0.6, 0.5))
    heavy = run(3, lambda link: train(link, plain, 10))
    ours = run(3, lambda link: train(link, co2(every=3, outer_lr=0.6, momentum=0.5, clip=None), 10))
    assert all(same(a.live, b.live) for a, b in zip(ours, heavy, strict=True))


@pytest.mark.parametrize("option", [{"clip": 1e-3}, {"penalty": 2.0}, {"penalty": "gap"}, {"momentum": 0.2}], ids=str)
def test_each_part_of_co2_changes_the_result(option):
    base = {"every": 3, "momentum": 0.5, "clip": None}
    a, b = (run(2, lambda link, o=o: train(link, co2(**o), 9))[0].live for o in (base, base | option))
    assert not same(a, b)


def test_co2_in_time_without_momentum_is_averaging_to_the_bit():
    method = co2(every=1, clip=None).but(schedule=Every(1))
    ours, plain = (run(4, lambda link, m=m: _dyadic_training(link, m)) for m in (method, local_sgd(every=1)))
    assert all(same(a, b) for a, b in zip(ours, plain, strict=True))


def test_slowmo_without_momentum_is_averaging_to_the_bit():
    ours, plain = (
        run(4, lambda link, m=m: _dyadic_training(link, m)) for m in (slowmo(every=1, momentum=0.0), local_sgd(every=1))
    )
    assert all(same(a, b) for a, b in zip(ours, plain, strict=True))
    other = run(4, lambda link: _dyadic_training(link, slowmo(every=1, momentum=0.5)))
    assert not same(other[0], plain[0])


def test_slowmo_every_step_around_plain_sgd_is_sgd_with_momentum():
    """Dyadic numbers: no float32 operation rounds, so that equal mathematics is equal bits."""
    ours = run(2, lambda link: _dyadic_training(link, slowmo(every=1, momentum=0.5)))[0]
    weight = (torch.arange(8).view(2, 4) / 8).requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=0.25, momentum=0.5)
    for step in range(4):
        slopes = [(torch.arange(8).view(2, 4) % (3 + step) - rank) / 4 for rank in range(2)]
        weight.grad = (slopes[0] + slopes[1]) / 2
        optimizer.step()
    assert torch.equal(ours[0], weight.detach())


def test_slowmo_takes_the_learning_rate_of_now():
    """A learning rate that is halved halves what momentum moves; the outer step of the same momentum does not."""

    def member(link: Any, method: Method) -> float:
        model = Scalar()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        with thinwire.synchronize(model, optimizer, method, link):
            for gradient in (1.0, 0.0):
                model.weight.grad = torch.tensor([gradient])
                optimizer.step()
                optimizer.param_groups[0]["lr"] /= 2
        return model.weight.item()

    assert run(2, lambda link: member(link, slowmo(every=1))) == [8 - 0.5 - 0.125] * 2
    assert run(2, lambda link: member(link, diloco(every=1).but(outer=SGD(1.0, 0.5)))) == [8 - 0.5 - 0.25] * 2


@pytest.mark.parametrize("outer", [Nesterov(0.4, 0.9), Eager(Nesterov(0.4, 0.9)), ClippedMomentum(0.5, 0.3)], ids=repr)
def test_fragments_are_whole_models_of_their_own(outer):
    """Two parameters in two fragments, each as if it were alone, shifted in time by the schedule."""
    whole = follow(Method(schedule=Every(H, H), payload=diloco().payload, outer=outer), 2, 5 * H)

    def member(link: Any) -> list[float]:
        model = nn.ModuleList([Scalar(), Scalar()])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
        method = Method(schedule=Every(H, H), payload=thinwire.streaming_diloco(fragments=2).payload, outer=outer)
        seen = []
        with thinwire.synchronize(model, optimizer, method, link):
            for _ in range(5 * H):
                sum((0.5 * (part.weight - link.rank) ** 2).sum() for part in model).backward()
                optimizer.step()
                optimizer.zero_grad()
                seen.append(model[1].weight.item())
        return seen

    for (alone, _), together in zip(whole, run(2, member), strict=True):
        assert together == alone, "the second fragment's rounds begin after steps H, 2H, ... as the whole model's do"
