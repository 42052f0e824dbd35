"""Rows: which are kept of which matrix, with and without shapes, and how they are drawn."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from thinwire.codecs import Rows, int8, parse, rows
from thinwire.errors import ConfigError, PacketError
from thinwire.randomness import mix

ROWS = sys.modules["thinwire.codecs.rows"]
SHAPES = ((8, 16), (16,), (3, 5, 2), (1, 40), (), (6, 1), (0, 4))
N = 8 * 16 + 16 + 30 + 40 + 1 + 6


def numbers(n: int = N, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def split(x: Tensor) -> list[Tensor]:
    sizes = [torch.Size(shape).numel() for shape in SHAPES]
    return [piece.view(shape) for piece, shape in zip(x.split(sizes), SHAPES, strict=True)]


def through(codec: Rows, x: Tensor, key: int = 0) -> Tensor:
    return codec.decode(codec.encode(x, key), len(x), key)


def test_the_largest_rows_of_each_matrix_and_all_of_the_rest() -> None:
    x = numbers()
    for before, after in zip(split(x), split(through(rows(1 / 4).fit(SHAPES), x)), strict=True):
        if before.ndim < 2 or len(before) == 1:
            assert torch.equal(before, after)
            continue
        norms = before.flatten(1).norm(dim=1)
        due = norms.topk(-(-len(norms) // 4)).indices.tolist() if len(norms) else []
        for j in range(len(norms)):
            assert torch.equal(after[j], before[j] if j in due else torch.zeros_like(before[j]))


def test_sizes() -> None:
    """Two of 8 rows of 16, 16 numbers, one of 3 rows of 10, 40 and 1 numbers, two of 6 rows of 1; 9 of 21 rows."""
    layout = rows(1 / 4).fit(SHAPES).layout(N)
    assert layout["value"] == (torch.float32, 32 + 16 + 10 + 40 + 1 + 2)
    assert layout["index"] == ROWS.indices.layout("compact", 2 + 1 + 1 + 1 + 1 + 2, 8 + 1 + 3 + 1 + 1 + 6)
    assert rows(1 / 8, width=10).layout(1003)["value"][1] == 13 * 10 + 3  # 100 rows, and what is left over
    assert list(rows(1).fit(SHAPES).layout(N)) == ["value"]
    assert list(rows(1 / 8).fit(((7,), (5,))).layout(12)) == ["value"]


def test_a_vector_without_shapes_is_cut_into_rows() -> None:
    x = numbers(1003)
    assert torch.equal(through(rows(0.1, width=10), x), through(rows(0.1).fit(((100, 10), (3,))), x))
    assert not torch.equal(through(rows(0.1, width=20), x), through(rows(0.1, width=10), x))
    assert torch.equal(through(rows(0.1, width=10).fit(SHAPES), x), through(rows(0.1, width=10), x))


def test_everything_is_kept_at_full_rate() -> None:
    for codec in (rows(1), rows(1, sampled=True), rows(1).fit(SHAPES)):
        assert torch.equal(through(codec, numbers()), numbers())


def test_of_equal_rows_the_first_are_kept() -> None:
    x = torch.ones(6, 4)
    x[4] = 2
    assert through(rows(1 / 2, width=4), x.view(-1)).view(6, 4).sum(dim=1).tolist() == [4, 4, 0, 0, 8, 0]


@pytest.mark.parametrize("factor", [1e38, 1e-44])
def test_norms_neither_overflow_nor_vanish(factor: float) -> None:
    x = torch.tensor([[1.0] * 8, [3] * 8, [2] * 8, [1] * 8]).view(-1) * factor
    assert through(rows(1 / 4, width=8), x).nonzero().squeeze(1).tolist() == list(range(8, 16))


@pytest.mark.parametrize("shape", [(2, 9000), (5, 4000), (7, 3000), (300, 3)])
def test_norms_are_taken_of_all_rows(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces of two rows and more, the last of which may overlap the one before it."""
    monkeypatch.setattr(ROWS, "_PIECE", 7000)
    matrix = numbers(shape[0] * shape[1]).view(shape)
    torch.testing.assert_close(ROWS._norms(matrix), matrix.double().norm(dim=1), rtol=1e-12, atol=0)


def test_the_number_of_threads_makes_no_difference_to_wide_rows() -> None:
    matrix, before = numbers(3 << 19).view(3, -1), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(ROWS._norms(matrix))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_a_chain_writes_the_kept_rows() -> None:
    x, codec = numbers(), rows(1 / 4).fit(SHAPES)
    fields = (codec | int8).encode(x, 0)
    kept = codec.encode(x, 0)
    assert torch.equal(fields["index"], kept["index"])
    assert torch.equal(fields["value.code"], int8.encode(kept["value"], 0)["code"])


def test_contraction_is_that_of_the_worst_matrix() -> None:
    assert rows(1 / 4).fit(SHAPES).contraction(N) == 2 / 8
    assert rows(0.3).fit(((10, 4), (9, 4))).contraction(76) == 3 / 10
    x = numbers(76)
    kept = through(rows(0.3).fit(((10, 4), (9, 4))), x)
    assert (x - kept).square().sum() < 0.7 * x.square().sum()


