"""The tuner: members hold one model, base and log are the model, and what a step does is what its card says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import thinwire
from thinwire.errors import ConfigError, DivergedError, PeerLost, StateMismatch
from thinwire.links.base import Link
from thinwire.links.local import alone
from thinwire.seeds.codes import float32
from thinwire.seeds.digests import digest
from thinwire.seeds.directions import apply_all_, combined
from thinwire.seeds.log import Closed, Log, updates
from thinwire.seeds.noise import Rademacher
from thinwire.seeds.recipe import Recipe, seed_of
from thinwire.seeds.tensors import Tunable
from thinwire.seeds.tuner import Tuner

LR = 0.02


def small_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def batch(step: int, member: int) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(1000 * step + member))


def loss_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    dtype = next(model.parameters()).dtype

    def loss(x: Tensor) -> Tensor:
        return (model(x.to(dtype)).float() - x[:, :3].roll(1, dims=1)).square().mean()

    return loss


def tuned(link: Link, recipe: Recipe, rounds: int, *, model: nn.Module | None = None, **options: object) -> dict:
    model = model or small_model()
    base = [(name, p.clone()) for name, p in Tunable(model).pairs]
    with thinwire.tune(model, recipe, link, **options) as tuner:
        steps = [tuner.step(loss_of(model), batch(r, link.rank), lr=LR) for r in range(rounds)]
    return {"model": model, "base": base, "log": tuner.log, "steps": steps, "tuner": tuner}


def weights(found: dict) -> list[Tensor]:
    return [p for _, p in Tunable(found["model"]).pairs]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


RECIPES = {
    "plain": thinwire.just_one_byte(),
    "several, momentum": thinwire.just_one_byte(samples=3, rule="momentum(0.9)", decay=0.1),
    "adam, trimmed": thinwire.just_one_byte(samples=2, rule="adam", trim=0.2),
    "sparse, half": thinwire.just_one_byte(samples=2, noise="sparse(0.5)", code="half"),
    "binomial, whole": thinwire.just_one_byte(noise="binomial", code="whole", clip=None),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("members", [1, 2, 4])
def test_members_agree_and_base_and_log_are_the_model(name, members):
    results = thinwire.run(members, lambda link: tuned(link, RECIPES[name], 8))
    first = results[0]
    assert all(same(weights(first), weights(each)) for each in results)
    assert all(each["log"].to_bytes() == first["log"].to_bytes() for each in results)
    assert not same(weights(first), [p for _, p in first["base"]])
    log = Log.from_bytes(first["log"].to_bytes())
    for name_, p in first["base"]:
        apply_all_(
            [(name_, p)], list(updates(log)), _noise(log.recipe), rounding=log.recipe.rounding, key=log.recipe.seed
        )
    assert same([p for _, p in first["base"]], weights(first))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_too(dtype):
    recipe = thinwire.just_one_byte(samples=2, eps=1e-2)
    results = thinwire.run(2, lambda link: tuned(link, recipe, 12, model=small_model(dtype)))
    first, second = results
    assert weights(first)[0].dtype == dtype
    assert same(weights(first), weights(second))
    apply_all_(first["base"], list(updates(first["log"])), Rademacher(), rounding=recipe.rounding, key=recipe.seed)
    assert same([p for _, p in first["base"]], weights(first))


@pytest.mark.parametrize("name", ["plain", "several, momentum", "adam, trimmed"])
def test_stop_and_resume_changes_nothing(name):
    whole = thinwire.run(2, lambda link: tuned(link, RECIPES[name], 10))

    def halves(link: Link) -> dict:
        before = tuned(link, RECIPES[name], 4)
        state, model = before["tuner"].state_dict(), small_model()
        model.load_state_dict(before["model"].state_dict())
        tuner = thinwire.tune(model, RECIPES[name], link)
        tuner.load_state_dict(state)
        with tuner:
            assert tuner.rounds == 4
            for r in range(4, 10):
                tuner.step(loss_of(model), batch(r, link.rank), lr=LR)
        return {"model": model, "log": tuner.log}

    resumed = thinwire.run(2, halves)
    assert same(weights(resumed[0]), weights(whole[0]))
    assert resumed[0]["log"].rounds == whole[0]["log"].rounds


def test_the_state_of_another_recipe_is_refused():
    found = tuned(alone(), RECIPES["plain"], 2)
    other = thinwire.tune(small_model(), thinwire.just_one_byte(eps=1e-2), alone())
    with pytest.raises(ConfigError, match="eps"):
        other.load_state_dict(found["tuner"].state_dict())


def test_the_weights_of_another_moment_are_refused():
    found = tuned(alone(), RECIPES["plain"], 2)
    other = thinwire.tune(small_model(), RECIPES["plain"], alone())
    with pytest.raises(ConfigError, match=r"tuned tensors have the digest [0-9a-f]{32}(?s:.)*after the log's 2 rounds"):
        other.load_state_dict(found["tuner"].state_dict())
    assert other.rounds == 0


def test_another_frozen_part_is_refused():
    def model(fill: float) -> nn.Module:
        made = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        for p in made.parameters():
            nn.init.constant_(p, fill)
        made[0].requires_grad_(False)
        return made

    one, other = model(1.0), model(2.0)
    other[1].load_state_dict(one[1].state_dict())
    state = thinwire.tune(one, RECIPES["plain"], alone()).state_dict()
    with pytest.raises(ConfigError, match="frozen tensors have the digest"):
        thinwire.tune(other, RECIPES["plain"], alone()).load_state_dict(state)


def test_members_with_another_frozen_part_are_refused():
    def work(link: Link) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        nn.init.constant_(model[0].requires_grad_(False).weight, float(link.rank))
        with thinwire.tune(model, RECIPES["plain"], link):
            pass

    with pytest.raises(ConfigError, match="frozen"):
        thinwire.run(2, work)


def test_a_round_out_of_order_changes_nothing():
    class Ahead:
        member = 0

        def meet(self, facts: object) -> tuple[Closed, ...]:
            return (Closed(1, LR, {0: b"\x5f"}),)

    model = small_model()
    before = Tunable(model).digest()
    with pytest.raises(ConfigError, match="round 1 in a log of 0 rounds"), Tuner(model, RECIPES["plain"], Ahead()):
        pass
    assert Tunable(model).digest() == before


def test_a_loss_that_fails_costs_nothing():
    """The step is made as if it had not been asked before."""

    def work(link: Link, fails: bool) -> list[Tensor]:
        model = small_model()
        loss = loss_of(model)
        with thinwire.tune(model, RECIPES["several, momentum"], link) as tuner:
            for r in range(4):
                if fails and r == 2 and link.rank == 1:
                    calls = iter(range(4))

                    def third(x: Tensor, calls: Iterator[int] = calls) -> Tensor:
                        if next(calls) == 3:
                            raise ValueError("no such row")
                        return loss(x)

                    with pytest.raises(ValueError, match="no such row"):
                        tuner.step(third, batch(r, link.rank), lr=LR)
                tuner.step(loss, batch(r, link.rank), lr=LR)
        return [p for _, p in Tunable(model).pairs]

    whole, (first, second) = (
        thinwire.run(2, lambda link: work(link, False)),
        thinwire.run(2, lambda link: work(link, True)),
    )
    assert same(first, second)
    assert same(first, whole[0])


# ---- what a step is


def test_the_mean_of_estimates_is_the_gradient_of_a_quadratic():
    """Relative error of the mean of M estimates: sqrt((d-1)/M) for entries of +-1, with their exact scalars."""
    d, m = 40, 1200
    target = torch.linspace(-1, 1, d)
    model = nn.Linear(d, 1, bias=False)
    with torch.no_grad():
        model.weight.zero_()

    def loss() -> Tensor:
        return (model.weight[0] - target).square().sum() / 2

    recipe = thinwire.just_one_byte(samples=m, code="whole", clip=None, eps=1e-2)
    with thinwire.tune(model, recipe, alone()) as tuner:
        scalars = tuner.step(loss, lr=0.0).scalars
    seeds = [seed_of(recipe.seed, 0, 0, s) for s in range(m)]
    mean = combined(model.weight.detach(), "weight", seeds, [float32(g / m) for g in scalars], Rademacher())[0]
    error = float((mean + target).norm() / target.norm())  # the gradient at 0 is -target
    expected = math.sqrt((d - 1) / m)
    assert 0.75 * expected < error < 1.25 * expected  # the error has d-1 degrees of freedom: 11 % of spread, times 2


def test_along_a_linear_loss_both_ways_to_a_scalar_agree():
    slope = torch.linspace(-2, 1, 12).view(2, 6)
    model = nn.Linear(6, 2, bias=False)

    def loss() -> Tensor:
        return (model.weight * slope).sum()

    recipe = thinwire.just_one_byte(samples=8, eps=0.5)
    told = [thinwire.tune(model, recipe, alone(), backward=way) for way in (False, True)]
    scalars = []
    for tuner in told:
        with tuner:
            scalars.append(tuner.step(loss, lr=0.0).scalars)
    assert scalars[0] == pytest.approx(scalars[1], rel=1e-4, abs=1e-4)
    assert any(scalars[0])


def test_one_round_moves_the_model_along_its_directions():
    found = tuned(alone(), thinwire.just_one_byte(samples=2, code="whole", clip=None), 1)
    (step,) = found["steps"]
    seeds = [seed_of(0, 0, 0, s) for s in range(2)]
    for name, before in found["base"]:
        moved = combined(before, name, seeds, [float32(LR * g / 2) for g in step.scalars], Rademacher())
        after = dict(Tunable(found["model"]).pairs)[name]
        torch.testing.assert_close(after, before - moved, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"eps": 0.5},
        {"samples": 2},
        {"seed": 1},
        {"code": "half"},
        {"rule": "adam"},
        {"decay": 0.5},
        {"noise": "binomial"},
        {"noise": "sparse(0.5)"},
        {"divide": "root", "samples": 2},
    ],
)
def test_every_setting_changes_the_result(change):
    usual = tuned(alone(), thinwire.just_one_byte(), 3)
    assert not same(weights(tuned(alone(), thinwire.just_one_byte(**change), 3)), weights(usual))


def test_members_may_take_their_scalars_from_a_gradient():
    def work(link: Link) -> dict:
        return tuned(link, thinwire.just_one_byte(samples=2), 6, backward=link.rank == 1)

    results = thinwire.run(2, work)
    assert same(weights(results[0]), weights(results[1]))
    plain = thinwire.run(2, lambda link: tuned(link, thinwire.just_one_byte(samples=2), 6))
    for mixed, usual in zip(weights(results[0]), weights(plain[0]), strict=True):
        torch.testing.assert_close(mixed, usual, rtol=0, atol=0.01)


def test_dropout_draws_the_same_on_both_sides():
    """With masks of their own the two losses would differ by far more than 2 eps times any slope."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5), nn.Linear(64, 1)).train()
    with thinwire.tune(model, thinwire.just_one_byte(samples=4, eps=1e-4), alone()) as tuner:
        scalars = tuner.step(lambda x: model(x).mean(), torch.ones(4, 6), lr=0.0).scalars
    assert max(map(abs, scalars)) < 100


