"""The synchronizer around anybody's loop, and under faults."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thinwire
from small import CLASSES, WIDTH, adamw, batch, loss_of, make_model, same, sgd, train
from small import local_steps as steps
from thinwire import (
    ConfigError,
    DivergedError,
    LinkError,
    PacketError,
    PeerLost,
    StateMismatch,
    diloco,
    every_step,
    fedavg,
    local_sgd,
    streaming_diloco,
)
from thinwire.aggregators import Median, WeightedMean
from thinwire.codecs import econtrol, ef21, ef21_sgdm, int4, int8, topk
from thinwire.links.faulty import Tampered, flip
from thinwire.links.local import alone, run
from thinwire.method import Method, Phases
from thinwire.outer import SGD, Average, Mix, Nesterov, Rebase
from thinwire.packet import Kind, read
from thinwire.payloads import Delta, Parameters
from thinwire.rounds import Committed, Skipped
from thinwire.schedules import Every
from thinwire.topologies import Islands, RandomPairs


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def everybody_alike(results: list[list[Tensor]]) -> bool:
    return all(same(results[0], other) for other in results)


def poison(model: nn.Module) -> None:
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = math.nan


# --- anybody's loop -------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "nadam": lambda p: torch.optim.NAdam(p),
    "radam": lambda p: torch.optim.RAdam(p),
    "adamax": lambda p: torch.optim.Adamax(p),
    "asgd": lambda p: torch.optim.ASGD(p),
    "rprop": lambda p: torch.optim.Rprop(p),
}
WAYS = {"gradients": every_step(), "deltas": diloco(every=2)}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("way", WAYS)
def test_any_optimizer_ends_alike_on_all_members_and_trains(name, way):
    def member(link):
        return train(link, WAYS[way], 4, make_optimizer=lambda model: OPTIMIZERS[name](model.parameters()))

    results = run(2, member)
    assert everybody_alike([result.live for result in results])
    assert not same(results[0].live, weights(make_model()))
    assert len(results[0].outcomes) == {"gradients": 4, "deltas": 2}[way]


def test_a_closure_works_for_deltas():
    def member(link):
        model = make_model()
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
        with thinwire.synchronize(model, optimizer, diloco(every=2), link) as sync:
            for number in range(4):
                x, y = batch(number, link.rank)

                def closure(x=x, y=y):
                    optimizer.zero_grad()
                    loss = loss_of(model, x, y)
                    loss.backward()
                    return loss

                optimizer.step(closure)
            assert sync.step == 4, "a step is a step, however often it calls its closure"
        return weights(model)

    assert everybody_alike(run(2, member))


@pytest.mark.parametrize("as_keyword", [True, False])
def test_a_closure_is_refused_for_gradients(as_keyword):
    def member(link):
        model = make_model()
        optimizer = torch.optim.LBFGS(model.parameters())
        text = r"LBFGS.step was given a closure: it computes gradients inside .*\n.*before the step.*\n.*sends deltas"
        sync = thinwire.synchronize(model, optimizer, every_step(), link)
        with pytest.raises(ConfigError, match=text), sync:
            optimizer.step(closure=lambda: 0.0) if as_keyword else optimizer.step(lambda: 0.0)

    run(2, member)


@pytest.mark.parametrize("way", WAYS)
def test_frozen_parameters_are_not_sent_and_not_changed(way):
    def member(link, frozen):
        model = make_model()
        if frozen:
            model[0].requires_grad_(False)
        optimizer = sgd(model)
        with thinwire.synchronize(model, optimizer, WAYS[way], link) as sync:
            steps(model, optimizer, link.rank, range(4))
            size = sum(len(vector) for vector in sync.consensus())
        return weights(model), size, link.meter.by_purpose()["rounds"].sent_bytes

    frozen, whole = run(2, lambda link: member(link, True)), run(2, lambda link: member(link, False))
    untouched = make_model()
    assert same(frozen[0][0][:2], weights(untouched)[:2])
    assert not same(frozen[0][0][2:], weights(untouched)[2:])
    assert frozen[0][1] == whole[0][1] - (WIDTH + 1) * 16
    rounds = {"gradients": 4, "deltas": 2}[way]
    assert 0 <= whole[0][2] - frozen[0][2] - rounds * (WIDTH + 1) * 16 * 4 < 8 * rounds, "but for alignment"


class Tied(nn.Module):
    """Input and output share one matrix; one parameter is unused."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(CLASSES, WIDTH, bias=False)
        self.out = nn.Linear(CLASSES, WIDTH, bias=False)
        self.out.weight = self.into.weight
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.into.weight) @ self.out.weight.T @ self.into.weight


@pytest.mark.parametrize("way", WAYS)
def test_tied_weights_are_one_and_unused_ones_stay_without_gradient(way):
    def member(link):
        torch.manual_seed(3)
        model = Tied()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
        none = []
        with thinwire.synchronize(model, optimizer, WAYS[way], link) as sync:
            steps(
                model,
                optimizer,
                link.rank,
                range(4),
                lambda _: none.append((sync.combine_gradients(), model.unused.grad)[1]),
            )
            assert sum(len(vector) for vector in sync.consensus()) == CLASSES * WIDTH + 3
        assert model.into.weight is model.out.weight
        assert none == [None] * 4
        return weights(model)

    results = run(3, member)
    assert everybody_alike(results)
    assert results[0][0].tolist() == [1, 1, 1], "no gradient, no weight decay"


