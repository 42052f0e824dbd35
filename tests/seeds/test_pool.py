"""FedKSeed: sums along K directions are the model, to the bit, whoever builds it and in whatever order it was told."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import thinwire
from small import batch, loss_of, make_model
from thinwire.errors import ConfigError, DivergedError, PacketError
from thinwire.seeds.codes import float32
from thinwire.seeds.directions import apply_all_, perturbed
from thinwire.seeds.log import Log
from thinwire.seeds.noise import Rademacher
from thinwire.seeds.pool import CHOICES, UNIT, FedKSeed, Pool, units
from thinwire.seeds.pool_tuner import PoolTuner
from thinwire.seeds.rebuild import rebuild
from thinwire.seeds.tensors import Tunable
from thinwire.seeds.updates import Update

QUICK = FedKSeed(seeds=64, steps=3, share=0.5, eps=1e-3, lr=0.02, seed=5)


def told_steps(count, seeds=64, seed=0):
    """k [count] and g [count]."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.randint(seeds, (count,), generator=generator)
    g = [QUICK.told(float(each)) for each in torch.randn(count, generator=generator) * 10]
    return k, torch.tensor(g)


def direction(k):
    return QUICK.sums(Pool.empty(64)).direction(k)


def rebuilt(options, pool, base):
    w = base.clone()
    apply_all_([("w", w)], [options.sums(pool).update()], Rademacher(), rounding="nearest")
    return w


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def tuned(link, options, rounds, factor=1.0, loss=None):
    model = make_model()

    def own(step):
        return loss_of(model, *batch(100 * tuner.pool.rounds + step, link.rank))

    with PoolTuner(model, options, link) as tuner:
        turns = [tuner.round(loss or own, factor) for _ in range(rounds)]
    return tuner.pool, weights_of(model), turns


# --- sums -----------------------------------------------------------------------------------------------------------


def test_the_order_of_steps_does_not_matter_to_the_bit():
    k, g = told_steps(500)
    base, order = torch.randn(1000), torch.randperm(500)
    one, other = Pool.empty(64).add(k, g, QUICK.lr / 3), Pool.empty(64).add(k[order], g[order], QUICK.lr / 3)
    in_two = Pool.empty(64).add(k[:123], g[:123], QUICK.lr / 3).add(k[123:], g[123:], QUICK.lr / 3)
    for each in (other, in_two):
        assert torch.equal(one.sums, each.sums)
        assert torch.equal(rebuilt(QUICK, one, base), rebuilt(QUICK, each, base))


def test_sums_are_those_of_the_steps_one_by_one():
    """Once replayed from the sums, and step by step: n roundings of half a unit in the last place each, at most.

    A step rounds w <- w - u once, at most by 2^-24 of the largest |w| on the way; the sums round c_k and their partial
    sums besides: groups of eight, each of whose additions rounds by 2^-24 of sum |c| at most.
    """
    k, g = told_steps(300)
    base = torch.randn(2000)
    pool = Pool.empty(64).add(k, g, QUICK.lr)
    stepwise, largest = base.clone(), 0.0
    for index, each in zip(k.tolist(), g.tolist(), strict=True):
        c = float32(int(units(torch.tensor(each), QUICK.lr)) * UNIT)
        apply_all_([("w", stepwise)], [Update((direction(index),), (c,))], Rademacher(), rounding="nearest")
        largest = max(largest, float(stepwise.abs().max()))
    moved = QUICK.lr * float(g.abs().sum())
    assert (rebuilt(QUICK, pool, base) - stepwise).abs().max() <= 2.0**-24 * (
        300 * 2 * largest + 64 * (largest + moved)
    )
    assert not torch.equal(stepwise, base)


def test_a_step_at_a_time_rebuilt_every_time_is_the_sums_exactly():
    k, g = told_steps(40)
    base, pool = torch.randn(100), Pool.empty(64)
    for index in range(40):
        pool = pool.add(k[index : index + 1], g[index : index + 1], QUICK.lr)
        last = rebuilt(QUICK, pool, base)
    assert torch.equal(last, rebuilt(QUICK, Pool.empty(64).add(k, g, QUICK.lr), base))


def test_one_step_of_one_member_is_a_step_of_mezo():
    options = replace(QUICK, steps=1, share=1.0)
    pool, weights, (turn,) = thinwire.run(1, lambda link: tuned(link, options, 1))[0]
    model, mezo = make_model(), make_model()
    (k,) = pool.picks.nonzero().flatten().tolist()
    seed, losses = options.sums(pool).direction(k), []
    for eps in (options.eps, -options.eps):
        for (name, w), p in zip(Tunable(mezo).pairs, model.parameters(), strict=True):
            p.data = perturbed(w, seed, name, eps)
        losses.append(loss_of(model, *batch(0, 0)).item())
    g = options.told((losses[0] - losses[1]) / (2 * options.eps))
    c = float32(round(options.lr * g / UNIT) * UNIT)
    apply_all_(Tunable(mezo).pairs, [Update((seed,), (c,))], Rademacher())
    assert turn.scalars == (g,) != (0.0,)
    assert torch.equal(weights, weights_of(mezo))


