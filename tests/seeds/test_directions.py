"""Operations along directions: exactly what is written down, whatever the tensors and however they are cut."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_directions import applied, binomial, rademacher

from thinwire.errors import ConfigError
from thinwire.seeds import philox, replay, rounding
from thinwire.seeds.directions import apply_, apply_all_, combined, perturbed, perturbed_all, perturbed_rows, project
from thinwire.seeds.noise import Binomial, Rademacher, Sparse
from thinwire.seeds.updates import Update

EPS = 2.0**-10
SHAPES = [(), (1,), (7,), (128,), (129,), (3, 5), (4, 32), (2, 3, 43), (0,), (5, 0)]
KINDS = [(Rademacher(), rademacher), (Binomial(), binomial)]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def update(count, *, keep=1.0, round=0, first=0):
    scalars = (randn(count, seed=first + count) * 2.0**-6).tolist()
    return Update(tuple(range(first, first + count)), tuple(scalars), keep, round)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "z"), KINDS)
def test_perturbed_is_the_sum(shape, kind, z):
    w = randn(*shape)
    before = w.clone()
    expected = w + EPS * torch.from_numpy(z(9, "w", w.numel())).view(shape)
    assert torch.equal(perturbed(w, 9, "w", EPS, kind), expected)
    assert torch.equal(w, before)
    back = w - EPS * torch.from_numpy(z(9, "w", w.numel())).view(shape)
    assert torch.equal(perturbed(w, 9, "w", -EPS, kind), back)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_perturbed_in_half_precision_is_rounded_once(dtype):
    w = randn(300).to(dtype)
    expected = w.float() + EPS * torch.from_numpy(rademacher(9, "w", 300))
    assert torch.equal(perturbed(w, 9, "w", EPS), expected.to(dtype))
    wide = torch.empty(300)
    assert perturbed(w, 9, "w", EPS, out=wide) is wide
    assert torch.equal(wide, expected), "rounded to what it is written to"


def test_name_seed_size_and_kind_all_count():
    w = torch.zeros(64)
    seen = [
        perturbed(w, 1, "w", EPS),
        perturbed(w, 2, "w", EPS),
        perturbed(w, 1, "v", EPS),
        perturbed(w, 1, "w", 2 * EPS),
        perturbed(w, 1, "w", EPS, Binomial()),
    ]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(seen, 2))


@pytest.mark.parametrize("kind", [Rademacher(), Binomial()])
@pytest.mark.parametrize("width", [1, 3, 32, 128, 200])
def test_rows_are_rows_of_the_whole(kind, width):
    w = randn(40, width)
    rows = torch.tensor([39, 0, 7, 7, 13])
    assert torch.equal(perturbed_rows(w, rows, 4, "w", EPS, kind), perturbed(w, 4, "w", EPS, kind)[rows])


def test_rows_in_several_pieces_and_of_other_shapes(monkeypatch):
    monkeypatch.setattr("thinwire.seeds.directions.BATCH", 5)
    rows = torch.tensor([3, 1, 2, 0, 3, 3, 1], dtype=torch.int32)
    for w in (randn(4, 50), randn(4, 3, 7), randn(4), randn(4, 50).bfloat16(), randn(50, 4).T):
        assert torch.equal(perturbed_rows(w, rows, 4, "w", EPS), perturbed(w, 4, "w", EPS)[rows])
    assert perturbed_rows(randn(4, 5), rows[:0], 4, "w", EPS).shape == (0, 5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("counts", [(1,), (7,), (8,), (9, 3), (16, 1, 20)])
def test_updates_follow_the_contract(shape, counts):
    w = randn(*shape)
    updates = [update(count, keep=0.5 + place / 8, round=place) for place, count in enumerate(counts)]
    expected = applied(w, "w", updates)
    apply_(w, "w", updates)
    assert torch.equal(w, expected)


def test_updates_of_binomial_noise_follow_the_contract():
    """Scalars of 16 significant bits, so that the contract's rounding of them changes nothing."""
    w, told = randn(3, 50), Update((1, 2, 3), (0.5, -0.125, 2.0**-7), 0.75)
    expected = applied(w, "w", [told], binomial)
    apply_(w, "w", [told], Binomial())
    assert torch.equal(w, expected)


