"""Product quantisation: what it finds, what it never exceeds, books drawn and trained, and what it refuses."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thinwire.codecs import PQ, parse, pq, train_codebook
from thinwire.codecs.pq import _read_book
from thinwire.errors import ConfigError, PacketError
from written import again

X = torch.randn(1 << 15, generator=torch.Generator().manual_seed(0))


def _left(codec: PQ, x: Tensor) -> float:
    """Error as a share of the energy."""
    return ((again(codec, x).double() - x.double()).square().sum() / x.double().square().sum()).item()


def test_entries_are_the_nearest_and_the_factor_the_best() -> None:
    codec = PQ(length=4, size=16, block=64)
    fields = codec.encode(X[:64], 0)
    book = _read_book(b"", 1, 16, 4)[0]
    pieces = (X[:64] / X[:64].square().mean().sqrt()).view(-1, 4)
    nearest = torch.cdist(pieces, book).argmin(dim=1)
    entries = book[nearest].view(-1)
    scale = (X[:64] @ entries) / entries.square().sum()
    assert fields["scale"].item() == pytest.approx(scale.item(), rel=1e-5)
    torch.testing.assert_close(codec.decode(fields, 64, 0), scale * entries)


def test_what_is_lost_is_what_is_across_the_entries() -> None:
    x = X[:256]
    decoded = again(PQ(), x).double()
    energy, across = x.double().square().sum(), x.double() @ decoded
    assert (decoded - x).square().sum().item() == pytest.approx((energy - across).item(), rel=1e-4)


def test_a_vector_of_entries_is_exact() -> None:
    book = _read_book(b"", 2, 256, 8)
    g = torch.Generator().manual_seed(1)
    one = book[0][torch.randint(256, (32,), generator=g)].view(-1)
    one = one / one.square().mean().sqrt()  # pieces are compared after this
    trained = train_codebook([one], length=8, size=16, block=256)
    assert _left(PQ(size=16, codebook=trained), one) < 0.5
    own = one.view(-1, 8).unique(dim=0)
    codec = PQ(size=len(own), codebook=own.numpy().tobytes())
    torch.testing.assert_close(again(codec, 3 * one), 3 * one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("stages", "left"), [(1, 0.356), (2, 0.134), (3, 0.053)])
def test_what_drawn_books_leave_of_normal_numbers(stages: int, left: float) -> None:
    """A scalar code of one bit leaves 0.363."""
    assert _left(PQ(stages=stages), X) == pytest.approx(left, rel=0.03)


def test_a_trained_book_leaves_less() -> None:
    samples = [torch.randn(20_000, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    samples = [sample.view(-1, 2).repeat_interleave(2, dim=1).view(-1) for sample in samples]  # pieces with a structure
    new = X.view(-1, 2).repeat_interleave(2, dim=1).view(-1)
    book = train_codebook(samples, length=4, size=64, stages=2)
    codec = PQ(length=4, size=64, stages=2, codebook=book)
    assert _left(codec, new) < 0.3 * _left(PQ(length=4, size=64, stages=2), new)
    assert train_codebook(samples, length=4, size=64, stages=2) == book
    assert train_codebook(samples, length=4, size=64, stages=2, key=1) != book


def test_entries_that_nobody_uses_move_to_where_they_are_needed() -> None:
    rows = torch.zeros(200, 2)
    rows[:, 0] = 1.0
    rows[:3] = torch.tensor([[9.0, 0], [0, 9], [-9, 0]])
    book = train_codebook([rows.view(-1)], length=2, size=4, block=400)
    assert _left(PQ(length=2, size=4, block=400, codebook=book), rows.view(-1)) < 1e-6


@settings(deadline=None)
@given(st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=40), st.integers(1, 3))
def test_it_never_adds_energy(values: list[float], stages: int) -> None:
    x = torch.tensor(values)
    decoded = again(PQ(length=4, size=4, stages=stages, block=8), x).double()
    assert (decoded - x).square().sum() <= (1 + 1e-6) * x.double().square().sum()


def test_a_block_whose_entries_point_away_becomes_zeros() -> None:
    book = torch.tensor([[1.0, 0], [2, 0]]).numpy().tobytes()
    codec = PQ(length=2, size=2, block=2, codebook=book)
    fields = codec.encode(torch.tensor([-1.0, 0, 3, 0]), 0)
    assert fields["scale"].tolist()[0] == 0
    assert codec.decode(fields, 4, 0).tolist() == pytest.approx([0, 0, 3, 0], rel=1e-6)


def test_every_option_changes_the_result() -> None:
    assert _left(PQ(length=4), X) < _left(PQ(length=8), X) < _left(PQ(length=16), X)
    assert _left(PQ(size=256), X) < _left(PQ(size=16), X) < _left(PQ(size=4), X)
    loud = X * torch.tensor([1.0, 100.0]).repeat_interleave(64).repeat(256)
    assert again(PQ(block=64), loud)[:64].abs().max() < 10
    assert (again(PQ(block=64), loud) - loud)[:64].square().sum() < 64
    assert (again(PQ(block=128), loud) - loud)[:64].square().sum() > 64
    assert PQ(stages=2, size=16).layout(1024) == {"scale": (torch.float32, 4), "code": (torch.uint8, 128)}


def test_numbers_of_all_sizes() -> None:
    for size in (3e38, 1e30, 1e-30):
        torch.testing.assert_close(again(PQ(), X[:512] / 4 * size), again(PQ(), X[:512] / 4) * size, rtol=1e-4, atol=0)
    assert (again(PQ(), X[:512] * 1e-40) == 0).all()


def test_books_are_told_apart_by_the_expression_which_cannot_hold_one() -> None:
    a, b = (train_codebook([X], length=4, size=8, key=key) for key in (0, 1))
    codec = pq(4, 8, codebook=a)
    assert re.fullmatch(r"pq\(length=4, size=8, codebook='[0-9a-f]{16}'\)", codec.spec)
    assert codec.spec != PQ(4, 8, codebook=b).spec
    assert codec == PQ(4, 8, codebook=a) != PQ(4, 8, codebook=b)
    with pytest.raises(
        ConfigError, match=r"(?s)pq is given the codebook '.*mend +build the codec in Python.*read_bytes"
    ):
        parse(codec.spec)


@pytest.mark.parametrize("book", [b"1234", bytes(4 * 256 * 8 - 4), b"\xff" * (4 * 256 * 8)])
def test_other_books_are_refused(book: bytes) -> None:
    with pytest.raises(ConfigError, match=f"pq is given a codebook of {len(book)} bytes\n  expected  8192 bytes of"):
        PQ(codebook=book)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"length": 0}, "pq is to have length=0\n  expected  a whole number from 1 to 64"),
        ({"size": 257}, "pq is to have size=257\n  expected  a whole number from 2 to 256"),
        ({"stages": 1.0}, "pq is to have stages=1.0\n  expected  a whole number from 1 to 8"),
        ({"block": True}, "pq is to have block=True\n"),
        ({"block": 20}, "pq is to have blocks of 20 elements in pieces of 8\n  expected  whole pieces.*\n.*block=24"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        PQ(**options)


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"a codebook of 256 entries from 2 pieces\n  expected  at least 256 pieces"):
        train_codebook([torch.ones(16)])


def test_what_no_encoder_writes_is_refused() -> None:
    codec = PQ(size=3)
    fields = dict(codec.encode(X[:32], 0))
    with pytest.raises(PacketError, match="'code' names entry 3 of 3"):
        codec.decode({**fields, "code": torch.tensor([255], dtype=torch.uint8)}, 32, 0)
    with pytest.raises(PacketError, match="'scale' holds a scale"):
        codec.decode({**fields, "scale": torch.tensor([torch.nan])}, 32, 0)