def test_a_parameter_that_only_one_member_used_gets_its_gradient_everywhere():
    def member(link):
        model = nn.ModuleList([nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)])
        for module in model:
            nn.init.zeros_(module.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        with thinwire.synchronize(model, optimizer, every_step(), link):
            model[link.rank](torch.ones(1)).sum().backward()
            optimizer.step()
        return [module.weight.item() for module in model]

    assert run(2, member) == [[-0.5, -0.5]] * 2


@pytest.mark.parametrize("way", WAYS)
def test_accumulated_gradients_are_exchanged_once_a_step(way):
    def member(link):
        model = make_model()
        optimizer = sgd(model)
        outcomes: list[Any] = []
        with thinwire.synchronize(model, optimizer, WAYS[way], link, observer=outcomes.append):
            for number in range(4):
                for part in range(3):
                    (loss_of(model, *batch(3 * number + part, link.rank)) / 3).backward()
                optimizer.step()
                optimizer.zero_grad()
        return weights(model), len(outcomes)

    results = run(2, member)
    assert everybody_alike([result[0] for result in results])
    assert results[0][1] == {"gradients": 4, "deltas": 2}[way]


def test_parameter_groups_and_schedulers_work_as_ever():
    def member(link, method):
        model = make_model()
        groups = [{"params": model[0].parameters(), "lr": 0.3}, {"params": model[2:].parameters()}]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.5)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        if method is None:
            for number in range(5):
                steps(model, optimizer, 0, range(number, number + 1))
                scheduler.step()
        else:
            with thinwire.synchronize(model, optimizer, method, link):
                for number in range(5):
                    steps(model, optimizer, 0, range(number, number + 1))
                    scheduler.step()
        return weights(model), [group["lr"] for group in optimizer.param_groups]

    plain = member(None, None)
    for method in (every_step(), local_sgd(every=2)):
        for live, rates in run(2, lambda link, method=method: member(link, method)):
            assert same(live, plain[0]), "two members on equal data: their mean is each of them, to the bit"
            assert rates == plain[1] == [0.075, 0.025]


def test_one_member_alone_has_the_bits_of_the_plain_loop():
    model = make_model()
    steps(model, adamw(model), 0, range(6))
    for method in (every_step(), local_sgd(every=2), every_step(codec=topk(1.0))):
        assert same(train(alone(), method, 6).live, weights(model))


# --- clipping ---------------------------------------------------------------------------------------------------


def test_clipping_by_the_synchronizer_clips_the_mean_gradient():
    """Against one member on the concatenated batch. Tolerance: sums of 24 samples in another order, ten steps."""
    members, max_norm = 3, 0.3

    def member(link):
        model = make_model()
        optimizer, norms = sgd(model), []
        with thinwire.synchronize(model, optimizer, every_step(), link) as sync:
            steps(model, optimizer, link.rank, range(10), lambda _: norms.append(sync.clip_grad_norm_(max_norm).item()))
        return weights(model), norms

    model = make_model()
    optimizer, norms = sgd(model), []
    for number in range(10):
        parts = [batch(number, rank) for rank in range(members)]
        loss_of(model, torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), max_norm).item())
        optimizer.step()
        optimizer.zero_grad()
    assert min(norms) > max_norm, "every step is clipped"
    results = run(members, member)
    assert everybody_alike([live for live, _ in results])
    assert results[0][1] == pytest.approx(norms, rel=1e-4)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(results[0][0], weights(model), strict=True))


def test_torchs_own_clipping_clips_the_members_gradient():
    def member(link):
        model = make_model()
        optimizer = sgd(model)
        with thinwire.synchronize(model, optimizer, every_step(), link):
            steps(model, optimizer, link.rank, range(1), lambda _: nn.utils.clip_grad_norm_(model.parameters(), 0.3))
        return weights(model)

    gradients = []
    for rank in range(2):
        model = make_model()
        loss_of(model, *batch(0, rank)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        gradients.append([p.grad for p in model.parameters()])
    expected = [w - 0.1 * ((a + b) / 2) for w, a, b in zip(weights(make_model()), *gradients, strict=True)]
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(run(2, member)[0], expected, strict=True))


@pytest.mark.parametrize("method", [diloco(every=2), every_step()], ids=["deltas", "gradients"])
def test_clipping_exchanges_at_most_once(method):
    def member(link):
        model = make_model()
        optimizer = sgd(model)
        outcomes: list[Any] = []
        with thinwire.synchronize(model, optimizer, method, link, observer=outcomes.append) as sync:

            def twice(_):
                sync.clip_grad_norm_(0.1)
                sync.clip_grad_norm_(0.1)
                sync.combine_gradients()

            steps(model, optimizer, link.rank, range(4), twice)
        return len(outcomes)

    assert run(2, member) == [4 if method == every_step() else 2] * 2


# --- precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_autocast(way):
    def member(link):
        model = make_model()
        optimizer = sgd(model)
        with thinwire.synchronize(model, optimizer, WAYS[way], link):
            for number in range(4):
                x, y = batch(number, link.rank)
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = nn.functional.cross_entropy(model(x).float(), y)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        return weights(model)

    results = run(2, member)
    assert everybody_alike(results)
    assert not same(results[0], weights(make_model()))


@pytest.mark.parametrize("mixed", [False, True])
def test_a_bf16_delta_without_training_is_exactly_zero(mixed):
    """Though anchors are float32 and drift off the bf16 grid."""

    def member(link):
        model = make_model().bfloat16()
        if mixed:
            model[0].float()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sent: list[float] = []
        with thinwire.synchronize(model, optimizer, diloco(every=1, momentum=0.0, outer_lr=0.3), link) as sync:
            for number in range(4):
                for p in model.parameters():
                    p.grad = torch.full_like(p, (0.37 + link.rank) if number == 0 else 0.0)
                optimizer.step()
                sent.append(sync.consensus()[0].clone())
            fragments = sync._fragments
            assert torch.equal(fragments.rounded(0, sync.consensus()[0]), fragments.gather(0))
            off_grid = not torch.equal(sync.consensus()[0], fragments.gather(0))
        return sent, off_grid

    for sent, off_grid in run(2, member):
        assert off_grid, "the anchor keeps more digits than the parameters"
        assert not torch.equal(sent[0], torch.cat([p.flatten() for p in make_model().bfloat16().parameters()]).float())
        assert all(torch.equal(anchor, sent[0]) for anchor in sent[1:])


@pytest.mark.parametrize("way", WAYS)
def test_bf16_parameters_train(way):
    def member(link):
        model = make_model().bfloat16()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        losses = []
        with thinwire.synchronize(model, optimizer, WAYS[way], link):
            for number in range(40):
                x, y = batch(number % 4, link.rank)
                loss = loss_of(model, x.bfloat16(), y)
                losses.append(loss.item())
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        assert all(p.dtype == torch.bfloat16 for p in model.parameters())
        return weights(model), losses

    results = run(2, member)
    assert everybody_alike([live for live, _ in results])
    assert sum(results[0][1][-4:]) < 0.8 * sum(results[0][1][:4])


CLIP = 0.3  # below every norm here


