"""From closed rounds to updates: rules in the space of scalars, the agreed scale, and what a wild member can do."""

import math
import random
import struct
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinwire.errors import ConfigError
from thinwire.seeds.closed import Closed
from thinwire.seeds.codes import LOWEST
from thinwire.seeds.recipe import Recipe, State, seed_of
from thinwire.seeds.rules import RULES, SGD, Adam, Memory, Momentum, parse
from thinwire.seeds.scale import Scale
from thinwire.seeds.updates import Update

N = 24  # parameters of the test's model


def direction(seed: int) -> torch.Tensor:
    """A stand-in for z(seed).  float64 [N]"""
    return torch.randint(0, 2, (N,), generator=torch.Generator().manual_seed(seed >> 1)).double() * 2 - 1


def closed(number: int, recipe: Recipe, state: State, told: dict[int, list[float]], lr: float = 0.5) -> Closed:
    codes = {m: recipe.encode(g, state, number, m).numpy().tobytes() for m, g in told.items()}
    return Closed(number, lr, codes)


def walk(recipe: Recipe, rounds: list[dict[int, list[float]]], lr: float = 0.5) -> tuple[State, list[Update]]:
    """The state and the updates after rounds in which members have these scalars."""
    state, updates = recipe.start(), []
    for number, told in enumerate(rounds):
        state, update = recipe.step(state, closed(number, recipe, state, told, lr))
        updates.append(update)
    return state, updates


def normal(seed: int, rounds: int = 12, members: int = 2, samples: int = 3, scale: float = 1.0):
    drawn = random.Random(seed)
    return [
        {member: [drawn.gauss(0, scale) for _ in range(samples)] for member in range(members)} for _ in range(rounds)
    ]


def moved(updates: list[Update]) -> torch.Tensor:
    """Where the updates take a model of zeros, in float64."""
    w = torch.zeros(N, dtype=torch.float64)
    for update in updates:
        for seed, c in zip(update.seeds, update.scalars, strict=True):
            w -= c * direction(seed)
    return w


WHOLE = Recipe(seed=3, samples=3, code="whole", clip=None)


# Rules ---------------------------------------------------------------------------------------------------------------


def test_sgd_is_the_mean_along_the_members_directions():
    rounds = normal(1)
    _, updates = walk(WHOLE, rounds)
    for number, (told, update) in enumerate(zip(rounds, updates, strict=True)):
        pairs = [(seed_of(3, number, m, s), g) for m, scalars in told.items() for s, g in enumerate(scalars)]
        assert update.seeds == tuple(seed for seed, _ in pairs)
        assert update.scalars == pytest.approx([0.5 * g / 6 for _, g in pairs], rel=2**-22)
        assert (update.round, update.keep) == (number, 1.0)
        assert all(struct.unpack("<f", struct.pack("<f", c))[0] == c for c in update.scalars)


def test_momentum_with_all_rounds_is_ordinary_momentum():
    """Within float32: each of at most 72 scalars is rounded once to float32 in the code and once in the update."""
    rounds = normal(2)
    _, updates = walk(replace(WHOLE, rule="momentum(0.9, window=1000)"), rounds)
    w, m, size = torch.zeros(N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64), 0.0
    for plain in walk(WHOLE, rounds, lr=1.0)[1]:
        m = 0.9 * m - moved([plain])  # moved() goes against the gradient
        w -= 0.5 * m
        size += 0.5 * sum(map(abs, plain.scalars)) / (1 - 0.9)
    assert torch.allclose(moved(updates), w, rtol=0, atol=size * 2**-23)
    assert not torch.allclose(moved(updates), moved(walk(WHOLE, rounds)[1]), rtol=0, atol=0.1)