@settings(max_examples=25, deadline=None)
@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=5), n=st.integers(1, 400))
def test_one_pass_is_one_update_after_the_other(counts, n):
    updates = [update(count, keep=0.875, round=place, first=50 * place) for place, count in enumerate(counts)]
    for w in (randn(n), randn(n, 1), randn(n).bfloat16(), randn(n, 1).half()):
        one = w.clone()
        apply_(w, "w", updates, key=3)
        for each in updates:
            apply_(one, "w", [each], key=3)
        assert torch.equal(w, one)


def test_zeros_are_left_out_before_groups_are_made():
    seeds, scalars = tuple(range(20)), (0.0, *update(19).scalars)
    some, others = randn(100), randn(100)
    apply_(some, "w", [Update(seeds, scalars)])
    apply_(others, "w", [Update(seeds[1:], scalars[1:])])
    assert torch.equal(some, others)
    apply_(some, "w", [Update((1,), (0.0,)), Update((), ()), Update((1, 2), (0.0, -0.0), 0.5)])
    assert torch.equal(some, others), "nothing to do, and biases do not decay"
    matrix = others.view(10, 10).clone()
    apply_(matrix, "w", [Update((1,), (0.0,), 0.5)])
    assert torch.equal(matrix, others.view(10, 10) * 0.5), "matrices do"


#: What the library is free to choose: none of it may show. Module, name, value.
CHOICES = [
    (replay, "_BLOCK", 256),
    (replay, "DRAWN", 8),
    (replay, "BATCH", 8),
    (replay, "_FEWEST", 1000),
    (replay, "_BLOCK", 1 << 20),
]