def scaled_training(
    link, method, *, overflown: Callable[[int, int], bool], clip: str = "", count: int = 4, scale=2.0**10
):
    """Training with a GradScaler; gradients of (rank, step) become infinite where `overflown` says so."""
    model = make_model()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=100)
    outcomes: list[Any] = []
    with thinwire.synchronize(model, optimizer, method, link, scaler=scaler, observer=outcomes.append) as sync:
        for number in range(count):
            scaler.scale(loss_of(model, *batch(number, link.rank))).backward()
            if overflown(link.rank, number):
                next(model.parameters()).grad[0, 0] = math.inf
            if clip == "torch":
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            elif clip == "sync":
                sync.clip_grad_norm_(CLIP)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert sync.step == count
    assert "step" not in vars(scaler), "the scaler is as it was"
    return weights(model), outcomes, scaler.get_scale()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("clip", ["", "torch", "sync"])
def test_a_scaler_without_overflow_changes_nothing(way, clip):
    """Scales are powers of two: the same bits, clipped or not."""

    def plain(link):
        model = make_model()
        optimizer = sgd(model)
        with thinwire.synchronize(model, optimizer, WAYS[way], link) as sync:
            clips = {"": lambda _: None, "sync": lambda _: sync.clip_grad_norm_(CLIP)}
            clips["torch"] = lambda _: nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            steps(model, optimizer, link.rank, range(4), clips[clip])
        return weights(model)

    scaled = run(2, lambda link: scaled_training(link, WAYS[way], overflown=lambda *_: False, clip=clip))
    assert all(same(a[0], b) for a, b in zip(scaled, run(2, plain), strict=True))


@pytest.mark.parametrize("clip", ["", "torch", "sync"])
def test_overflown_gradients_of_one_member_are_left_out_and_nobody_waits(clip):
    """Also when scales differ afterwards: gradients are combined without their scales."""

    def overflown(rank, number):
        return rank == 1 and number in (1, 2)

    results = run(3, lambda link: scaled_training(link, every_step(), overflown=overflown, clip=clip))
    assert everybody_alike([live for live, _, _ in results])
    assert [outcome.ranks for outcome in results[0][1]] == [(0, 1, 2), (0, 2), (0, 2), (0, 1, 2)]
    assert [scale for _, _, scale in results] == [2.0**10, 2.0**8, 2.0**10]
    assert bool(torch.isfinite(torch.cat([w.flatten() for w in results[0][0]])).all())


def test_a_scale_that_is_too_large_for_everybody_is_found_together():
    """The usual beginning: all overflow until the scale has come down. No step is taken meanwhile, nobody gives up."""

    def overflown(rank, number):
        return number < 5

    results = run(3, lambda link: scaled_training(link, every_step(), overflown=overflown, count=7))
    assert everybody_alike([live for live, _, _ in results])
    kinds = [type(outcome) for outcome in results[0][1]]
    assert kinds == [Skipped] * 5 + [Committed] * 2
    assert [scale for _, _, scale in results] == [2.0**5] * 3

    def two_steps(link):
        model = make_model()
        optimizer = sgd(model)
        with thinwire.synchronize(model, optimizer, every_step(), link):
            steps(model, optimizer, link.rank, range(5, 7))
        return weights(model)

    assert same(results[0][0], run(3, two_steps)[0]), "as if the overflown steps had not been"


def test_one_member_may_look_for_its_scale_longer_than_patience_lasts():
    results = run(
        2, lambda link: scaled_training(link, every_step(), overflown=lambda rank, n: rank == 1 and n < 6, count=8)
    )
    assert everybody_alike([live for live, _, _ in results])


def test_with_a_scaler_too_divergence_has_an_end():
    def member(link):
        with pytest.raises(DivergedError, match="no member had finite values"):
            scaled_training(link, every_step(), overflown=lambda *_: True, count=60, scale=2.0**60)

    run(2, member)


def test_a_step_that_the_scaler_skips_is_a_local_step_all_the_same():
    results = run(2, lambda link: scaled_training(link, diloco(every=2), overflown=lambda rank, n: rank == 1 and n < 3))
    assert everybody_alike([live for live, _, _ in results])
    assert [(outcome.step, outcome.ranks) for outcome in results[0][1]] == [(2, (0, 1)), (4, (0, 1))]


def test_a_disabled_scaler_is_no_scaler():
    def member(link):
        model = make_model()
        optimizer = sgd(model)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        with thinwire.synchronize(model, optimizer, every_step(), link, scaler=scaler) as sync:
            for number in range(3):
                scaler.scale(loss_of(model, *batch(number, link.rank))).backward()
                sync.clip_grad_norm_(1e6)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        return weights(model)

    assert same(run(2, member)[1], run(2, lambda link: train(link, every_step(), 3, make_optimizer=sgd))[1].live)


# --- buffers ----------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Parameters and buffers of every sort, which a member fills with its rank."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(300))
        self.second = nn.Parameter(torch.zeros(2))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("constant", torch.tensor([0.1, 1e-20, math.pi, -math.inf]))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def fill(self, rank: int) -> None:
        self.mean = torch.tensor([float(rank), 2.0 * rank])  # a new tensor, as modules may do
        self.seen += 10 + rank
        self.scratch += rank


def counting(link, method, count, *, poisoned: int | None = None):
    model = Counting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    with thinwire.synchronize(model, optimizer, method, link):
        for _ in range(count):
            model.fill(link.rank)
            model.weight.grad, model.second.grad = torch.ones(300), torch.ones(2)
            if link.rank == poisoned:
                poison(model)
            optimizer.step()
            seen.append((model.mean.tolist(), model.seen.item(), model.scratch.tolist()))
    return seen, model.constant


@pytest.mark.parametrize("method", [diloco(every=2), every_step()], ids=["deltas", "gradients"])
def test_buffers_float_mean_integer_maximum_at_every_round(method):
    results = run(3, lambda link: counting(link, method, 2))
    for rank, (seen, constant) in enumerate(results):
        if method == every_step():
            assert seen[0] == ([1.0, 2.0], 12, [rank, rank])
            assert seen[1] == ([1.0, 2.0], 24, [2 * rank, 2 * rank])
        else:
            assert seen[0] == ([rank, 2 * rank], 10 + rank, [rank, rank]), "no round, no change"
            assert seen[1] == ([1.0, 2.0], 24, [2 * rank, 2 * rank])
        assert torch.equal(constant, Counting().constant), "equal values stay what they are, to the bit"