def test_what_is_told_is_a_float32_within_clip():
    for g in (0.3, -1e-7, 123.456789, -999.99999):
        assert QUICK.told(g) == float(torch.tensor(g))
    assert QUICK.told(1e9) == 1000.0
    assert QUICK.told(-1e9) == -1000.0
    assert math.isnan(QUICK.told(math.inf))


def test_steps_that_are_not_finite_do_not_count():
    k, g = torch.tensor([1, 2, 2]), torch.tensor([1.0, math.nan, 3.0])
    pool = Pool.empty(4).add(k, g, 0.5)
    assert pool.sums.tolist() == [0, 1 << 39, 3 << 39, 0]
    assert pool.sizes.tolist() == [0, 1 << 24, 3 << 24, 0]
    assert pool.picks.tolist() == [0, 1, 1, 0]


def test_sums_beyond_what_is_exact_are_refused():
    full = replace(Pool.empty(2), sums=torch.tensor([0, (1 << 62) - 5]))
    with pytest.raises(DivergedError, match=r"the sum of a seed's scalars is beyond 2\^62"):
        full.add(torch.tensor([1]), torch.tensor([1.0]), 1.0)


def test_sums_are_whole_numbers_the_nearest():
    assert units(torch.tensor([2.0, -3.0, 1e-12]), 0.25).tolist() == [1 << 39, -3 << 38, 0]


# --- who, and which -------------------------------------------------------------------------------------------------


def test_every_round_another_share_of_the_members_takes_part():
    options, everybody = FedKSeed(), tuple(range(200))
    rounds = [options.members(everybody, number) for number in range(400)]
    assert all(len(each) == len(set(each)) == 10 for each in rounds)
    assert rounds[0] != rounds[1]
    times = torch.tensor([member for each in rounds for member in each]).bincount(minlength=200)
    assert times.min() > 0, "400 rounds of 5 %: 20 times each; none has p = 200 * 0.95^400 = 2e-7"
    assert FedKSeed(share=1e-6).members(everybody, 0)


def test_equal_scores_are_equal_chances():
    pool = replace(Pool.empty(16), sizes=torch.full((16,), 5 << 24), picks=torch.full((16,), 2))
    assert CHOICES["by_score"].probabilities(pool).tolist() == [1 / 16] * 16
    assert CHOICES["by_score"].probabilities(Pool.empty(16)).tolist() == [1 / 16] * 16
    assert CHOICES["uniform"].probabilities(pool).tolist() == [1 / 16] * 16