def test_the_lowest_members_learning_rate_counts():
    def work(link: Link) -> dict:
        model = small_model()
        with thinwire.tune(model, thinwire.just_one_byte(), link) as tuner:
            closed = tuner.step(loss_of(model), batch(0, link.rank), lr=LR * (1 + link.rank)).closed
        return {"lr": closed.lr, "model": model}

    first, second = thinwire.run(2, work)
    assert first["lr"] == second["lr"] == pytest.approx(LR)
    assert same(weights(first), weights(second))


def test_it_learns():
    def work(link: Link) -> tuple[float, float]:
        model = small_model()
        test = batch(10_000, 0)
        before = float(loss_of(model)(test).detach())
        with thinwire.tune(model, thinwire.just_one_byte(samples=4, rule="adam"), link) as tuner:
            for r in range(60):
                tuner.step(loss_of(model), batch(r, link.rank), lr=0.05)
        return before, float(loss_of(model)(test).detach())

    (before, after), _ = thinwire.run(2, work)
    assert after < 0.7 * before


# ---- who is wild, silent or wrong


def test_a_member_without_a_finite_loss_abstains():
    def work(link: Link) -> dict:
        model = small_model()
        usual = loss_of(model)

        def loss(x: Tensor) -> Tensor:
            return usual(x) * (math.nan if link.rank == 1 else 1.0)

        with thinwire.tune(model, thinwire.just_one_byte(), link) as tuner:
            for r in range(5):
                tuner.step(loss, batch(r, link.rank), lr=LR)
        return {"model": model, "log": tuner.log}

    first, second = thinwire.run(2, work)
    assert same(weights(first), weights(second))
    assert all(closed.codes[1] == b"\x80" for closed in first["log"].rounds)
    assert same(weights(first), weights(tuned(alone(), thinwire.just_one_byte(), 5)))