# Drawn rows -----------------------------------------------------------------------------------------------------------


def test_chances() -> None:
    """In proportion, but none above 1: with norms 8, 1, 1, 2 and two to draw the first is certain."""
    chances = ROWS._chances(torch.tensor([8.0, 1, 1, 2]).double().numpy(), 2)
    assert chances.tolist() == [1, 0.25, 0.25, 0.5]
    assert ROWS._chances(torch.tensor([0.0, 1, 0, 0]).double().numpy(), 3).tolist() == [1, 1, 1, 0]
    assert ROWS._chances(torch.zeros(3).double().numpy(), 2).tolist() == [1, 1, 0]
    assert ROWS._chances(torch.ones(4).double().numpy(), 1).tolist() == [0.25] * 4


def test_rows_are_drawn_as_often_as_their_chances_say() -> None:
    norms, draws = torch.tensor([8.0, 1, 1, 2, 0]).double(), 4000
    counts = torch.zeros(5)
    for key in range(draws):
        p, scale = ROWS._sample(norms, 2, mix(key))
        assert len(p.unique()) == 2
        assert scale[p == 0].tolist() == [1]
        counts[p] += 1
    chances = torch.tensor([1, 0.25, 0.25, 0.5, 0])
    assert ((counts - draws * chances).abs() <= 5 * (draws * chances * (1 - chances)).sqrt() + 1e-9).all()


def test_exactly_as_many_rows_come_out_whatever_they_hold() -> None:
    for seed in range(200):
        g = torch.Generator().manual_seed(seed)
        norms = (6 * torch.randn(50, generator=g)).exp().double() * (torch.rand(50, generator=g) < 0.8)
        p, scale = ROWS._sample(norms, 20, mix(seed))
        assert len(p.unique()) == len(p) == 20
        assert (p.diff() > 0).all()
        assert (scale >= 1).all()


def test_drawn_rows_are_scaled_and_change_with_the_key() -> None:
    x, codec = numbers(), rows(1 / 4, sampled=True).fit(SHAPES)
    one = split(through(codec, x, 1))[0]
    assert not all(torch.equal(one, split(through(codec, x, key))[0]) for key in range(10))
    for j in one.any(dim=1).nonzero().squeeze(1).tolist():
        factor = one[j] / split(x)[0][j]
        assert factor[0] >= 1
        torch.testing.assert_close(factor, factor[0].expand(16), rtol=1e-6, atol=0)
    assert codec.traits.unbiased
    assert not codec.traits.wants_feedback
    assert codec.variance(N) == pytest.approx(3, rel=1e-5)


def test_nothing_is_lost_where_few_rows_hold_everything() -> None:
    x = torch.zeros(8, 4)
    x[[1, 6]] = numbers(8).view(2, 4)
    assert torch.equal(through(rows(1 / 4, width=4, sampled=True), x.view(-1)), x.view(-1))


# Refusals -------------------------------------------------------------------------------------------------------------


def test_rows_that_crowd_in_one_matrix_are_refused() -> None:
    fields = rows(1 / 2, width=2).encode(torch.arange(8.0), 0)  # the last two of four rows
    assert rows(1 / 2, width=2).decode(fields, 8, 0).tolist() == [0, 0, 0, 0, 4, 5, 6, 7]
    with pytest.raises(PacketError, match="'index' does not have as many rows of each matrix as are kept of it"):
        rows(1 / 2).fit(((2, 2), (2, 2))).decode(fields, 8, 0)


@pytest.mark.parametrize("share", [0, -0.1, 1.5, float("nan"), "1/64", True, None])
def test_shares_out_of_range_are_refused(share: object) -> None:
    with pytest.raises(ConfigError, match=r"rows is to keep a share of .*\n  expected  a number in \(0, 1\]"):
        rows(share)  # type: ignore[arg-type]


def test_other_options_are_refused() -> None:
    for width in (0, 2.5, True):
        with pytest.raises(ConfigError, match=r"rows is to have .* elements in a row\n  expected  a whole number"):
            rows(1 / 8, width=width)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"rows\(sampled=8\)\n  expected  True or False"):
        rows(1 / 8, sampled=8)  # type: ignore[arg-type]


def test_expressions() -> None:
    assert parse("rows(1/8, width=64, sampled=True)") == rows(1 / 8, width=64, sampled=True)
    assert rows(1 / 8, width=64, sampled=True).spec == "rows(0.125, width=64, sampled=True)"
    codec = rows(1 / 8).fit(SHAPES)
    assert codec.spec == "rows(0.125)"
    assert codec != rows(1 / 8)
    assert rows(1 / 8).fit(SHAPES) == codec
    with pytest.raises(ConfigError, match="rows does not take 'shapes'"):
        parse("rows(1/8, shapes=1)")
