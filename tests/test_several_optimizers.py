"""Several optimizers around one model: Muon takes matrices only, so another one takes the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thinwire
from small import batch, loss_of, make_model, same, train
from thinwire import ConfigError, diloco, every_step, streaming_diloco
from thinwire.codecs import dgc, int8, topk
from thinwire.links.local import alone, run
from thinwire.method import Method
from thinwire.outer import NoStep
from thinwire.payloads import GradientStep
from thinwire.rounds import Committed, Skipped

METHODS = {
    "gradients": every_step(),
    "gradients, feedback": every_step(codec=topk(1 / 4)),
    "deltas": diloco(every=2),
    "in flight": streaming_diloco(every=4, fragments=2, overlap=3, codec=int8),
}


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.ndim == 2]


def rest(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.ndim != 2]


def muon_and_adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.Muon(matrices(model), lr=0.02), torch.optim.AdamW(rest(model), lr=1e-2)]


def two_sgd(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(matrices(model), lr=0.1), torch.optim.SGD(rest(model), lr=0.1)]


def one_sgd(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(model.parameters(), lr=0.1)]


def loop(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], rank: int, numbers: range, *, backwards: bool = False
) -> None:
    for number in numbers:
        loss_of(model, *batch(number, rank)).backward()
        for optimizer in reversed(optimizers) if backwards else optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()


def trained(
    link: Any, method: Any, make: Callable[[nn.Module], list[torch.optim.Optimizer]], count: int = 5, **how: Any
) -> tuple[list[Tensor], list[Any]]:
    model = make_model()
    optimizers, outcomes = make(model), []
    with thinwire.synchronize(model, optimizers, method, link, observer=outcomes.append) as sync:
        loop(model, optimizers, link.rank, range(count), **how)
        assert sync.step == count
        sync.finish()
    return [p.detach().clone() for p in model.parameters()], outcomes


@pytest.mark.parametrize("name", METHODS)
def test_two_optimizers_that_do_what_one_does_give_its_bits(name):
    """And a list of one is that one."""
    plain = run(3, lambda link: train(link, METHODS[name], 5, make_optimizer=lambda model: one_sgd(model)[0]))
    for make in (one_sgd, two_sgd):
        for (live, outcomes), expected in zip(
            run(3, lambda link, make=make: trained(link, METHODS[name], make)), plain, strict=True
        ):
            assert same(live, expected.live)
            assert outcomes == expected.outcomes


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_their_steps_does_not_matter(name):
    forwards = run(2, lambda link: trained(link, METHODS[name], muon_and_adamw))
    backwards = run(2, lambda link: trained(link, METHODS[name], muon_and_adamw, backwards=True))
    assert same(forwards[0][0], backwards[0][0])
    assert not same(forwards[0][0], [p.detach() for p in make_model().parameters()])


def test_gradients_are_combined_once_before_the_first_step():
    """Both optimizers see the mean gradient: the run is that of one member on the mean."""

    def member(link):
        model = make_model()
        optimizers = two_sgd(model)
        seen = []
        for optimizer in optimizers:
            optimizer.register_step_post_hook(
                lambda optimizer, *_: seen.extend(p.grad.clone() for p in optimizer.param_groups[0]["params"])
            )
        with thinwire.synchronize(model, optimizers, every_step(), link):
            loop(model, optimizers, link.rank, range(1))
        return seen, link.meter.by_purpose()["rounds"].sent_bytes

    (one, sent), (other, _) = run(2, member)
    assert same(one, other)
    plain = run(2, lambda link: train(link, every_step(), 1))[0].sent_bytes
    assert sent <= plain, "one exchange a step, as with one optimizer"


def test_one_member_alone_with_both_is_the_plain_loop():
    model = make_model()
    loop(model, muon_and_adamw(model), 0, range(4))
    assert same(trained(alone(), every_step(), muon_and_adamw, 4)[0], [p.detach() for p in model.parameters()])


# --- loops that do not step all ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gradients", "deltas"])
def test_a_loop_that_steps_only_one_of_them_is_told_before_anything_is_changed(name):
    def member(link):
        model = make_model()
        muon, adamw = muon_and_adamw(model)
        with thinwire.synchronize(model, [muon, adamw], METHODS[name], link):
            loss_of(model, *batch(0, link.rank)).backward()
            muon.step()
            before = [p.detach().clone() for p in model.parameters()]
            text = r"local step 1: Muon is to step twice, and AdamW has not stepped\n.*one step of every.*\n.*step all"
            with pytest.raises(ConfigError, match=text):
                muon.step()
            assert same(before, [p.detach() for p in model.parameters()])
            adamw.step()

    run(2, member)


@pytest.mark.parametrize("name", ["gradients", "deltas"])
def test_an_end_or_a_state_in_the_middle_of_a_local_step_is_refused(name):
    def half_a_step(link):
        model = make_model()
        muon, adamw = muon_and_adamw(model)
        with thinwire.synchronize(model, [muon, adamw], METHODS[name], link) as sync:
            loss_of(model, *batch(0, link.rank)).backward()
            muon.step()
            with pytest.raises(ConfigError, match="in the middle of a local step, and AdamW has not stepped"):
                sync.state_dict()

    def member(link):
        text = r"local step 1: training ended, or its state was asked for, in the middle .*AdamW has not stepped"
        with pytest.raises(ConfigError, match=text):
            half_a_step(link)

    run(2, member)


def test_what_is_handed_over_is_checked():
    model = make_model()

    def refused(optimizers, text):
        with pytest.raises(ConfigError, match=text):
            thinwire.synchronize(model, optimizers, diloco(), alone())

    refused([], r"no optimizer was handed over\n.*disjoint.*\n.*\[muon, adamw\]")
    both = [torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.AdamW(rest(model), lr=0.1)]
    refused(both, r"3 parameter\(s\) of more than one of SGD, AdamW\n.*disjoint.*\n.*give each")
    refused([both[0], torch.optim.SGD(make_model().parameters(), lr=0.1)], r"holds 6 parameter\(s\) that the model")
    with pytest.raises(ConfigError, match="Muon with momentum behind dgc"):
        thinwire.synchronize(model, muon_and_adamw(model), every_step(codec=dgc(topk(0.5))), alone())


def test_settings_of_all_are_compared():
    def member(link):
        model = make_model()
        optimizers = [torch.optim.SGD(matrices(model), lr=0.1), torch.optim.SGD(rest(model), lr=0.1 * (1 + link.rank))]
        with (
            pytest.raises(ConfigError, match="members disagree on optimizer"),
            thinwire.synchronize(model, optimizers, every_step(), link),
        ):
            pass

    run(2, member)


# --- what reaches into optimizers ----------------------------------------------------------------------------------


def test_learning_rates_are_those_of_the_optimizer_that_holds_the_parameter():
    """Sent in units of steps: with rates of 2 and 1/2 the combined gradient is the mean all the same, exactly."""
    method = Method(payload=GradientStep(), outer=NoStep())

    def member(link):
        model = make_model()
        optimizers = [torch.optim.SGD(matrices(model), lr=2.0), torch.optim.SGD(rest(model), lr=0.5)]
        with thinwire.synchronize(model, optimizers, method, link) as sync:
            rates = sync._rates(0)
            loss_of(model, *batch(0, link.rank)).backward()
            sync.combine_gradients()
            mean = [p.grad.clone() for p in model.parameters()]
            for optimizer in optimizers:
                optimizer.step()
        return rates, mean

    rates, mean = run(2, member)[0]
    expected = [torch.full((p.numel(),), 2.0 if p.ndim == 2 else 0.5) for p in make_model().parameters()]
    assert torch.equal(rates, torch.cat(expected))
    gradients = []
    for rank in range(2):
        model = make_model()
        loss_of(model, *batch(0, rank)).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert same(mean, [(a + b) / 2 for a, b in zip(*gradients, strict=True)]), "rates are powers of two"


def test_a_member_left_out_begins_with_a_fresh_state_in_all_of_them():
    def member(link):
        model = make_model()
        optimizers = muon_and_adamw(model)
        with thinwire.synchronize(model, optimizers, diloco(every=2), link):
            loop(model, optimizers, link.rank, range(1))
            if link.rank:
                with torch.no_grad():
                    next(model.parameters()).view(-1)[0] = math.nan
            loop(model, optimizers, link.rank, range(1, 2))
        return [len(optimizer.state) for optimizer in optimizers]

    assert run(2, member) == [[3, 3], [0, 0]]


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("name", ["gradients", "deltas"])
def test_a_scaler_scales_for_all_and_members_skip_together(name, clip):
    """One member overflows in a bias, which is the second optimizer's; then all do."""

    def member(link):
        model = make_model()
        optimizers, outcomes = two_sgd(model), []
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
        with thinwire.synchronize(
            model, optimizers, METHODS[name], link, scaler=scaler, observer=outcomes.append
        ) as sync:
            for number in range(4):
                scaler.scale(loss_of(model, *batch(number, link.rank))).backward()
                if (number == 1 and link.rank == 1) or number == 2:
                    model[0].bias.grad[0] = math.inf
                if clip:
                    sync.clip_grad_norm_(0.3)
                before = [p.detach().clone() for p in model.parameters()]
                for optimizer in optimizers:
                    scaler.step(optimizer)
                if name == "gradients":
                    unchanged = same(before, [p.detach() for p in model.parameters()])
                    assert unchanged == (number == 2), "all have overflown: nobody steps, neither optimizer"
                scaler.update()
                for optimizer in optimizers:
                    optimizer.zero_grad()
            assert sync.step == 4
        return [p.detach().clone() for p in model.parameters()], outcomes, scaler.get_scale()

    results = run(2, member)
    assert same(results[0][0], results[1][0])
    if name == "gradients":
        assert [type(outcome) for outcome in results[0][1]] == [Committed, Committed, Skipped, Committed]
        assert [outcome.ranks for outcome in results[0][1] if isinstance(outcome, Committed)] == [(0, 1), (0,), (0, 1)]
    assert [scale for _, _, scale in results] == [2.0**9, 2.0**8]