def test_momentum_forgets_what_leaves_the_window():
    rounds = normal(3)
    _, updates = walk(replace(WHOLE, rule="momentum(0.5, window=2)"), rounds)
    _, plain = walk(WHOLE, rounds)
    for number, update in enumerate(updates):
        before = plain[number - 1] if number else Update((), ())
        assert update.seeds == before.seeds + plain[number].seeds
        assert update.scalars == pytest.approx([c / 2 for c in before.scalars] + [*plain[number].scalars], rel=2**-22)


@pytest.mark.parametrize(("words", "rounds"), [("momentum(0.9)", 30), ("momentum(0.5)", 6), ("adam", 30)])
def test_the_window_is_three_over_what_is_lost(words, rounds):
    _, updates = walk(replace(WHOLE, rule=words), normal(4, rounds=rounds + 5))
    assert [len(update.seeds) for update in updates] == [6 * min(rounds, n) for n in range(1, rounds + 6)]


def test_adam_with_all_rounds_is_adam_with_one_second_moment():
    rounds = normal(5)
    _, updates = walk(replace(WHOLE, rule="adam(0.8, 0.9, window=1000)"), rounds)
    w = torch.zeros(N, dtype=torch.float64)
    m, v, reach = torch.zeros(N, dtype=torch.float64), 0.0, 0.0
    for t, (plain, told) in enumerate(zip(walk(WHOLE, rounds, lr=1.0)[1], rounds, strict=True), start=1):
        squares = [g * g for scalars in told.values() for g in scalars]
        m = 0.8 * m - 0.2 * moved([plain])
        v = 0.9 * v + 0.1 * sum(squares) / len(squares)
        step = 0.5 / (1 - 0.8**t) / (math.sqrt(v / (1 - 0.9**t)) + 1e-8)
        w -= step * m
        reach += step * sum(map(abs, plain.scalars)) * t
    assert torch.allclose(moved(updates), w, rtol=0, atol=reach * 2**-22)


def test_adam_goes_as_far_whatever_the_loss_is_multiplied_by():
    small, large = (
        walk(replace(WHOLE, rule="adam(epsilon=1e-12)"), normal(6, scale=scale))[1] for scale in (1.0, 1024.0)
    )
    for one, other in zip(small, large, strict=True):
        assert other.scalars == pytest.approx(one.scalars, rel=1e-6)


def test_adams_other_options_count():
    found = {
        words: walk(replace(WHOLE, rule=words), normal(7))[1][-1].scalars
        for words in ("adam", "adam(0.5)", "adam(0)", "adam(0.9, 0.5)", "adam(epsilon=1)", "adam(0.9, 0)")
    }
    assert len(set(found.values())) == 6
    assert len(found["adam(0)"]) == 6  # no window without a first moment


def test_rules_of_all_zeros_stand_still():
    for words in RULES:
        _, updates = walk(replace(WHOLE, rule=words), [{0: [0.0] * 3}] * 3)
        assert set(updates[-1].scalars) == {0.0}


@pytest.mark.parametrize("rule", [SGD(), Momentum(), Momentum(0.5, 7), Adam(), Adam(0, 0.5, epsilon=1e-3)])
def test_rules_are_spelled_as_they_are_read(rule):
    assert parse(rule.spec) == rule


def test_rules_are_pure():
    pairs = ((1, 0.5), (2, -0.25))
    for rule in (SGD(), Momentum(), Adam()):
        memory = rule.step(Memory(), pairs, 2)[0]
        assert rule.step(memory, pairs, 2) == rule.step(memory, pairs, 2)


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        ("momentum(1)", "momentum: beta = 1"),
        ("momentum(0)", "momentum: beta = 0"),
        ("momentum('x')", "momentum: beta = 'x'"),
        ("momentum(0.9, 0)", "momentum: window = 0"),
        ("momentum(0.9, 2.5)", "momentum: window = 2.5"),
        ("adam(-1)", "adam: beta1 = -1"),
        ("adam(0.9, 1)", "adam: beta2 = 1"),
        ("adam(epsilon=0)", "adam: epsilon = 0"),
        ("adam(window=True)", "adam: window = True"),
        ("'sgd'", "\"'sgd'\" is no rule"),
        ("sdg", "no rule is called 'sdg'"),
    ],
)
def test_what_is_no_rule(words, wrong):
    with pytest.raises(ConfigError) as caught:
        parse(words)
    assert caught.value.wrong == wrong