def test_scores_are_means_that_begin_with_a_zero():
    k, g = torch.tensor([0, 0, 0, 1]), torch.tensor([-4.0, 4.0, 4.0, 1.0])
    p = CHOICES["by_score"].probabilities(Pool.empty(3).add(k, g, 0.1))
    expected = torch.tensor([3.0 / 3.0, 0.5 / 3.0, 0.0], dtype=torch.float64).softmax(0)
    torch.testing.assert_close(p, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("choice", ["uniform", "by_score"])
def test_seeds_are_taken_as_often_as_they_are_likely(choice):
    """4000 picks of a member against chances: a count is off by four standard deviations at most."""
    options = FedKSeed(seeds=8, steps=4000, choice=choice)
    pool = replace(Pool.empty(8), sizes=torch.arange(8) << 24, picks=torch.ones(8, dtype=torch.int64))
    picks = options.picks(pool, 3, 1).bincount(minlength=8)
    p = CHOICES[choice].probabilities(pool)
    assert ((picks - 4000 * p).abs() < 4 * (4000 * p * (1 - p)).sqrt()).all()
    assert not torch.equal(options.picks(pool, 3, 1), options.picks(pool, 3, 2))
    assert not torch.equal(options.picks(pool, 3, 1), options.picks(pool, 4, 1))


# --- members --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("members", [1, 2, 3, 4, 7])
def test_all_members_build_the_same_bits(members):
    results = thinwire.run(members, lambda link: tuned(link, QUICK, 5))
    for pool, weights, turns in results:
        assert torch.equal(pool.sums, results[0][0].sums)
        assert torch.equal(weights, results[0][1])
        assert [turn.members for turn in turns] == [turn.members for turn in results[0][2]]
        assert pool.rounds == 5
    assert int(results[0][0].picks.sum()) == 5 * 3 * len(results[0][2][0].members)
    took_part = [turn.scalars for _, _, turns in results for turn in turns if turn.scalars]
    assert len(took_part) == 5 * len(results[0][2][0].members)


def test_what_members_told_is_what_is_added():
    results = thinwire.run(4, lambda link: tuned(link, QUICK, 1))
    told = [turn.scalars for _, _, (turn,) in results if turn.scalars]
    assert len(told) == 2
    due = sum(int(units(torch.tensor(g), QUICK.lr / 2)) for scalars in told for g in scalars)
    assert int(results[0][0].sums.sum()) == due != 0


def test_it_learns():
    """Four members, half of them at a time, on a loss they share: less than 85 % of what it was after 20 rounds."""
    options = replace(QUICK, seeds=512, steps=8, lr=0.02, choice="by_score")
    (_, weights, _), *_ = thinwire.run(4, lambda link: tuned(link, options, 20))
    model = make_model()
    x, y = batch(10_000, 99, 256)
    before = loss_of(model, x, y).item()
    nn.utils.vector_to_parameters(weights, model.parameters())
    assert loss_of(model, x, y).item() < 0.85 * before


@pytest.mark.parametrize(
    "change",
    [
        {"seeds": 32}, {"steps": 4}, {"share": 1.0}, {"eps": 0.1}, {"lr": 0.01}, {"clip": 0.01},
        {"noise": "binomial"}, {"choice": "by_score"}, {"seed": 6},
    ],
    ids=str,
)  # fmt: skip
def test_every_option_changes_the_result(change):
    (_, plain, _), *_ = thinwire.run(2, lambda link: tuned(link, QUICK, 3))
    (_, other, _), *_ = thinwire.run(2, lambda link: tuned(link, replace(QUICK, **change), 3))
    assert not torch.equal(plain, other)


def test_a_factor_of_zero_leaves_the_base():
    (pool, weights, _), *_ = thinwire.run(2, lambda link: tuned(link, QUICK, 2, factor=0.0))
    assert torch.equal(weights, weights_of(make_model()))
    assert int(pool.picks.sum()) > 0


def test_a_run_goes_on_from_its_state():
    whole = thinwire.run(3, lambda link: tuned(link, QUICK, 6))

    def member(link):
        model = make_model()
        first = PoolTuner(model, QUICK, link)
        work = lambda step: loss_of(model, *batch(100 * tuner.pool.rounds + step, link.rank))  # noqa: E731
        with first as tuner:
            for _ in range(4):
                tuner.round(work)
        model = make_model()
        second = PoolTuner(model, QUICK, link)
        second.load_state_dict(first.state_dict())
        assert torch.equal(weights_of(model), weights_of(first._model))
        with second as tuner:
            for _ in range(2):
                tuner.round(work)
        return weights_of(model)

    for weights in thinwire.run(3, member):
        assert torch.equal(weights, whole[0][1])


def test_weights_in_half_precision_are_rounded_once_when_rebuilt():
    def member(link):
        model = make_model().bfloat16()
        with PoolTuner(model, replace(QUICK, lr=1e-3), link) as tuner:
            for _ in range(3):
                tuner.round(
                    lambda step: loss_of(model.float(), *batch(step, link.rank)) if False else half(model, step)
                )
        return tuner.pool, weights_of(model)

    def half(model, step):
        x, y = batch(step, 0)
        return nn.functional.cross_entropy(model(x.bfloat16()).float(), y)

    (pool, weights), (_, other) = thinwire.run(2, member)
    assert torch.equal(weights, other)
    full = make_model().bfloat16().float()
    apply_all_(Tunable(full).pairs, [replace(QUICK, lr=1e-3).sums(pool).update()], Rademacher())
    assert torch.equal(weights, weights_of(full).bfloat16())


def test_bytes_of_the_paper_s_round_are_below_18_kb_both_ways():
    """K=4096, tau=200, ten members at a time: what crosses each member's line in a round, frames included."""
    options, ones = FedKSeed(share=10 / 64), torch.ones(200)

    def member(link):
        with PoolTuner(nn.Linear(2, 1), options, link) as tuner:
            tuner.rebuild = lambda: None  # neither is a matter of bytes
            tuner._walk = lambda loss, factor, number: (options.picks(tuner.pool, number, link.rank), ones, 0.0)
            for _ in range(3):
                assert len(tuner.round(lambda step: 0.0).members) == 10
        return link.meter.by_purpose()["pool"], tuner.pool

    results = thinwire.run(64, member)
    for traffic, pool in results:
        assert int(pool.picks.sum()) == 3 * 10 * 200
        assert 9 * 1200 < traffic.received_bytes / 3 < 18_000
        assert traffic.sent_bytes / 3 < 18_000
    assert sum(traffic.sent_bytes for traffic, _ in results) == sum(each.received_bytes for each, _ in results)


def test_dropout_is_the_same_on_both_sides_of_a_step():
    """With other masks the two losses would differ by far more than eps explains."""
    options = replace(QUICK, eps=1e-5, share=1.0)

    def member(link):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        with PoolTuner(model, options, link) as tuner:
            return tuner.round(lambda step: model(torch.ones(8)).sum()).scalars

    assert max(map(abs, thinwire.run(1, member)[0])) < 50


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seeds": 0}, "seeds=0\n  expected  from 1 to 32768 directions"),
        ({"seeds": 1 << 16}, "seeds=65536"),
        ({"steps": 0}, "steps=0\n  expected  at least one step"),
        ({"share": 0.0}, "share=0.0"),
        ({"eps": -1.0}, "eps=-1.0\n  expected  a number above 0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"clip": 1e9, "lr": 1.0}, "clip=1000000000.0\n  expected  steps that add up to less than 2.52"),
        ({"seed": -1}, "seed=-1\n  expected  64 bits"),
        ({"choice": "best"}, "choice='best'\n  expected  uniform or by_score"),
        ({"noise": "loud"}, "loud"),
    ],
)
def test_options_that_cannot_be_are_refused(change, told):
    with pytest.raises(ConfigError, match=told):
        FedKSeed(**change)