def test_a_scaler_without_overflow_changes_nothing():
    def scaled(link):
        model = make_model()
        optimizers = two_sgd(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        with thinwire.synchronize(model, optimizers, every_step(), link, scaler=scaler):
            for number in range(3):
                scaler.scale(loss_of(model, *batch(number, link.rank))).backward()
                for optimizer in optimizers:
                    scaler.step(optimizer)
                scaler.update()
                for optimizer in optimizers:
                    optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()]

    assert same(run(2, scaled)[1], run(2, lambda link: trained(link, every_step(), two_sgd, 3))[1][0])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(name, stop):
    def in_two(link):
        model = make_model()
        optimizers = muon_and_adamw(model)
        with thinwire.synchronize(model, optimizers, METHODS[name], link) as sync:
            loop(model, optimizers, link.rank, range(stop))
            saved = sync.state_dict(), [each.state_dict() for each in optimizers], model.state_dict()
            saved = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, saved)
        model = make_model()
        optimizers = muon_and_adamw(model)
        with thinwire.synchronize(model, optimizers, METHODS[name], link) as sync:
            model.load_state_dict(saved[2])
            for optimizer, state in zip(optimizers, saved[1], strict=True):
                optimizer.load_state_dict(state)
            sync.load_state_dict(saved[0])
            loop(model, optimizers, link.rank, range(stop, 6))
            sync.finish()
        return [p.detach().clone() for p in model.parameters()]

    whole = run(2, lambda link: trained(link, METHODS[name], muon_and_adamw, 6))
    assert same(run(2, in_two)[1], whole[1][0])