def test_buffers_go_with_fragment_0_and_no_other():
    method = Method(schedule=Every(2), payload=Delta(2), outer=SGD(1.0))
    seen = run(2, lambda link: counting(link, method, 4))[0][0]
    assert [mean for mean, _, _ in seen] == [[0.5, 1.0], [0.0, 0.0], [0.5, 1.0], [0.0, 0.0]]


def test_buffers_of_a_member_without_finite_values_do_not_count():
    results = run(3, lambda link: counting(link, local_sgd(every=2), 2, poisoned=2))
    assert all(seen[-1][:2] == ([0.5, 1.0], 22) for seen, _ in results)


def test_buffers_in_gossip_are_those_of_the_pair():
    """Three members: one is left alone each round and keeps its own."""
    results = run(3, lambda link: counting(link, local_sgd(every=1).but(topology=RandomPairs()), 1))
    means = sorted(seen[0][0][0] for seen, _ in results)
    assert means in ([0.5, 0.5, 2.0], [0.0, 1.5, 1.5], [1.0, 1.0, 1.0])


@pytest.mark.parametrize("between", [None, RandomPairs()], ids=repr)
def test_buffers_over_islands(between):
    topology = Islands(2) if between is None else Islands(2, between=between)
    results = run(5, lambda link: counting(link, local_sgd(every=1).but(topology=topology), 3))
    if between is None:
        assert all(seen[-1][0] == [2.0, 4.0] for seen, _ in results)
    assert results[0][0][-1][:2] == results[1][0][-1][:2], "members of one island agree"


def test_batch_normalisation_agrees_on_all_members():
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))

    def member(link, method):
        model = build()
        optimizer = sgd(model)
        with thinwire.synchronize(model, optimizer, method, link):
            steps(model, optimizer, link.rank, range(4))
        return [value.clone() for value in model.state_dict().values()]

    for method in (every_step(), diloco(every=2), streaming_diloco(every=2, fragments=2, overlap=0)):
        results = run(3, lambda link, method=method: member(link, method))
        statistics = [index for index, name in enumerate(build().state_dict()) if "running" in name or "num" in name]
        buffers = [[result[index] for index in statistics] for result in results]
        if method.payload.fragments == 1:  # otherwise the last round was not fragment 0's
            assert everybody_alike(results)
        assert not same(buffers[0], list(build().buffers()))


# --- what a loop may call -----------------------------------------------------------------------------------------


def test_evaluating_shows_the_consensus_and_puts_the_live_model_back():
    method = streaming_diloco(every=4, fragments=2, overlap=1)

    def member(link):
        model = make_model()
        optimizer = adamw(model)
        with thinwire.synchronize(model, optimizer, method, link) as sync:
            steps(model, optimizer, link.rank, range(7))
            live = weights(model)
            with sync.evaluating():
                shown = weights(model)
                assert torch.equal(sync._fragments.gather(0), sync.consensus()[0])
                assert torch.equal(sync._fragments.gather(1), sync.consensus()[1])
            assert same(weights(model), live)
            with pytest.raises(KeyError), sync.evaluating():
                raise KeyError("in the evaluation")
            assert same(weights(model), live)
            assert not same(shown, live)
        return shown

    assert everybody_alike(run(2, member))


def test_consensus_of_gossip_is_the_members_mean():
    def member(link):
        model = make_model()
        optimizer = adamw(model)
        with thinwire.synchronize(model, optimizer, local_sgd(every=2).but(topology=RandomPairs()), link) as sync:
            steps(model, optimizer, link.rank, range(3))
            assert not sync.has_consensus
            return sync.consensus()[0], sync._fragments.gather(0)

    results = run(3, member)
    expected = torch.stack([live for _, live in results]).mean(dim=0)
    assert all(torch.equal(consensus, expected) for consensus, _ in results)


def test_consensus_of_gradients_is_the_model():
    def member(link):
        model = make_model()
        optimizer = adamw(model)
        with thinwire.synchronize(model, optimizer, every_step(), link) as sync:
            steps(model, optimizer, link.rank, range(2))
            return torch.equal(sync.consensus()[0], torch.cat([p.detach().flatten() for p in model.parameters()]))

    assert run(2, member) == [True, True]


def weighing(link, method, counts: list[int], moves: list[float], *, link_of=lambda link: link) -> list[float]:
    """One scalar weight that moves by `moves` at lr 1, after counting samples; its values."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    values = []
    with thinwire.synchronize(model, optimizer, method, link_of(link)) as sync:
        for samples, move in zip(counts, moves, strict=True):
            model.weight.grad = torch.tensor([[-move]])
            if samples is not None:
                sync.count(samples)
            optimizer.step()
            values.append(model.weight.item())
    return values


def test_counts_are_those_since_the_last_round():
    """Round 1: weights 3+1 and 4; round 2: 0+2 and 6; by hand."""
    counts = [[3, 1, 0, 2], [2, 2, 3, 3]]
    moves = [[1.0, 1.0, 1.0, 0.0], [3.0, 3.0, 0.0, 5.0]]
    results = run(2, lambda link: weighing(link, fedavg(every=2), counts[link.rank], moves[link.rank]))
    first = (4 * 2 + 4 * 6) / 8
    assert [values[1] for values in results] == [first] * 2
    assert [values[3] for values in results] == [(2 * (first + 1) + 6 * (first + 5)) / 8] * 2


def test_without_counts_local_steps_weigh():
    results = run(2, lambda link: weighing(link, fedavg(every=2), [None] * 2, [1.0 + link.rank, 1.0 + link.rank]))
    assert [values[1] for values in results] == [3.0] * 2


def test_a_member_that_counted_nothing_takes_the_others_model_and_nobody_warns(caplog):
    """As often as it likes; its optimizer's state is its own and stays."""

    def member(link):
        model = make_model()
        optimizer = adamw(model)
        with thinwire.synchronize(model, optimizer, fedavg(every=1), link) as sync:
            for number in range(6):
                sync.count(0 if link.rank == 1 else 8)
                steps(model, optimizer, link.rank, range(number, number + 1))
            assert (sync.committed, sync.skipped) == (6, 0)
        assert len(optimizer.state) == 6
        assert all(state["step"].item() == 6 for state in optimizer.state.values())
        return weights(model)

    results = run(3, member)
    assert everybody_alike(results)
    assert not caplog.records


