"""Kinds of z: what they are made of, their moments, and which layers sparse ones reach."""

from __future__ import annotations

import math

import pytest
import torch
from plain_directions import binomial, is_reached, rademacher

from thinwire.errors import ConfigError
from thinwire.seeds import noise, philox, replay
from thinwire.seeds.directions import apply_all_, combined, perturbed, perturbed_all, perturbed_rows, project
from thinwire.seeds.noise import NOISES, Binomial, Rademacher, Sparse, layer_of, parse
from thinwire.seeds.updates import Update

KINDS = [(Rademacher(), rademacher), (Binomial(), binomial)]
NAMES = ["embed.weight", *(f"blocks.{i}.{part}" for i in range(40) for part in ("w", "b"))]


def z_of(kind, seed, n, name="w"):
    return combined(n, name, [seed], [1.0], kind)


@pytest.mark.parametrize(("kind", "plain"), KINDS)
@pytest.mark.parametrize("n", [1, 2, 31, 128, 129, 300])
def test_entries_follow_their_definition(kind, plain, n):
    for seed in (0, 2**64 - 1):
        assert torch.equal(z_of(kind, seed, n, "über.0"), torch.from_numpy(plain(seed, "über.0", n)))


@pytest.mark.parametrize(("kind", "plain"), KINDS)
def test_both_ways_to_compute_give_the_same_entries(kind, plain, monkeypatch):
    on_processor = z_of(kind, 5, 70_000)
    for module in (philox, replay):
        monkeypatch.setattr(module, "on_host", lambda device: False)
    assert torch.equal(z_of(kind, 5, 70_000), on_processor)