@pytest.mark.parametrize(("module", "name", "value"), CHOICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_blocks_of_any_size_give_the_same(module, name, value, dtype, monkeypatch):
    pairs = [("a", randn(3000).to(dtype)), ("b", randn(40, 77).to(dtype)), ("c", randn(5).to(dtype))]
    others = [(name, w.clone()) for name, w in pairs]
    updates = [update(20, keep=0.75, round=1), update(9, round=2, first=30)]
    apply_all_(pairs, updates, key=5)
    moved = perturbed_all(pairs, 4, EPS)
    along = [project(w, name, range(40)) for name, w in pairs]
    monkeypatch.setattr(module, name, value)
    apply_all_(others, updates, key=5)
    for (_, one), (_, other) in zip(pairs, others, strict=True):
        assert torch.equal(one, other)
    assert all(map(torch.equal, moved, perturbed_all(pairs, 4, EPS)))
    for (name_, w), sums in zip(pairs, along, strict=True):  # float32 sums of other blocks
        torch.testing.assert_close(project(w, name_, range(40)), sums, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [Rademacher(), Binomial(), Sparse(0.5)])
def test_the_way_of_other_devices_gives_the_same(dtype, kind, monkeypatch):
    pairs = [(f"blocks.{i}.w", w.to(dtype)) for i, w in enumerate([randn(3000), randn(40, 77), randn(5), randn()])]
    others = [(name, w.clone()) for name, w in pairs]
    updates = [update(20, keep=0.75, round=1), update(9, round=2, first=30)]
    apply_all_(pairs, updates, kind, key=5)
    moved = perturbed_all(pairs, 4, EPS, kind)
    rows = perturbed_rows(pairs[1][1], torch.tensor([3, 9]), 4, "w", EPS, kind)
    along = project(pairs[1][1], "w", range(9), kind)
    for module in (philox, replay):
        monkeypatch.setattr(module, "on_host", lambda device: False)
    monkeypatch.setattr("thinwire.seeds.directions.on_host", lambda device: False)
    apply_all_(others, updates, kind, key=5)
    for (_, one), (_, other) in zip(pairs, others, strict=True):
        assert torch.equal(one, other)
    assert all(map(torch.equal, moved, perturbed_all(pairs, 4, EPS, kind)))
    assert torch.equal(perturbed_rows(pairs[1][1], torch.tensor([3, 9]), 4, "w", EPS, kind), rows)
    torch.testing.assert_close(project(pairs[1][1], "w", range(9), kind), along, rtol=0, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device to compare with")
def test_a_gpu_gives_the_same():
    updates = [update(20, keep=0.75, round=1), update(9, round=2, first=30)]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        w = randn(300, 301).to(dtype)
        far = w.cuda()
        assert torch.equal(perturbed(far, 4, "w", EPS).cpu(), perturbed(w, 4, "w", EPS))
        apply_(far, "w", updates, key=5)
        apply_(w, "w", updates, key=5)
        assert torch.equal(far.cpu(), w)


def test_threads_give_the_same(monkeypatch):
    monkeypatch.setattr(replay, "_FEWEST", 1000)
    w, threads = randn(200, 333), torch.get_num_threads()
    one, updates = w.clone(), [update(20, keep=0.75), update(3, first=30)]
    seeds = list(range(10))
    try:
        torch.set_num_threads(1)
        apply_(one, "w", updates)
        torch.set_num_threads(3)
        apply_(w, "w", updates)
        assert torch.equal(perturbed(w, 1, "w", EPS), w + EPS * combined(w, "w", [1], [1.0]))
        several = project(w, "w", seeds)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(w, one)
    torch.testing.assert_close(several, project(w, "w", seeds), rtol=0, atol=1e-2)


def test_several_tensors_are_each_by_itself():
    """Of all kinds that do not share a span: small and large, matrices and vectors, of several dtypes."""
    pairs = [(f"p{i}", randn(*shape, seed=i)) for i, shape in enumerate([*SHAPES, (70_000,), (300, 300)])]
    pairs += [(f"h{i}", w.bfloat16()) for i, (_, w) in enumerate(pairs)]
    others = [(name, w.clone()) for name, w in pairs]
    moved = perturbed_all(pairs, 4, EPS)
    for (name, w), after in zip(pairs, moved, strict=True):
        assert torch.equal(after, perturbed(w, 4, name, EPS))
        assert after.dtype == w.dtype
    updates = [update(9, keep=0.75, round=3), update(2, first=20)]
    apply_all_(pairs, updates, key=8)
    for (_, together), (name, alone) in zip(pairs, others, strict=True):
        apply_(alone, name, updates, key=8)
        assert torch.equal(together, alone), name


def test_memory_of_any_layout():
    """Elements count row by row, as they are read, not as they lie in memory."""
    base, updates = randn(30, 40), [update(9, keep=0.75)]
    for view in (base.T, base[:, ::2], base[3:20, 1:], base.T[::3]):
        dense = view.clone(memory_format=torch.contiguous_format)
        assert not view.is_contiguous()
        assert torch.equal(perturbed(view, 1, "w", EPS), perturbed(dense, 1, "w", EPS))
        assert torch.equal(project(view, "w", [1, 2]), project(dense, "w", [1, 2]))
        out = torch.zeros(40, 30).T if view.shape == (30, 40) else torch.zeros(view.T.shape).T
        assert torch.equal(perturbed(view, 1, "w", EPS, out=out), perturbed(dense, 1, "w", EPS))
        around = base.clone()
        apply_(view, "w", updates)
        apply_(dense, "w", updates)
        assert torch.equal(view, dense)
        assert int((base != around).sum()) <= view.numel(), "what is not in the view stays"


def test_parameters_that_want_gradients_are_changed_in_place():
    p = torch.nn.Parameter(randn(5, 5))
    before = p.data_ptr()
    apply_(p, "w", [update(3)])
    assert p.data_ptr() == before
    assert p.grad_fn is None
    assert not perturbed(p, 1, "w", EPS).requires_grad
    assert not perturbed_rows(p, torch.tensor([1]), 1, "w", EPS).requires_grad
    assert not project(p, "w", [1]).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once_an_update(dtype):
    w = randn(100, 3).to(dtype)
    updates = [update(12, keep=0.75), update(5, first=20)]
    expected = w.clone()
    for each in updates:
        expected = applied(expected.float(), "w", [each]).to(dtype)
    apply_(w, "w", updates, rounding="nearest")
    assert torch.equal(w, expected)


@pytest.mark.parametrize(("dtype", "low", "step"), [
    (torch.bfloat16, 1.0, 2.0**-7),
    (torch.bfloat16, -1.0, 2.0**-7),
    (torch.float16, 1.0, 2.0**-10),
    (torch.float16, -1.0, 2.0**-10),
    (torch.float16, 2.0**-15, 2.0**-24),
    (torch.float16, -(2.0**-20), 2.0**-24),
    (torch.float16, 0.0, 2.0**-24),
])  # fmt: skip
def test_rounding_at_random_is_right_in_the_mean(dtype, low, step):
    """Up with probability p, for parts p of a step: 4 sigma of the share, and never further than a neighbour."""
    n = 20_000
    for part in (0.0, 2.0**-8, 0.25, 0.8125):
        sign = -1.0 if low < 0 else 1.0
        x = torch.full((n,), low + sign * part * step)
        rounding.stochastic(x, dtype, philox.words(3, 4, 0, n // 2, stream=1), (torch.empty(n), torch.empty(n)))
        assert torch.equal(x.to(dtype).float(), x), "a number of the dtype"
        assert set(x.tolist()) <= {low, low + sign * step}
        up = float((x != low).double().mean())
        assert abs(up - part) <= 4 * (part * (1 - part) / n) ** 0.5


def test_rounding_leaves_what_is_no_number():
    wild = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0])
    for dtype in (torch.float16, torch.bfloat16):
        x = wild.clone()
        rounding.stochastic(x, dtype, torch.full((3,), -1, dtype=torch.int32), (torch.empty(5), torch.empty(5)))
        assert torch.equal(x.nan_to_num(5.0, 6.0, 7.0), wild.nan_to_num(5.0, 6.0, 7.0))


def test_small_updates_survive_at_random_and_are_lost_to_nearest():
    w, tiny = torch.ones(50_000, dtype=torch.bfloat16), 2.0**-12
    nearest = w.clone()
    updates = [Update((0,), (tiny,), round=number) for number in range(16)]
    apply_(nearest, "w", updates, rounding="nearest")
    assert torch.equal(nearest, w)
    apply_(w, "w", updates, key=1)
    moved = float(project(w.float() - 1, "w", [0])) / len(w)
    assert moved == pytest.approx(-16 * tiny, rel=0.1)  # 16 steps of 1/32 or 1/16 of a unit: sigma is 3e-5 of 4e-3


def test_the_dice_follow_from_key_and_round():
    def after(key, number):
        w = torch.ones(500, dtype=torch.bfloat16)
        apply_(w, "w", [Update((0,), (2.0**-9,), round=number)], key=key)
        return w

    assert torch.equal(after(1, 1), after(1, 1))
    assert not torch.equal(after(1, 1), after(2, 1))
    assert not torch.equal(after(1, 1), after(1, 2))


def test_combined_is_the_sum_and_what_updates_take_away():
    seeds, scalars = list(range(20)), list(update(20).scalars)
    total = combined(torch.zeros(10, 13), "w", seeds, scalars)
    assert total.shape == (10, 13)
    assert torch.equal(combined(130, "w", seeds, scalars), total.view(-1))
    assert torch.equal(combined(130, "w", seeds[:8], scalars[:8]), -applied(
        torch.zeros(130), "w", [Update(tuple(seeds[:8]), tuple(scalars[:8]))]
    ))  # fmt: skip
    exact = sum(c * combined(130, "w", [seed], [1.0]).double() for seed, c in zip(seeds, scalars, strict=True))
    torch.testing.assert_close(total.view(-1).double(), exact, rtol=0, atol=20 * 2.0**-24)


def test_projections_are_inner_products():
    x, seeds = randn(70_000), list(range(40))
    exact = torch.stack([(combined(x, "w", [seed], [1.0]).double() * x.double()).sum() for seed in seeds])
    along = project(x, "w", seeds)
    assert along.dtype == torch.float64
    torch.testing.assert_close(along, exact, rtol=0, atol=70_000**0.5 * 2.0**-20)
    assert torch.equal(project(x, "w", seeds[::-1]), along.flip(0))
    torch.testing.assert_close(project(2 * x, "w", seeds), 2 * along, rtol=0, atol=0)
    assert project(x, "w", []).shape == (0,)


@pytest.mark.parametrize("n", [1, 5, 129])
def test_projections_of_half_precision_are_those_of_its_float32(n):
    x = randn(n).bfloat16()
    assert torch.equal(project(x, "w", range(20)), project(x.float(), "w", range(20)))


def test_projection_and_combination_are_each_others_transpose():
    """<x, sum c_i z_i> = sum c_i <x, z_i>; and z_i's own projection is n, exactly."""
    x, seeds, scalars = randn(33, 9), [3, 1, 4], [0.5, -2.0, 0.25]
    left = (x.double() * combined(x, "w", seeds, scalars).double()).sum()
    right = (project(x, "w", seeds) * torch.tensor(scalars, dtype=torch.float64)).sum()
    torch.testing.assert_close(left, right, rtol=0, atol=1e-4)
    assert float(project(combined(x, "w", [3], [1.0]), "w", [3])) == x.numel()
    quarters = combined(x, "w", [3], [1.0], Binomial())
    assert float(project(quarters, "w", [3], Binomial())) == float(quarters.double().square().sum())


@pytest.mark.parametrize("operation", [
    lambda w: perturbed(w, 1, "head", EPS),
    lambda w: perturbed_rows(w, torch.tensor([0]), 1, "head", EPS),
    lambda w: apply_(w, "head", []),
    lambda w: project(w, "head", [1]),
])  # fmt: skip
def test_other_dtypes_are_refused(operation):
    with pytest.raises(
        ConfigError, match=r"(?s)parameter 'head' is torch.float64.*float32, float16 or bfloat16.*float\(\)"
    ):
        operation(torch.zeros(3, 3, dtype=torch.float64))


@pytest.mark.parametrize("scalar", [0.1, float("nan"), float("inf"), 1e300])
def test_scalars_are_float32_numbers(scalar):
    told = rf"(?s)a scalar of {scalar}".replace("+", r"\+") + r".*float32 holds exactly.*numpy.float32\(scalar\)"
    with pytest.raises(ConfigError, match=told):
        apply_(torch.zeros(3), "w", [Update((1, 2), (0.5, scalar))])
    with pytest.raises(ConfigError, match=told):
        perturbed(torch.zeros(3), 1, "w", scalar)
    with pytest.raises(ConfigError, match=told):
        perturbed_rows(torch.zeros(3), torch.tensor([0]), 1, "w", scalar)
    with pytest.raises(ConfigError, match=told):
        apply_(torch.zeros(3, 3), "w", [Update((1,), (0.5,), scalar)])


def test_what_cannot_be_written_to_is_refused():
    w = torch.zeros(3, 2)
    with pytest.raises(ConfigError, match=r"(?s)'w', \[3, 2\] on cpu, is to be written to \[2, 3\].*torch.empty_like"):
        perturbed(w, 1, "w", EPS, out=torch.zeros(2, 3))
    with pytest.raises(ConfigError, match=r"(?s)0 tensors to write 1 to.*one each"):
        perturbed_all([("w", w)], 1, EPS, out=[])
    with pytest.raises(ConfigError, match=r"parameter 'w' is torch.int32"):
        perturbed(w, 1, "w", EPS, out=torch.zeros(3, 2, dtype=torch.int32))
    with pytest.raises(ConfigError, match=r"(?s)rounding='up'.*stochastic or nearest"):
        apply_(w, "w", [], rounding="up")