def test_a_wild_member_counts_as_much_as_the_bound_says():
    recipe = thinwire.just_one_byte(clip=3.0)

    def work(link: Link, wild: float) -> dict:
        model = small_model()
        usual = loss_of(model)

        def loss(x: Tensor) -> Tensor:
            return usual(x) * (wild if link.rank == 3 else 1.0)

        with thinwire.tune(model, recipe, link) as tuner:
            steps = [tuner.step(loss, batch(r, link.rank), lr=LR) for r in range(20)]
        return {"model": model, "log": tuner.log, "steps": steps}

    honest, wild = (thinwire.run(4, lambda link, by=by: work(link, by))[0] for by in (1.0, 1e9))
    longest = max(abs(c) for update in updates(wild["log"]) for c in update.scalars)
    usual = max(abs(c) for update in updates(honest["log"]) for c in update.scalars)
    assert longest < 4 * usual
    assert all(bool(p.isfinite().all()) for p in weights(wild))


def test_nobody_finite_for_long_is_an_error():
    model = small_model()
    with thinwire.tune(model, thinwire.just_one_byte(), alone()) as tuner:

        def step() -> None:
            tuner.step(lambda: model(torch.ones(1, 6)).sum() * math.inf, lr=LR)

        for _ in range(19):
            step()
        with pytest.raises(DivergedError, match="no member had a finite loss for 20 rounds"):
            step()


