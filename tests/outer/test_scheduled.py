"""Outer learning rates over rounds, and inner optimizers that begin anew."""

from __future__ import annotations

import pytest
import torch

import thinwire
from small import adamw, local_steps, make_model, same, train
from thinwire import ConfigError, diloco
from thinwire.links.local import run
from thinwire.outer import SGD, Average, Eager, Mine, Nesterov, Now, Restart, Scheduled


def test_the_scale_by_hand():
    outer = Scheduled(SGD(1.0), warmup=3, decay=4, shape="linear", floor=0.2)
    expected = [0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2]
    assert [outer.scale(r) for r in range(9)] == pytest.approx(expected, abs=1e-6)
    cosine = Scheduled(SGD(1.0), decay=4, floor=0.2)
    assert [cosine.scale(r) for r in (0, 2, 4, 99)] == pytest.approx([1.0, 0.6, 0.2, 0.2], abs=1e-6)
    assert cosine.scale(1) > Scheduled(SGD(1.0), decay=4, floor=0.2, shape="linear").scale(1)
    assert [Scheduled(SGD(1.0), warmup=1).scale(r) for r in range(3)] == [0.5, 1.0, 1.0]


def test_it_scales_the_step_inside_and_schedules_multiply():
    outer = Scheduled(Scheduled(SGD(1.0), warmup=1), warmup=3)
    moved = [outer.step(torch.zeros(1), torch.ones(1), {}, Now(r))[0].item() for r in range(4)]
    assert moved == [-0.5 * 0.25, -0.5, -0.75, -1.0]


def test_it_scales_what_is_taken_in_advance_too():
    inside, around = Eager(Scheduled(SGD(1.0), warmup=3)), Scheduled(Eager(SGD(1.0)), warmup=3)
    mine = Mine(torch.zeros(1), torch.zeros(1), fresh=torch.ones(1), members=2)
    assert inside.merge(mine, torch.zeros(1), {}, Now(1))[0].item() == -0.25
    assert around.merge(mine, torch.zeros(1), {}, Now(1))[0].item() == -0.25


def test_nothing_to_do_changes_nothing_and_rounds_are_counted_as_they_take_effect():
    def trained(outer):
        return run(2, lambda link: train(link, diloco(every=2).but(outer=outer), 8))[0].live

    assert same(trained(Scheduled(Nesterov())), trained(Nesterov()))
    assert not same(trained(Scheduled(Nesterov(), warmup=2)), trained(Nesterov()))
    assert not same(trained(Scheduled(Nesterov(), decay=2)), trained(Nesterov()))
    halved = Scheduled(SGD(1.0), decay=1, floor=0.5)
    first = run(2, lambda link: train(link, diloco(every=2).but(outer=halved), 2))[0].live
    assert same(first, run(2, lambda link: train(link, diloco(every=2).but(outer=SGD(1.0)), 2))[0].live), "round 0"
    assert not same(trained(halved), trained(SGD(1.0)))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"warmup": -1}, "outer warmup=-1\n.*a number of rounds\n.*warmup=0 for none"),
        ({"decay": -2}, "outer decay=-2"),
        ({"floor": 0.0}, r"outer floor=0.0\n.*\(0, 1\].*lost\n.*floor=0.1"),
        ({"shape": "square"}, "outer shape='square'\n.*cosine or linear"),
        ({"outer": Average()}, r"Average\(\) with a learning rate over rounds.*\n.*deltas\n.*Scheduled\(SGD"),
    ],
)
def test_refusals(options, text):
    with pytest.raises(ConfigError, match=text):
        Scheduled(**{"outer": SGD(), **options})


def test_inner_optimizers_begin_anew_after_each_round_if_told_to():
    def member(link, outer):
        model = make_model()
        optimizer = adamw(model)
        counts = []
        with thinwire.synchronize(model, optimizer, diloco(every=3).but(outer=outer), link):
            for number in range(7):
                local_steps(model, optimizer, link.rank, range(number, number + 1))
                counts.append(max((int(state["step"]) for state in optimizer.state.values()), default=0))
        return counts, [p.detach() for p in model.parameters()]

    fresh, kept = (run(2, lambda link, outer=outer: member(link, outer)) for outer in (Restart(SGD()), SGD()))
    assert [counts for counts, _ in fresh] == [[1, 2, 0, 1, 2, 0, 1]] * 2
    assert [counts for counts, _ in kept] == [[1, 2, 3, 4, 5, 6, 7]] * 2
    assert not same(fresh[0][1], kept[0][1])


def test_only_the_fragment_of_the_round_begins_anew():
    method = thinwire.streaming_diloco(every=4, fragments=2, overlap=0)

    def member(link):
        model = make_model()
        optimizer = adamw(model)
        with thinwire.synchronize(model, optimizer, method.but(outer=Restart(method.outer)), link):
            local_steps(model, optimizer, link.rank, range(2))
            return len(optimizer.state), len(list(model.parameters()))

    left, of = run(2, member)[0]
    assert 0 < left < of