def test_nobody_counted_anything_skips_the_round_for_models_and_is_refused_for_gradients(caplog):
    values = run(2, lambda link: weighing(link, fedavg(every=1), [0, 1], [1.0 + link.rank, 0.0]))
    assert [v[0] for v in values] == [1.0, 2.0], "as they were"
    assert [v[1] for v in values] == [1.5, 1.5]
    assert "was skipped (no member has counted a sample since its last round)" in caplog.text

    def member(link):
        with pytest.raises(
            ConfigError, match=r"no member has counted a sample .*\n.*\n.*sync.count.* before the optimizer"
        ):
            weighing(link, every_step().but(aggregator=WeightedMean()), [0], [1.0])

    run(2, member)


def test_the_observer_sees_every_outcome_in_order():
    method = streaming_diloco(every=4, fragments=2, overlap=1)
    outcomes = run(2, lambda link: train(link, method, 9))[0].outcomes
    assert outcomes == [
        Committed(3, 0, 0, (0, 1)), Committed(5, 1, 0, (0, 1)), Committed(7, 0, 1, (0, 1)), Committed(9, 1, 1, (0, 1)),
    ]  # fmt: skip


def test_several_rounds_under_way_are_each_applied_once_and_in_time():
    """The two that are still under way at the end are applied on leaving."""
    method = streaming_diloco(every=6, fragments=3, overlap=4)
    outcomes = run(2, lambda link: train(link, method, 11))[0].outcomes
    assert [(outcome.step, outcome.fragment, outcome.round) for outcome in outcomes] == [
        (6, 0, 0), (8, 1, 0), (10, 2, 0), (11, 0, 1), (11, 1, 1),
    ]  # fmt: skip


def test_two_synchronizers_one_after_the_other_on_the_same_link():
    def member(link):
        model = make_model()
        optimizer = adamw(model)
        for method in (every_step(), diloco(every=2), streaming_diloco(every=4, fragments=2, overlap=2)):
            with thinwire.synchronize(model, optimizer, method, link) as sync:
                with sync.evaluating():
                    start = weights(model)
                assert same(start, weights(model)), "it begins with the model as it is"
                steps(model, optimizer, link.rank, range(4))
                shown = sync.consensus() if method.schedule.overlap else None
            if shown is not None:
                return shown
        return None

    assert everybody_alike(run(3, member))


def test_broadcast_makes_all_alike():
    def member(link):
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2).bfloat16())
        with torch.no_grad():
            for value in model.state_dict().values():
                value.fill_(link.rank + 1)
        thinwire.broadcast(model, link)
        assert all(bool((value == 1).all()) for value in model.state_dict().values())

    run(3, member)

    def unlike(link):
        with pytest.raises(ConfigError, match="members disagree on model"):
            thinwire.broadcast(nn.Linear(3, 2 + link.rank), link)

    run(2, unlike)


@pytest.mark.parametrize("method", [every_step(), diloco(every=2)], ids=["gradients", "deltas"])
def test_afterwards_nothing_is_left_behind(method):
    """Hooks are removed; more steps are plain steps."""

    def member(link):
        model = make_model()
        optimizer = sgd(model)
        scaler = torch.amp.GradScaler("cpu")
        with thinwire.synchronize(model, optimizer, method, link, scaler=scaler):
            assert len(optimizer._optimizer_step_pre_hooks) == len(optimizer._optimizer_step_post_hooks) == 1
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
        assert "step" not in vars(scaler)
        before = link.meter.total()
        steps(model, optimizer, 0, range(2))
        assert link.meter.total() == before
        return weights(model)

    plain = make_model()
    steps(plain, sgd(plain), 0, range(2))
    assert all(same(live, weights(plain)) for live in run(2, member))


def test_a_model_that_cannot_be_synchronised_is_refused_in_words():
    def refused(model, optimizer, method, text):
        with pytest.raises(ConfigError, match=text):
            thinwire.synchronize(model, optimizer, method, alone())

    model = make_model()
    refused(model.requires_grad_(False), sgd(make_model()), diloco(), "optimizer holds 6 parameter")
    refused(model, sgd(model), diloco(), "no trainable parameter")
    double = make_model().double()
    refused(double, sgd(double), diloco(), "parameter '0.weight' is torch.float64")
    both = nn.ModuleList([make_model(), nn.Linear(2, 3)])
    text = r"holds 2 parameter\(s\) that the model does not have, the first of shape \(3, 2\)\n.*\n.*one nn.ModuleList"
    refused(both[0], sgd(both), every_step(), text)
    model = make_model()
    refused(model, sgd(model), streaming_diloco(every=20, fragments=7), "7 fragments of a model with 6 parameters")


# --- state ------------------------------------------------------------------------------------------------------


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(_equal, a, b))
    return a == b


STATEFUL = {
    "diloco": diloco(every=2, codec=topk(1 / 4)),
    "in flight": streaming_diloco(every=6, fragments=3, overlap=4, codec=int4),
    "estimates of gradients": every_step(codec=econtrol(topk(1 / 4))),
    "estimates in flight": streaming_diloco(every=4, fragments=2, overlap=3, codec=ef21_sgdm(int4, double=True)),
    "rebase": streaming_diloco(every=4, fragments=1, overlap=3).but(outer=Rebase(Nesterov(0.4, 0.9))),
    "phases": Phases(every_step(codec=topk(1 / 2)), 3, streaming_diloco(every=4, fragments=2, overlap=2)),
    "phases of rounds": Phases(diloco(every=2), 4, local_sgd(every=2).but(topology=RandomPairs())),
    "pairs in flight": Method(
        schedule=Every(4, 2), payload=Parameters(2), outer=Mix(Average(), 0.5), topology=RandomPairs()
    ),
}