@pytest.mark.parametrize(
    ("differs", "words"),
    [
        ("weights", "members disagree on base"),
        ("recipe", "members disagree on recipe"),
        ("model", "members disagree on"),
    ],
)
def test_members_that_differ_are_refused(differs, words):
    def work(link: Link) -> None:
        model, recipe = small_model(), thinwire.just_one_byte()
        if link.rank == 1 and differs == "weights":
            next(model.parameters()).data[0, 0] += 1
        if link.rank == 1 and differs == "model":
            model[0].requires_grad_(False)
        if link.rank == 1 and differs == "recipe":
            recipe = replace(recipe, eps=1e-2)
        with thinwire.tune(model, recipe, link):
            pass

    with pytest.raises(ConfigError, match=words):
        thinwire.run(2, work)


def test_weights_that_were_changed_are_found():
    def work(link: Link) -> None:
        model = small_model()
        with thinwire.tune(model, thinwire.just_one_byte(), link, compare_every=2) as tuner:
            for r in range(4):
                tuner.step(loss_of(model), batch(r, link.rank), lr=LR)
                if r == 2 and link.rank == 1:
                    model[0].weight.data[0, 0] += 1e-3

    with pytest.raises(StateMismatch, match="after round 4 the weights of member 1"):
        thinwire.run(3, work)


def test_comparisons_are_noted_in_the_log():
    found = tuned(alone(), thinwire.just_one_byte(), 5, compare_every=2)
    assert sorted(found["log"].checks) == [2, 4]
    found["tuner"].compare()
    assert found["tuner"].log.result == digest(Tunable(found["model"]).pairs)
    assert not tuned(alone(), thinwire.just_one_byte(), 5, compare_every=0)["log"].checks


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda tuner, model: tuner.step(lambda: 0.0, lr=-1.0), "lr=-1.0"),
        (lambda tuner, model: tuner.step(lambda: 0.0, lr=math.nan), "lr=nan"),
        (lambda tuner, model: tuner.step(lambda: 0.0, lr=0.1), "no tunable parameter was used"),
    ],
)
def test_calls_that_make_no_sense_are_refused(call, words):
    model = small_model()
    with thinwire.tune(model, thinwire.just_one_byte(), alone()) as tuner, pytest.raises(ConfigError, match=words):
        call(tuner, model)


def test_a_loss_without_a_gradient_is_refused_where_one_is_asked_for():
    model = small_model()
    with (
        thinwire.tune(model, thinwire.just_one_byte(), alone(), backward=True) as tuner,
        pytest.raises(ConfigError, match="no tensor with a gradient"),
    ):
        tuner.step(lambda: float(loss_of(model)(batch(0, 0))), lr=LR)


def test_running_statistics_are_refused_beside_gradients_too():
    model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))
    with (
        thinwire.tune(model, thinwire.just_one_byte(), alone(), backward=True) as tuner,
        pytest.raises(ConfigError, match=r"buffer '1\.\w+' changes"),
    ):
        tuner.step(loss_of(model), batch(0, 0), lr=LR)


def test_compare_every_is_checked():
    with pytest.raises(ConfigError, match="compare_every=-1"):
        thinwire.tune(small_model(), thinwire.just_one_byte(), alone(), compare_every=-1)


def test_a_lost_member_ends_the_run_and_the_log_stays():
    logs = {}

    def work(link: Link) -> None:
        model = small_model()
        with thinwire.tune(model, thinwire.just_one_byte(), link) as tuner:
            for r in range(6):
                if link.rank == 1 and r == 3:
                    raise RuntimeError("pulled the plug")
                logs[link.rank] = tuner.log
                tuner.step(loss_of(model), batch(r, link.rank), lr=LR)

    with pytest.raises(RuntimeError, match="pulled the plug"):
        thinwire.run(2, work)
    assert len(logs[0].rounds) == 3


def test_everything_that_is_told_is_a_byte_and_a_frame():
    def work(link: Link) -> int:
        tuned(link, thinwire.just_one_byte(samples=16), 3)
        return link.meter.by_purpose()["scalars"].sent_bytes

    rounds, members, frame = 3, 3, 92
    assert thinwire.run(members, work) == [rounds * (members - 1) * (16 + frame)] * members


def _noise(recipe: Recipe) -> object:
    from thinwire.seeds import noise

    return noise.parse(recipe.noise)


_ = PeerLost