# What counts ---------------------------------------------------------------------------------------------------------


def test_who_abstains_does_not_count():
    recipe = replace(WHOLE, samples=2)
    _, [update] = walk(recipe, [{0: [1.0, math.nan], 4: [math.inf, math.nan], 9: [2.0, 4.0]}])
    assert update.seeds == (seed_of(3, 0, 0, 0), seed_of(3, 0, 9, 0), seed_of(3, 0, 9, 1))
    assert update.scalars == pytest.approx([0.5 / 3, 1 / 3, 2 / 3])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("told", [{}, {0: [math.nan] * 3}])
def test_a_round_in_which_nobody_counts_changes_nothing(rule, told):
    recipe = replace(WHOLE, rule=rule, decay=0.1)
    before, _ = walk(recipe, normal(8))
    after, update = recipe.step(before, closed(12, recipe, before, told))
    assert after == before
    assert update == Update((), (), keep=1.0, round=12)


def test_members_count_in_ascending_order_whatever_the_order_of_arrival():
    told = {7: [1.0] * 3, 0: [2.0] * 3, 3: [3.0] * 3}
    state = WHOLE.start()
    codes = {m: WHOLE.encode(g, state, 0, m).numpy().tobytes() for m, g in told.items()}
    orders = [dict(sorted(codes.items(), key=lambda item: item[0] * sign)) for sign in (1, -1)]
    updates = [WHOLE.step(state, Closed(0, 0.5, order))[1] for order in orders]
    assert updates[0] == updates[1]
    assert updates[0].scalars[0] == pytest.approx(0.5 * 2 / 9)


def test_division_by_the_root():
    rounds = normal(9)
    mean, root = (walk(replace(WHOLE, divide=how), rounds)[1][0].scalars for how in ("count", "root"))
    assert root == pytest.approx([c * math.sqrt(6) for c in mean])


def test_decay_takes_lr_times_it():
    _, [update] = walk(replace(WHOLE, decay=0.125), [{0: [1.0] * 3}], lr=0.5)
    assert update.keep == 1 - 0.0625
    assert walk(replace(WHOLE, decay=100.0), [{0: [1.0] * 3}])[1][0].keep == 0.0


def test_a_learning_rate_beyond_float32_is_cut_and_not_infinite():
    _, [update] = walk(WHOLE, [{0: [1e38] * 3}], lr=1e38)
    assert set(update.scalars) == {3.4028234663852886e38}


def test_seeds_differ_in_all_that_makes_them():
    seeds = {seed_of(*parts) for parts in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]}
    assert len(seeds) == 5
    assert seed_of(7, 3, 1, 2) == 0xC9A9C06F2E6E3E2D  # it is not to change


# The scale -----------------------------------------------------------------------------------------------------------

BYTES = Recipe(seed=1, samples=1, exponent=12)


def exponents(recipe: Recipe, scales: list[float], wild: float | None = None, members: int = 4) -> list[int]:
    """E before each round of members whose scalars have these deviations; member 0 always says `wild`, if given."""
    drawn, state, found = random.Random(0), recipe.start(), []
    for number, scale in enumerate(scales):
        told = {member: [drawn.gauss(0, scale) for _ in range(recipe.samples)] for member in range(members)}
        if wild is not None:
            told[0] = [wild] * recipe.samples
        state, _ = recipe.step(state, closed(number, recipe, state, told))
        found.append(state.scale.exponent)
    return found