def test_members_that_differ_are_refused():
    def member(link):
        options = replace(QUICK, lr=0.5) if link.rank else QUICK
        with PoolTuner(make_model(), options, link):
            pass

    with pytest.raises(ConfigError, match="lr"):
        thinwire.run(2, member)


def test_members_with_another_frozen_part_are_refused_in_a_pool():
    def member(link):
        model = nn.Sequential(nn.Linear(2, 2), make_model())
        nn.init.constant_(model[0].requires_grad_(False).weight, float(link.rank))
        nn.init.zeros_(model[0].bias)
        with PoolTuner(model, QUICK, link):
            pass

    with pytest.raises(ConfigError, match="frozen"):
        thinwire.run(2, member)


def test_a_state_of_another_base_is_refused():
    def member(link):
        state = PoolTuner(make_model(), QUICK, link).state_dict()
        with pytest.raises(ConfigError, match=r"the base weights have the digest .*\n.*\n  mend      make the model"):
            PoolTuner(make_model(seed=1), QUICK, link).load_state_dict(state)
        with pytest.raises(ConfigError, match="seeds=32\n  expected  64 seeds"):
            PoolTuner(make_model(), replace(QUICK, seeds=32), link).load_state_dict(state)
        with PoolTuner(make_model(), QUICK, link) as tuner, pytest.raises(ConfigError, match=r"factor=1\.5"):
            tuner.round(lambda step: 0.0, 1.5)

    thinwire.run(1, member)


def test_members_whose_sums_differ_are_told():
    """The context of a packet is that of the sums before it."""

    def member(link):
        model = make_model()
        with PoolTuner(model, replace(QUICK, share=1.0), link) as tuner:
            if link.rank:
                tuner.pool = tuner.pool.add(torch.tensor([3]), torch.tensor([1.0]), 1.0)
            tuner.round(lambda step: loss_of(model, *batch(step, link.rank)))

    with pytest.raises(PacketError, match="context"):
        thinwire.run(2, member)


def test_a_member_that_tells_of_seeds_there_are_not_is_refused(monkeypatch):
    def member(link):
        model = make_model()
        with PoolTuner(model, replace(QUICK, share=1.0), link) as tuner:
            if link.rank:
                walk = tuner._walk
                tuner._walk = lambda *a: (walk(*a)[0] + 64, *walk(*a)[1:])
            tuner.round(lambda step: loss_of(model, *batch(step, link.rank)))

    with pytest.raises(DivergedError, match="round 0: a member told of seeds or scalars that there are not"):
        thinwire.run(2, member)


def test_the_log_is_the_model():
    def member(link):
        model = make_model()
        with PoolTuner(model, QUICK, link) as tuner:
            for _ in range(3):
                tuner.round(lambda step: loss_of(model, *batch(step, link.rank)))
            log = Log.from_bytes(tuner.log().to_bytes())
        base = dict(Tunable(make_model()).pairs)
        rebuild(base, log)
        for name, w in Tunable(model).pairs:
            assert torch.equal(base[name], w)

    thinwire.run(2, member)