class Normed(nn.Sequential):
    """With buffers, so that they are in flight too."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES))


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5, 6])
def test_state_comes_and_goes_and_a_resumed_run_has_the_bits_of_one_that_never_stopped(name, stop, tmp_path):
    """Through a file, with buffers, three members (one is left alone by pairs); the state twice is the same state."""
    method = STATEFUL[name]

    def whole(link):
        return train(link, method, 9, build=Normed).live

    def in_two(link):
        model = Normed()
        optimizer = adamw(model)
        with thinwire.synchronize(model, optimizer, method, link) as sync:
            steps(model, optimizer, link.rank, range(stop))
            first = sync.state_dict()
            assert _equal(first, sync.state_dict()), "looking changes nothing"
            path = tmp_path / f"{link.rank}.pt"
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "sync": first}, path)
            steps(model, optimizer, link.rank, range(20, 22))  # what happens later does not reach into the saved state
        saved = torch.load(path, weights_only=True)
        assert _equal(saved["sync"], first)
        model = Normed()
        optimizer = adamw(model)
        with thinwire.synchronize(model, optimizer, method, link) as sync:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            sync.load_state_dict(saved["sync"])
            assert _equal(sync.state_dict(), saved["sync"])
            steps(model, optimizer, link.rank, range(stop, 9))
        return weights(model)

    assert all(same(a, b) for a, b in zip(run(3, whole), run(3, in_two), strict=True))


def test_a_phase_begins_at_the_common_model_with_fresh_state():
    """The second phase alone, from the model at the switch, gives the same."""
    first, then = every_step(), diloco(every=2)

    def in_phases(link):
        return train(link, Phases(first, 3, then), 7, make_optimizer=sgd).live

    def by_hand(link):
        model = make_model()
        optimizer = sgd(model)
        for method, numbers in ((first, range(3)), (then, range(3, 7))):
            with thinwire.synchronize(model, optimizer, method, link):
                # `then` counts steps of its own here; its rounds come after steps 5 and 7 as in the whole
                steps(model, optimizer, link.rank, numbers)
        return weights(model)

    phases, hand = run(2, in_phases), run(2, by_hand)
    outcomes = run(2, lambda link: train(link, Phases(first, 3, then), 7))[0].outcomes
    assert [outcome.step for outcome in outcomes] == [0, 1, 2, 4, 6]
    assert not same(phases[0], hand[0]), "the schedule counts the run's steps, not the phase's"
    aligned = [run(2, lambda link: train(link, Phases(first, 4, then), 8, make_optimizer=sgd).live)]

    def aligned_by_hand(link):
        model = make_model()
        optimizer = sgd(model)
        for method, numbers in ((first, range(4)), (then, range(4, 8))):
            with thinwire.synchronize(model, optimizer, method, link):
                steps(model, optimizer, link.rank, numbers)
        return weights(model)

    assert same(aligned[0][0], run(2, aligned_by_hand)[0])


# --- faults: packets ----------------------------------------------------------------------------------------------


def rounds_only(hit: Callable[[int, int, Kind], bool]) -> Callable[[str, int, int, Tensor], Tensor]:
    """A script that turns over a byte in the middle of those round packets that `hit(sender, count, kind)` names."""

    def change(purpose, sender, count, buffer):
        if purpose == "rounds" and hit(sender, count, read(buffer.clone()).header.kind):
            return flip(buffer, len(buffer) // 2)
        return buffer

    return change


MANY = {
    "ddp": every_step(),
    "ddp topk": every_step(codec=topk(1 / 4)),
    "diloco int8": diloco(every=2, codec=int8),
    "feedback": diloco(every=2, codec=thinwire.codecs.ErrorFeedback(int4)),
    "estimates": diloco(every=2, codec=ef21(int4)),
    "streaming": streaming_diloco(every=4, fragments=2, overlap=1),
    "islands": diloco(every=2).but(topology=Islands(2)),
    "median": diloco(every=2).but(aggregator=Median()),
    "pairs": local_sgd(every=2).but(topology=RandomPairs()),
}


@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("victim", [0, 1, 3])
@pytest.mark.parametrize("kind", [Kind.CONTRIBUTION, Kind.RESULT])
def test_a_flipped_byte_is_sent_again_and_leaves_no_trace(name, victim, kind):
    """Four members; the first packet of the kind that reaches the victim is damaged. The same bits as undisturbed."""
    hits = []

    def hit(sender, count, found):
        if found == kind and not hits:
            hits.append(sender)
            return True
        return False

    def disturbed(link):
        return train(Tampered(link, rounds_only(hit)) if link.rank == victim else link, MANY[name], 5)

    results = run(4, disturbed)
    calm = run(4, lambda link: train(link, MANY[name], 5))
    assert all(same(a.live, b.live) and a.outcomes == b.outcomes for a, b in zip(results, calm, strict=True))
    if hits:
        assert sum(r.sent_bytes for r in results) > sum(r.sent_bytes for r in calm)
    else:  # no results by the gather way; nobody contributes to an empty shard, or to who does not lead an island
        assert kind == Kind.RESULT or victim == 0 or name == "islands" or victim == 1


def always_from(rank: int) -> Callable[[str, int, int, Tensor], Tensor]:
    return rounds_only(lambda sender, count, kind: sender == rank and kind == Kind.CONTRIBUTION)


def test_a_member_that_is_never_understood_stops_rounds_of_deltas_but_not_the_run(caplog):
    """Its rounds are skipped everywhere, each says why, and everything is as without any round."""

    def member(link):
        tampered = Tampered(link, always_from(1)) if link.rank == 2 else link
        return train(tampered, diloco(every=2), 5)

    results = run(3, member)
    alone_ = make_model()
    steps(alone_, adamw(alone_), 0, range(5))
    assert same(results[0].live, weights(alone_))
    assert everybody_alike([result.consensus for result in results])
    assert torch.equal(results[0].consensus[0], torch.cat([w.flatten() for w in weights(make_model())]))
    for rank, result in enumerate(results):
        assert [type(outcome) for outcome in result.outcomes] == [Skipped, Skipped]
        why = "member 1: the checksum does not match" if rank == 2 else "another member received a damaged packet"
        assert f"given up after 3 attempts: {why}" in result.outcomes[0].reason
    assert "was skipped (given up after 3 attempts: member 1: the checksum" in caplog.text
    assert "its local steps go with the next round" in caplog.text


def test_what_a_skipped_round_held_goes_with_the_next_one():
    """The first round fails for good, the second carries both; and weighs by the samples of both."""

    def failing_first(link):
        def hit(sender, count, kind):
            return sender == 1 and kind == Kind.CONTRIBUTION and count < 6  # three attempts of contribution and verdict

        return Tampered(link, rounds_only(hit)) if link.rank == 0 else link

    counts, moves = [[1, 1], [5, 1]], [[1.0, 1.0], [2.0, 2.0]]
    results = run(
        2, lambda link: weighing(link, fedavg(every=1), counts[link.rank], moves[link.rank], link_of=failing_first)
    )
    assert [values[0] for values in results] == [1.0, 2.0], "skipped"
    assert results[0][1] == results[1][1] == pytest.approx((2 * 2.0 + 6 * 4.0) / 8)


def test_a_member_that_is_never_understood_ends_a_run_of_gradients():
    def member(link):
        with pytest.raises(LinkError, match=r"round 0, fragment 0 at step 0: given up after 3 attempts: .*\n"
                           ".*all members' gradients\n.*faulty network card"):  # fmt: skip
            train(Tampered(link, always_from(1)) if link.rank == 2 else link, every_step(), 3)

    run(3, member)


@pytest.mark.parametrize("method", [diloco(every=2), every_step()], ids=["deltas", "gradients"])
def test_a_damaged_verdict_is_an_error(method):
    """Whether the others committed is not known then, so nothing is tried again."""

    def member(link):
        if link.rank != 2:
            with pytest.raises(PeerLost, match="lost member 2"):
                train(link, method, 6)
            return
        change = rounds_only(lambda sender, count, kind: kind == Kind.VERDICT and sender == 0)
        with pytest.raises(PacketError, match=r"member 0: the checksum does not match.*\n.*every member's verdict"):
            train(Tampered(link, change), method, 6)

    run(3, member)


def test_a_damaged_packet_of_buffers_is_an_error():
    def change(purpose, sender, count, buffer):
        return flip(buffer, -1) if purpose == "buffers" and sender == 0 else buffer

    def member(link):
        if link.rank == 0:
            return
        with pytest.raises(PacketError, match="checksum"):
            train(Tampered(link, change), local_sgd(every=1), 2, build=Normed)

    def both(link):
        if link.rank:
            member(link)
        else:
            with pytest.raises(PeerLost):
                train(link, local_sgd(every=1), 2, build=Normed)

    run(2, both)


def test_a_packet_of_another_run_is_refused():
    """Intact, but of another context: somebody else's packet is not taken for a member's."""
    from dataclasses import replace

    def change(purpose, sender, count, buffer):
        packet = read(buffer.clone())
        return packet.stamped(replace(packet.header, context=5)).to_bytes() if purpose == "rounds" else buffer

    def member(link):
        with pytest.raises((PacketError, PeerLost), match=r"member 0 came with context 5|lost member"):
            train(Tampered(link, change) if link.rank else link, diloco(every=1), 2)

    run(2, member)


# --- faults: members ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [diloco(every=2), every_step(), streaming_diloco(every=4, fragments=2, overlap=2)], ids=str
)
def test_a_member_that_fails_is_named_by_the_others_and_nothing_committed_is_lost(method):
    kept, named = {}, {}

    def member(link):
        model = make_model()
        optimizer = adamw(model)
        sync = thinwire.synchronize(model, optimizer, method, link)
        snapshots = [None]

        def before(number):
            if link.rank == 1 and number == 5:
                raise ZeroDivisionError("out of data")

        try:
            with sync:
                for number in range(9):
                    steps(model, optimizer, link.rank, range(number, number + 1), before)
                    snapshots.append((sync.committed, [vector.clone() for vector in sync.consensus()]))
        except PeerLost as lost:  # with overlap it may be one who had lost member 1 before
            named[link.rank] = 1 in lost.ranks or method.schedule.overlap > 0
            committed, vectors = snapshots[-1]
            if method.payload.kind != "gradient":
                assert sync.committed == committed
                assert same(sync.consensus(), vectors)
            kept[link.rank] = (sync.committed, sync.consensus())
            assert not optimizer._optimizer_step_pre_hooks
            rescued = sync.state_dict(rescue=True)
            assert _equal(rescued["fragments"][0]["anchor"], sync._states[0].anchor)
            raise

    with pytest.raises(ZeroDivisionError, match="out of data"):
        run(3, member)
    assert set(kept) == {0, 2}
    assert named == {0: True, 2: True}
    assert kept[0][0] == kept[2][0] > 0
    assert same(kept[0][1], kept[2][1])


def test_leaving_by_an_exception_waits_for_nobody():
    """A round is under way that can never end, as the other member has not begun it."""

    def member(link):
        model = make_model()
        optimizer = adamw(model)
        if link.rank == 1:
            with pytest.raises(PeerLost, match="lost member 0"), thinwire.synchronize(model, optimizer, slow, link):
                steps(model, optimizer, 1, range(9))
            return None
        with pytest.raises(KeyError), thinwire.synchronize(model, optimizer, slow, link):
            fails(model, optimizer)
        return link.now()

    def fails(model, optimizer):
        steps(model, optimizer, 0, range(4))
        raise KeyError

    slow = streaming_diloco(every=4, fragments=1, overlap=3)
    assert run(2, member, thinwire.Network(step_s=[1.0, 5.0]))[0] == 4.0, "its four steps, and no wait"


def test_nan_on_one_member_is_left_out_healed_and_its_optimizer_begins_anew(caplog):
    caplog.set_level(logging.WARNING)

    def member(link):
        model = make_model()
        optimizer = adamw(model)
        with thinwire.synchronize(model, optimizer, diloco(every=2), link) as sync:
            steps(model, optimizer, link.rank, range(3))
            if link.rank == 1:
                poison(model)
            steps(model, optimizer, link.rank, range(3, 4))
            fresh = len(optimizer.state)
            live = weights(model)
            steps(model, optimizer, link.rank, range(4, 6))
            counted = {int(state["step"]) for state in optimizer.state.values()}
            assert (sync.committed, sync.skipped) == (3, 0)
        return live, fresh, counted, weights(model)

    results = run(3, member)
    assert everybody_alike([live for live, *_ in results])
    assert everybody_alike([live for *_, live in results])
    assert bool(torch.isfinite(torch.cat([w.flatten() for w in results[1][3]])).all())
    assert [fresh for _, fresh, *_ in results] == [6, 0, 6]
    assert [counted for _, _, counted, _ in results] == [{6}, {2}, {6}]
    assert "round 1: member 1 had no finite values and was left out" in caplog.text


def test_the_healed_models_are_those_of_a_run_with_the_others_alone():
    """Members 0 and 2 of three, with 1 out: what two members with the same data give."""

    def member(link, ranks, poisoned):
        rank = ranks[link.rank]
        model = make_model()
        optimizer = sgd(model)
        with thinwire.synchronize(model, optimizer, diloco(every=2), link):
            steps(model, optimizer, rank, range(1))
            if rank == poisoned:
                poison(model)
            steps(model, optimizer, rank, range(1, 2))
        return weights(model)

    three = run(3, lambda link: member(link, (0, 1, 2), 1))
    two = run(2, lambda link: member(link, (0, 2), None))
    assert same(three[1], two[0])


def test_a_fragment_heals_by_itself():
    """Only the poisoned fragment's parameters and optimizer state are the others' and fresh."""
    method = Method(schedule=Every(2), payload=Delta(2), outer=SGD(1.0))

    def member(link):
        model = make_model()
        optimizer = adamw(model)
        with thinwire.synchronize(model, optimizer, method, link) as sync:
            steps(model, optimizer, link.rank, range(1))
            poisoned = sync._fragments.names(1)[0]
            named = dict(model.named_parameters())
            if link.rank == 1:
                with torch.no_grad():
                    named[poisoned].fill_(math.nan)
                # its own gradients would be poisoned everywhere: it takes a step without any
                optimizer.step()
            else:
                steps(model, optimizer, link.rank, range(1, 2))
            return [name for name in named if named[name] in optimizer.state], sync._fragments.names(1)

    (_, _), (kept, gone) = run(2, member)
    assert set(kept).isdisjoint(gone)
    assert set(kept) | set(gone) == {name for name, _ in make_model().named_parameters()}


@pytest.mark.parametrize("method", [diloco(every=1), local_sgd(every=1), every_step()], ids=["diloco", "local", "ddp"])
def test_a_member_that_stays_without_finite_values_ends_the_run_after_three_rounds_on_all_members(method):
    def member(link):
        model = make_model()
        optimizer = sgd(model)

        def before(_):
            if link.rank == 1:
                next(model.parameters()).grad[0, 0] = math.nan

        sync = thinwire.synchronize(model, optimizer, method, link)
        text = "member 1 had no finite values in 3 rounds in a row, the last at step [23]"  # gradients: before the step
        with pytest.raises(DivergedError, match=text), sync:
            steps(model, optimizer, link.rank, range(9), before)
        return sync.committed

    assert run(3, member) == [3, 3, 3]


def test_gradients_that_are_not_finite_on_one_member_are_replaced_by_the_others():
    def member(link):
        model = make_model()
        optimizer = sgd(model)

        def before(number):
            if link.rank == 1 and number == 1:
                for p in model.parameters():
                    p.grad.fill_(math.inf)

        outcomes: list[Any] = []
        with thinwire.synchronize(model, optimizer, every_step(), link, observer=outcomes.append):
            steps(model, optimizer, link.rank, range(3), before)
        return weights(model), [outcome.ranks for outcome in outcomes]

    results = run(3, member)
    assert everybody_alike([live for live, _ in results])
    assert results[0][1] == [(0, 1, 2), (0, 2), (0, 1, 2)]


@pytest.mark.parametrize("method", [diloco(every=2), local_sgd(every=2), every_step()], ids=["diloco", "local", "ddp"])
@pytest.mark.parametrize("members", [1, 2, 3])
def test_nan_on_all_members_is_divergence(method, members):
    def member(link):
        model = make_model()
        poison(model)
        optimizer = sgd(model)
        text = r"no member had finite values.*\n.*at least one member\n.*last checkpoint"
        with pytest.raises(DivergedError, match=text), thinwire.synchronize(model, optimizer, method, link):
            steps(model, optimizer, link.rank, range(4))

    run(members, member)


def test_values_that_overflow_together_are_divergence():
    def member(link):
        model = nn.Linear(4, 1, bias=False)
        model.weight.data.zero_()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with thinwire.synchronize(model, optimizer, every_step(), link):
            model.weight.grad = torch.full((1, 4), 3e38)
            optimizer.step()

    with pytest.raises(DivergedError, match="each member's values are finite, but not what they combine to"):
        run(3, member)


def test_in_gossip_a_member_waits_for_a_partner_to_heal_it():
    """Alone or with a partner that is no better it goes on for a while; a healthy partner's model heals it."""

    def member(link):
        model = make_model()
        optimizer = sgd(model)
        with thinwire.synchronize(model, optimizer, local_sgd(every=1).but(topology=RandomPairs()), link) as sync:
            if link.rank == 2:
                poison(model)
            steps(model, optimizer, link.rank, range(6))
            return bool(torch.isfinite(sync._fragments.gather(0)).all()), sync.skipped

    for members in (3, 5):
        assert all(finite for finite, _ in run(members, member))


