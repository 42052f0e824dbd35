"""Outer steps by groups of parameters."""

from __future__ import annotations

import pytest
import torch

import thinwire
from small import make_model, same, sgd, train
from thinwire import ConfigError, diloco, eager
from thinwire.links.local import alone, run
from thinwire.method import Method
from thinwire.outer import SGD, Adam, Average, Eager, Mix, Nesterov, Now, Scheduled, per_group
from thinwire.payloads import Delta
from thinwire.schedules import Every

NAMES, SIZES = ("a.weight", "a.bias", "b.weight", "b.bias"), (6, 2, 3, 1)


def test_each_group_takes_its_own_step():
    outer = per_group(("*.bias", SGD(0.5)), ("b.*", Adam(0.1)), rest=Nesterov(0.7, 0.9)).fit(NAMES, SIZES)
    generator = torch.Generator().manual_seed(0)
    anchor, memory = torch.randn(12, generator=generator), {}
    parts = {
        "bias": (torch.tensor([6, 7, 11]), SGD(0.5)),
        "b": (torch.tensor([8, 9, 10]), Adam(0.1)),
        "a": (torch.arange(6), Nesterov(0.7, 0.9)),
    }
    alone_ = {name: (anchor[index], {}) for name, (index, _) in parts.items()}
    for number in range(4):
        update = torch.randn(12, generator=generator)
        given = anchor.clone()
        moved, memory = outer.step(anchor, update, memory, Now(number))
        assert torch.equal(anchor, given), "nothing given is changed"
        anchor = moved
        for name, (index, step) in parts.items():
            part, held = alone_[name]
            alone_[name] = step.step(part, update[index], held, Now(number))
            assert torch.equal(anchor[index], alone_[name][0]), name


def test_one_step_for_all_groups_is_that_step_to_the_bit():
    same_for_all = per_group(("*.weight", Nesterov(0.7, 0.9)), rest=Nesterov(0.7, 0.9))
    a = run(3, lambda link: train(link, diloco(every=3).but(outer=same_for_all), 9))
    b = run(3, lambda link: train(link, diloco(every=3), 9))
    assert all(same(x.live, y.live) for x, y in zip(a, b, strict=True))


def test_it_follows_parameters_into_fragments():
    """Two fragments hold other parameters at other places: the same steps as in one."""
    outer = per_group(("*.bias", SGD(0.3)), ("4.*", SGD(0.6, 0.5)), rest=SGD(1.0))

    def trained(fragments):
        method = Method(schedule=Every(2), payload=Delta(fragments), outer=outer)

        def member(link):
            model = make_model()
            optimizer = sgd(model)
            with thinwire.synchronize(model, optimizer, method, link):
                for number in range(4):
                    for index, p in enumerate(model.parameters()):
                        p.grad = torch.full_like(p, 0.25 * (index + 1 + link.rank) * (number < 1))
                    optimizer.step()
            return [p.detach().clone() for p in model.parameters()]

        return run(2, member)[0]

    one, plain = trained(1), train(alone(), diloco(every=2), 1).live
    moved = [float((p - q).abs().max()) for p, q in zip(one, plain, strict=True)]
    assert len({round(m, 6) for m in moved}) > 2
    for p, q in zip(one, trained(2), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_eager_and_schedules_go_around_groups():
    groups = per_group(("*.bias", SGD(0.4)), rest=Nesterov(0.4, 0.9))
    method = eager(every=2).but(outer=Eager(Scheduled(groups, warmup=2)))
    results = run(3, lambda link: train(link, method, 8))
    assert same(results[0].consensus, results[2].consensus)
    assert not same(results[0].consensus, run(3, lambda link: train(link, eager(every=2), 8))[0].consensus)


def test_a_pattern_that_no_name_matches_is_refused_for_that_model():
    method = diloco(every=2).but(outer=Scheduled(per_group(("*.bais", SGD(0.4)), rest=SGD()), warmup=1))
    model = make_model()
    text = r"outer step for '\*.bais': no parameter is called so\n.*such as '0.weight'\n.*named_parameters"
    with pytest.raises(ConfigError, match=text):
        thinwire.synchronize(model, sgd(model), method, alone())


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: per_group(rest=SGD()), r"no groups of parameters\n.*a pattern of names.*\n.*or the step alone"),
        (lambda: per_group(("*", Average()), rest=SGD()), r"Average\(\) for a group of parameters\n.*deltas"),
        (lambda: per_group(("*", Mix(SGD(), 0.5)), rest=SGD()), r"Mix\(.*for a group.*\n.*\n.*around the groups"),
        (lambda: per_group(("*", SGD()), rest=Eager(SGD())), r"Eager\(.*for a group"),
    ],
)
def test_refusals(make, text):
    with pytest.raises(ConfigError, match=text):
        make()