@given(st.lists(st.floats(1e-8, 1e8), min_size=1, max_size=80))
def test_the_top_is_16_to_32_times_the_median(magnitudes):
    scale, median = Scale(12).after(magnitudes, LOWEST)
    assert median == sorted(magnitudes)[(len(magnitudes) - 1) // 2]
    assert 16 * median < 2.0**scale.exponent <= 32 * median


def test_the_scale_finds_the_scalars_and_follows_them_up_and_down():
    """Deviations of 2^-10 have a median of 0.67 of that, which wants E = -6, or by chance one beside it."""
    found = exponents(replace(BYTES, samples=4), [2.0**-10] * 10 + [2.0**10] * 20 + [2.0**-10] * 20)
    assert found[0] == 12 - 11  # nothing reaches the byte's lowest level
    assert {*found[4:10]} <= {-7, -6, -5}
    assert {*found[25:30]} <= {13, 14, 15}
    assert {*found[45:50]} <= {-7, -6, -5}


def test_a_scale_that_is_far_off_moves_by_5_up_and_11_down():
    assert Scale(3).after([8.0] * 16 + [0.0] * 16, LOWEST)[0].exponent == 3 - 11
    assert Scale(3).after([8.0] * 17 + [0.0] * 16, LOWEST)[0].exponent == 3 + 5


def test_what_is_remembered_of_scalars():
    """No more rounds than hold 32 scalars; a large round alone."""
    scale = Scale(0)
    for _ in range(9):
        scale, _ = scale.after([1.0] * 10, LOWEST)
        assert sum(map(len, scale.seen)) <= 40
    assert len(scale.seen) == 4
    assert len(scale.after([1.0] * 99, LOWEST)[0].seen) == 1


def test_the_scale_stops_at_its_least():
    zeros = [0.0] * 9
    assert exponents(BYTES, zeros)[-1] == -20
    assert exponents(replace(BYTES, least=8), zeros)[-1] == 8


def test_few_scalars_a_round_are_gathered():
    """One member with one scalar: E rests, since 32 of them make the median and not the last one."""
    settled = exponents(BYTES, [1.0] * 80, members=1)[40:]
    assert {*settled} <= {4, 5}


@pytest.mark.parametrize("wild", [1e9, -1e9, 0.0, math.nan])
@pytest.mark.parametrize("code", ["byte", "half", "whole"])
def test_one_of_four_cannot_drive_the_scale(wild, code):
    """It rests within one of where it is without it, however long it lasts."""
    recipe = replace(BYTES, samples=4, code=code)
    honest = exponents(recipe, [1.0] * 40)[8:]
    found = exponents(recipe, [1.0] * 40, wild)[8:]
    assert min(honest) - 1 <= min(found)
    assert max(found) <= max(honest) + 1


# Robust bounds -------------------------------------------------------------------------------------------------------


def harm(recipe: Recipe, rounds: int = 40, lr: float = 0.5) -> tuple[float, float]:
    """How far one of four that always says the top moves an entry by its own scalars, and what is promised at most."""
    drawn, state, far, promised = random.Random(2), recipe.start(), 0.0, 0.0
    for number in range(rounds):
        told = {member: [drawn.gauss(0, 1.0) for _ in range(4)] for member in range(1, 4)}
        told[0] = [1e9] * 4
        round_ = closed(number, recipe, state, told, lr)
        honest = sorted(abs(g) for scalars in list(recipe.decode(state, round_).values())[1:] for g in scalars)
        state, update = recipe.step(state, round_)
        mine = {seed_of(recipe.seed, number, 0, sample) for sample in range(4)}
        far += sum(abs(c) for seed, c in zip(update.seeds, update.scalars, strict=True) if seed in mine)
        promised += lr * (recipe.clip or math.inf) * honest[2 * len(honest) // 3] * 4 / 16
    return far, promised


def test_a_wild_member_of_four_is_bounded_by_the_others():
    """Its 4 of 16 scalars count for at most `clip` times what two thirds of the honest ones lie under."""
    recipe = replace(BYTES, samples=4)
    far, promised = harm(recipe)
    assert 0.3 * promised < far <= promised
    assert harm(replace(recipe, clip=3.0))[0] < 0.6 * far
    assert harm(replace(recipe, clip=None))[0] > 2 * far  # 16 to 32 medians, as far as the byte reaches
    assert harm(replace(recipe, trim=0.25))[0] == 0.0  # its scalars are always the largest


def test_the_first_round_is_bounded_as_well():
    recipe = replace(BYTES, samples=1)
    _, [update] = walk(recipe, [{0: [1e9], 1: [1.0], 2: [-2.0], 3: [0.5]}])
    assert abs(update.scalars[0]) <= 0.5 * 6 * 1.1 / 4  # the lower median of the four is 1.0, as a byte


def test_clip_leaves_others_alone():
    rounds = normal(10, rounds=30)
    assert walk(replace(WHOLE, clip=1e6), rounds) == walk(WHOLE, rounds)
    assert walk(replace(WHOLE, clip=1.0), rounds)[1] != walk(WHOLE, rounds)[1]


def test_trim_drops_the_largest_and_divides_by_the_rest():
    recipe = replace(WHOLE, samples=5, trim=0.4)
    _, [update] = walk(recipe, [{0: [1.0, -5.0, 2.0, 5.0, -3.0]}])
    assert update.seeds == tuple(seed_of(3, 0, 0, sample) for sample in (0, 2, 4))
    assert update.scalars == pytest.approx([0.5 / 3, 1.0 / 3, -1.5 / 3])


# The recipe ----------------------------------------------------------------------------------------------------------


def test_a_recipe_as_a_dict_and_back():
    recipe = Recipe(seed=2**64 - 1, samples=4, rule="adam(0.5)", code="half", clip=None, decay=0.1, rounding="nearest")
    assert Recipe.from_dict(recipe.as_dict()) == recipe
    assert Recipe.from_dict({"seed": 5}) == Recipe(seed=5)
    told = Recipe(rule="momentum(0.5)", noise=" rademacher()").as_dict()
    assert (told["rule"], told["noise"]) == ("momentum(beta=0.5, window=6)", "rademacher")


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (
            {"seed": -1},
            "recipe: seed=-1\n  expected  a whole number of at most 64 bits, not negative\n  mend      seed=0",
        ),
        ({"samples": 0}, "recipe: samples=0"),
        ({"samples": 1.5}, "recipe: samples=1.5"),
        ({"eps": 0}, "recipe: eps=0"),
        ({"noise": 3}, "recipe: noise=3"),
        ({"noise": "white"}, "no kind of noise is called 'white'"),
        ({"rule": "sdg"}, "no rule is called 'sdg'"),
        ({"code": "bite"}, "no code is called 'bite'"),
        ({"clip": math.inf}, "recipe: clip=inf"),
        ({"trim": 0.5}, "recipe: trim=0.5"),
        ({"divide": "half"}, "recipe: divide='half'"),
        ({"decay": math.nan}, "recipe: decay=nan"),
        ({"rounding": "up"}, "recipe: rounding='up'"),
        ({"exponent": 61}, "recipe: exponent=61"),
        ({"least": -61}, "recipe: least=-61"),
        ({"epsilon": 1}, "a recipe with 'epsilon'"),
    ],
)
def test_what_is_no_recipe(told, said):
    with pytest.raises(ConfigError) as caught:
        Recipe.from_dict(told)
    assert str(caught.value).startswith(said)


def test_a_member_that_says_too_much_is_refused():
    said = "member 5 said 4 bytes in round 0\n  expected  3 bytes: samples=3 in code=byte"
    recipe = replace(WHOLE, code="byte")
    with pytest.raises(ConfigError) as caught:
        recipe.step(recipe.start(), Closed(0, 0.5, {1: bytes(3), 5: bytes(4)}))
    assert str(caught.value).startswith(said)
