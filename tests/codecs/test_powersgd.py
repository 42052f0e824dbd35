"""PowerSGD is exact on low rank, a projection otherwise, and the same bits on all members."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

from memories import vectors
from staged import rounds
from thinwire import every_step
from thinwire.aggregators import WeightedMean
from thinwire.codecs import ErrorFeedback, PowerSGD, bf16, feedback, int8, parse, powersgd, topk
from thinwire.codecs.powersgd import _dot, _orthonormal
from thinwire.errors import ConfigError
from thinwire.links.local import run

SHAPES = ((40, 48), (48,), (30, 20), (40, 48), (3, 3), (8, 5, 6))
N = sum(map(math.prod, SHAPES))


def _low_rank(rank: int, seed: int) -> Tensor:
    """Elements of parameters of SHAPES, matrices of this rank."""
    g = torch.Generator().manual_seed(seed)
    parts = []
    for shape in SHAPES:
        cols = math.prod(shape[1:])
        thin = min(rank, shape[0])
        parts.append((torch.randn(shape[0], thin, generator=g) @ torch.randn(thin, cols, generator=g)).flatten())
    return torch.cat(parts)


def _noise(seed: int) -> Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(seed))


def _residual(combined) -> Tensor:
    return combined.carried.own["residual"]


@pytest.mark.parametrize("members", [1, 2, 3])
def test_a_mean_of_low_rank_is_exact(members: int) -> None:
    """Rank 1 each, so that the mean is of rank 3 at most; in the first round too, from a random Q."""
    given = [_low_rank(1, rank) for rank in range(members)]
    mean = torch.stack(given).mean(dim=0)
    for done in rounds(feedback(powersgd(3).fit(SHAPES)), [given, [torch.zeros(N)] * members]):
        assert (done[0].update - mean).norm() <= 1e-5 * mean.norm()
        left = torch.stack([_residual(done[0])])
        assert left.norm() <= 1e-5 * mean.norm()


def test_small_ones_go_along_as_they_are() -> None:
    given = [_noise(0), _noise(1)]
    mean = (given[0] + given[1]) / 2
    (done, _) = rounds(feedback(powersgd(2).fit(SHAPES)), [given])
    start = 0
    for shape in SHAPES:
        stop = start + math.prod(shape)
        whole = torch.equal(done[0].update[start:stop], mean[start:stop])
        assert whole == (shape in ((48,), (3, 3))), shape
        assert whole == (not _residual(done[0])[start:stop].any())
        start = stop


def test_what_is_sent_is_a_projection_of_the_members_own() -> None:
    """||M - sent||^2 = ||M||^2 - ||sent||^2, and the update is the mean of what was sent."""
    given = [_noise(0), _noise(1), _noise(2)]
    results = rounds(feedback(powersgd(2).fit(SHAPES)), [given])
    sent = [x - _residual(done[0]) for x, done in zip(given, results, strict=True)]
    for x, mine in zip(given, sent, strict=True):
        assert ((x - mine).square().sum() + mine.square().sum()).item() == pytest.approx(x.square().sum().item(), 1e-5)
    torch.testing.assert_close(results[0][0].update, torch.stack(sent).mean(dim=0), rtol=0, atol=1e-5)


def test_weights_are_the_methods() -> None:
    given = [_low_rank(1, 0), _low_rank(1, 1)]
    (done, _) = rounds(feedback(powersgd(2).fit(SHAPES)), [given], rule=WeightedMean(), weights=[1.0, 3.0])
    due = 0.25 * given[0] + 0.75 * given[1]
    assert (done[0].update - due).norm() <= 1e-5 * due.norm()


@pytest.mark.parametrize("x", [torch.zeros(N), _low_rank(1, 0), 1e-30 * _noise(0), 1e18 * _noise(0)])
def test_matrices_of_less_rank_and_of_any_size_give_numbers(x: Tensor) -> None:
    """A column that the others span becomes zero, not noise; and Q comes back to life when there is something again."""
    how = feedback(powersgd(4).fit(SHAPES), decay=0.0)
    ((*done, last),) = rounds(how, [[x], [x], [torch.zeros(N)], [_low_rank(4, 9)], [_low_rank(4, 9)]])
    assert all(each.update.isfinite().all() and each.carried.stages["q"].isfinite().all() for each in done)
    assert (done[0].update - x).norm() <= 1.001 * x.norm()
    assert (last.update - _low_rank(4, 9)).norm() <= 1e-5 * _low_rank(4, 9).norm()


def test_a_warm_start_gets_better_from_round_to_round() -> None:
    """Power iteration on one matrix: the best approximation of rank 2 is found, and never from cold starts."""
    shapes = ((60, 50),)
    g = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(60, 50, generator=g))
    v, _ = torch.linalg.qr(torch.randn(50, 50, generator=g))
    singular = 0.7 ** torch.arange(50.0)
    x = (u * singular @ v.T).flatten()
    best = singular[2:].norm()
    error = {}
    for warm in (True, False):
        how = feedback(powersgd(2, warm=warm).fit(shapes), decay=0.0)
        (done,) = rounds(how, [[x]] * 20)
        error[warm] = [(each.update - x).norm().item() for each in done]
    assert error[True][-1] == pytest.approx(best.item(), rel=1e-3)
    assert min(error[False]) > 1.05 * best
    assert error[True][0] > 1.05 * best


def test_factors_may_be_written_shorter() -> None:
    given = [_low_rank(1, 0), _low_rank(1, 1)]
    mean = (given[0] + given[1]) / 2
    error = {}
    for factors in (bf16, int8, PowerSGD().factors):
        (done, _) = rounds(feedback(powersgd(2, factors=factors).fit(SHAPES)), [given])
        error[factors.spec] = (done[0].update - mean).norm() / mean.norm()
    assert error["fp32"] < 1e-5
    assert 1e-4 < error["bf16"] < 1e-2
    assert 1e-4 < error["int8"] < 5e-2


def test_bytes_are_those_of_the_factors() -> None:
    """A matrix of 1000 x 1000 as 2 x 1000 x 2 numbers, in all-reduces: sent and received once, with three members."""
    shapes = ((1000, 1000),)

    def member(link):
        from test_collectives import exchange
        from thinwire.aggregators import Mean
        from thinwire.collectives import Carried, combine

        combine(exchange(link, powersgd(2).fit(shapes), Mean()), torch.ones(1_000_000), 1.0, Carried(), None)
        return link.meter.total().sent_bytes

    assert all(abs(sent - 2 * 2 / 3 * 2000 * 4 * 2) < 6000 for sent in run(3, member))


def test_without_shapes_nothing_is_factored() -> None:
    given = [_noise(0)[:100], _noise(1)[:100]]
    for how in (powersgd(2), powersgd(2).fit(SHAPES)):
        (done, _) = rounds(how, [given])
        assert torch.equal(done[0].update, (given[0] + given[1]) / 2)


def test_orthonormal_rows_and_zeros_where_nothing_is_left() -> None:
    p = torch.randn(3, 4, 33, generator=torch.Generator().manual_seed(0))
    p[1, 2] = p[1, 0] - 2 * p[1, 1]
    p[2] = 0
    found = _orthonormal(p)
    gram = torch.matmul(found, found.transpose(1, 2))
    due = torch.eye(4).repeat(3, 1, 1)
    due[1, 2, 2] = due[2] = 0
    torch.testing.assert_close(gram, due, rtol=0, atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 100])
def test_products_in_one_order(n: int) -> None:
    a, b = torch.randn(2, 3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    torch.testing.assert_close(_dot(a, b).squeeze(1), (a * b).sum(dim=1))


def test_expressions_and_refusals() -> None:
    for text in ("powersgd(rank=2)", "powersgd(rank=4, warm=False)", "powersgd(rank=1, factors=bf16)"):
        assert parse(text).spec == text
    assert parse("powersgd(3)").fit(SHAPES) == powersgd(3).fit(SHAPES) != powersgd(3)  # type: ignore[union-attr]
    assert isinstance(every_step(codec=powersgd()).codec, ErrorFeedback)
    for rank in (0, -1, 2.0, True, "2"):
        with pytest.raises(ConfigError, match=re.escape(f"powersgd of rank {rank!r}\n  expected  a whole number")):
            powersgd(rank)  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"powersgd is to write its factors with topk\(0\.5\)\n  expected  a codec th"
    ):
        powersgd(2, factors=topk(1 / 2))
    with pytest.raises(ConfigError, match="powersgd does not take 'ranks'"):
        parse("powersgd(ranks=(1, 2))")
    with pytest.raises(ConfigError, match="powersgd with warm 0\n  expected  True or False"):
        powersgd(2, warm=0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="powersgd is to write its factors with 3"):
        powersgd(2, factors=3)  # type: ignore[arg-type]


def test_what_members_know_of_each_other_holds_where_factors_are_rounded():
    memory = parse("ef21(powersgd(2, factors=int4))").fit(((50, 100),))
    done = rounds(memory, [vectors(3, 5000, number) for number in range(10)])
    own = torch.stack([member[-1].carried.own["estimate"] for member in done]).mean(dim=0)
    torch.testing.assert_close(done[0][-1].carried.shared["estimate"], own, rtol=0, atol=1e-5)


@pytest.mark.parametrize("then", ["powersgd(2, factors=int8)", "tagc(0.2)"])
def test_stages_of_other_lengths_may_follow_a_codec_that_is_encoded_twice(then):
    memory = parse(f"feedback(switch(int4, 2, {then}))").fit(((50, 100),))
    before, after = rounds(memory, [vectors(3, 5000, number) for number in range(4)])[0][1::2]
    assert before.carried.dropped.keys() == after.carried.dropped.keys() == {"0"}  # still owed