def test_signs_are_signs():
    assert set(z_of(Rademacher(), 1, 10_000).tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("kind", [Rademacher(), Binomial()])
def test_moments_are_those_of_white_noise(kind):
    """E z = 0, E z z^T = I over seeds and over elements: 3 sigma of every mean, 4.5 where it is the largest of many."""
    seeds, n = range(4000), 16
    z = torch.stack([z_of(kind, seed, n) for seed in seeds]).double()
    error = 1 / math.sqrt(len(seeds))
    assert z.mean(dim=0).abs().max() < 4.5 * error
    covariance = z.T @ z / len(seeds)
    off = covariance - torch.diag(covariance.diagonal())
    assert off.abs().max() < 4.5 * error
    assert off.sum().abs() < 3 * error * math.sqrt(n * (n - 1) * 2)  # every pair stands there twice
    fourth = 3 - 1 / 32 if isinstance(kind, Binomial) else 1.0
    assert (covariance.diagonal() - 1).abs().max() <= 4.5 * error * math.sqrt(fourth - 1)
    long = z_of(kind, 1, 200_000).double()
    assert abs(long.mean()) < 3 / math.sqrt(len(long))
    assert abs((long[1:] * long[:-1]).mean()) < 3 / math.sqrt(len(long))
    assert abs((long * z_of(kind, 1, 200_000, "v").double()).mean()) < 3 / math.sqrt(len(long))
    assert abs((long**4).mean() - fourth) < 3 * math.sqrt(96 / len(long))  # the variance of a normal's fourth power


def test_binomial_is_in_quarters_and_its_products_are_exact():
    """The scalar is rounded to 16 significant bits, half to even; what remains of 24 holds the 7 bits of z's."""
    z = z_of(Binomial(), 3, 5000)
    assert torch.equal((z * 4).round(), z * 4)
    assert z.abs().max() <= 8
    one = 1.0
    for c, short in [
        (one + 2**-15, one + 2**-15),
        (one + 2**-16, one),
        (one + 3 * 2**-16, one + 2**-14),
        (one + 2**-16 + 2**-23, one + 2**-15),
        (-(one + 2**-16 + 2**-23), -(one + 2**-15)),
    ]:
        product = combined(5000, "w", [3], [c], Binomial())
        assert torch.equal(product.double(), z.double() * short)


def test_layers_are_names_up_to_the_first_number():
    assert layer_of("blocks.3.mlp.0.weight") == "blocks.3"
    assert layer_of("encoder.layer.11.output.dense.bias") == "encoder.layer.11"
    assert layer_of("0.weight") == "0"
    assert layer_of("conv12.a.3.weight") == "conv12"
    assert layer_of("embed.weight") == "embed.weight"
    assert layer_of("blocks.3") == "blocks.3", "a parameter whose own name is a number is no layer's"


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_a_sparse_seed_perturbs_whole_layers(share):
    kind = Sparse(share)
    for seed in (1, 2**63 + 5):
        tensors = [(name, torch.zeros(3)) for name in NAMES]
        for (name, _), after in zip(tensors, perturbed_all(tensors, seed, 0.5, kind), strict=True):
            reached = is_reached(seed, layer_of(name), share)
            expected = z_of(Rademacher(), seed, 3, name) * (0.5 if reached else 0.0)
            assert torch.equal(after, expected), name


def test_sparse_layers_are_a_share_of_all_and_their_draws_are_apart():
    kind, seeds = Sparse(0.3), range(2000)
    reached = torch.from_numpy(kind.reaches(seeds, [f"blocks.{i}.w" for i in range(20)])).double()
    error = math.sqrt(0.3 * 0.7)
    assert abs(reached.mean() - 0.3) < 3 * error / math.sqrt(reached.numel())
    assert (reached.mean(dim=0) - 0.3).abs().max() < 4 * error / math.sqrt(2000)
    assert torch.corrcoef(reached.T).fill_diagonal_(0).abs().max() < 4.5 / math.sqrt(2000)


def test_all_of_the_layers_is_no_sparsity():
    w = torch.randn(5, 7)
    assert torch.equal(perturbed(w, 3, "blocks.0.w", 0.5, Sparse(1.0)), perturbed(w, 3, "blocks.0.w", 0.5))
    assert Sparse(1.0).reaches(range(50), NAMES).all()


def test_operations_leave_alone_what_a_sparse_seed_leaves_alone():
    kind, name = Sparse(0.5), "blocks.0.w"
    out = next(seed for seed in range(99) if not is_reached(seed, "blocks.0", 0.5))
    within = next(seed for seed in range(99) if is_reached(seed, "blocks.0", 0.5))
    w = torch.randn(4, 6)
    assert perturbed(w, out, name, 0.5, kind).data_ptr() == w.data_ptr(), "nothing is copied"
    spare = torch.empty(4, 6, dtype=torch.bfloat16)
    assert torch.equal(perturbed(w, out, name, 0.5, kind, out=spare), w.bfloat16())
    rows = torch.tensor([3, 0])
    assert torch.equal(perturbed_rows(w, rows, out, name, 0.5, kind), w[rows])
    assert project(w, name, [out, within, out], kind).tolist() == [0.0, float(project(w, name, [within])), 0.0]
    both = combined(w, name, [out, within], [1.0, 2.0], kind)
    assert torch.equal(both, combined(w, name, [within], [2.0]))


def test_groups_are_made_of_the_scalars_that_reach_a_tensor():
    """Sums in float32 tell in what groups they were made: a sparse update is the update of the seeds that reach."""
    kind, seeds = Sparse(0.5), tuple(range(40))
    scalars = tuple(float(c) for c in torch.randn(40))
    pairs = [(name, torch.randn(6, 5)) for name in NAMES[:9]]
    expected = []
    for name, w in pairs:
        told = [place for place, seed in enumerate(seeds) if is_reached(seed, layer_of(name), 0.5)]
        other = w.clone()
        apply_all_([(name, other)], [Update(tuple(seeds[i] for i in told), tuple(scalars[i] for i in told), 0.5)])
        expected.append(other)
    apply_all_(pairs, [Update(seeds, scalars, 0.5)], kind)
    for (name, w), other in zip(pairs, expected, strict=True):
        assert torch.equal(w, other), name


@pytest.mark.parametrize("text", ["rademacher", "binomial", "sparse(0.25)", "sparse(0.5, binomial)"])
def test_a_kind_is_an_expression(text):
    assert parse(text).spec == text
    assert parse(parse(text).spec) == parse(text)


def test_every_kind_of_the_table_can_be_written():
    assert {type(parse(text)) for text in ("rademacher", "binomial", "sparse(1/4)")} == set(NOISES.values())
    assert parse("sparse(1/4)") == Sparse(0.25)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("gaussian", "(?s)no kind of noise is called 'gaussian'.*binomial, rademacher, sparse"),
        ("sparse", "sparse needs 'share'"),
        ("sparse(1.5)", r"(?s)sparse is to perturb a share of 1.5.*in \(0, 1\].*sparse\(0.25\) for a quarter"),
        ("sparse(0.5, sparse(0.5))", r"(?s)sparse of Sparse.*rademacher or binomial.*sparse\(0.25, binomial\)"),
        ("0.25", r"(?s)'0.25' is no kind of noise.*one of binomial, rademacher, sparse.*docs/perturbations.md"),
    ],
)
def test_what_is_no_kind_is_refused(text, told):
    with pytest.raises(ConfigError, match=told):
        parse(text)


def test_short_scalars_cover_the_range():
    assert noise._short(0.0) == 0.0
    assert noise._short(3e38) == pytest.approx(3e38, rel=2**-16)