def test_in_gossip_members_that_one_has_not_met_for_long_are_not_held_for_diverged():
    """Five members, ten rounds: everybody misses somebody for three rounds; then one of them is poisoned once."""

    def member(link):
        model = make_model()
        optimizer = sgd(model)
        with thinwire.synchronize(model, optimizer, local_sgd(every=1).but(topology=RandomPairs()), link) as sync:
            for number in range(14):
                if link.rank == number % 5 and number > 5:
                    poison(model)
                steps(model, optimizer, link.rank, range(number, number + 1))
            return dict(sync._states[0].idle)

    for idle in run(5, member):
        assert all(count < 3 for count in idle.values())


# --- faults: state ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [diloco(every=2), local_sgd(every=2), streaming_diloco(every=4, fragments=2, overlap=1)], ids=str
)
def test_an_anchor_that_was_written_to_is_noticed_at_the_next_round_and_its_member_named(method):
    def member(link):
        model = make_model()
        optimizer = adamw(model)
        sync = thinwire.synchronize(model, optimizer, method, link)

        def scribble(number):
            if link.rank == 1 and number == 4:
                sync._states[0].anchor[5] = torch.nextafter(sync._states[0].anchor[5], torch.tensor(9.0))

        with pytest.raises(StateMismatch, match="fragment 0: member 1 and the rest do not hold the same result"), sync:
            steps(model, optimizer, link.rank, range(12), scribble)
        return sync.step

    assert all(step <= 8 for step in run(3, member))


def test_a_parameter_written_outside_the_optimizer_is_noticed_when_gradients_are_sent():
    """Parameters are compared every 16 rounds."""

    def member(link):
        model = make_model()
        optimizer = sgd(model)
        sync = thinwire.synchronize(model, optimizer, every_step(), link)

        def scribble(number):
            if link.rank == 2 and number == 5:
                model[0].bias.data[3] += 1e-6

        with pytest.raises(StateMismatch, match="round 16, fragment 0: member 2 and the rest"), sync:
            steps(model, optimizer, link.rank, range(40), scribble)
        return sync.committed

    assert run(3, member) == [16, 16, 16]
