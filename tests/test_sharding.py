"""Shares of parameters that all members of an island hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import integers
from torch import nn

from thinwire.fragments import Fragments
from thinwire.sharding import Share, clip_grad_norm_, dealt, inner_state, layout, local, share_of


@given(integers(0, 40), integers(1, 9))
def test_rows_are_dealt_as_torch_chunks_them(rows, of):
    chunks = torch.arange(rows).chunk(of) if rows else ()
    sizes = [len(chunk) for chunk in chunks] + [0] * (of - len(chunks))
    assert [end - begin for begin, end in dealt(rows, of)] == sizes
    assert torch.cat([share_of(torch.arange(rows), rank, of) for rank in range(of)]).tolist() == list(range(rows))


class Odd(nn.Module):
    """Rows that do not divide, a scalar, narrow values, and one gradient that is absent."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.a = nn.Parameter(torch.randn(5, 3, generator=generator))
        self.b = nn.Parameter(torch.randn(1, 4, generator=generator).bfloat16())
        self.c = nn.Parameter(torch.tensor(3.0))
        self.d = nn.Parameter(torch.randn(2, generator=generator))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)


def island(of: int, count: int = 1):
    """Models, fragments, and a way to write to all of them at once, as members of an island do."""
    models = [Odd() for _ in range(of)]
    told: list[list[torch.Tensor]] = [[]]
    fragments = [
        Fragments(model, count, Share(rank, of, lambda vector, sizes: told[0])) for rank, model in enumerate(models)
    ]

    def write(fragment: int, vectors, *, gradients=False):
        told[0] = list(vectors)
        for rank, each in enumerate(fragments):
            (each.scatter_gradients if gradients else each.scatter)(fragment, vectors[rank])

    return models, fragments, write


@pytest.mark.parametrize("of", [2, 3, 4])
def test_shares_together_are_the_whole_and_every_member_writes_all_of_it(of):
    models, fragments, write = island(of)
    whole = Fragments(Odd(), 1)
    assert sum(each.sizes[0] for each in fragments) == whole.sizes[0] == 22
    assert all(each.is_shared for each in fragments)
    assert not whole.is_shared
    write(0, [each.gather(0) + 1 for each in fragments])
    expected = Odd()
    with torch.no_grad():
        for p in expected.parameters():
            if p.requires_grad:
                p.copy_(p.float() + 1)
    for model in models:
        for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
            assert torch.equal(p, q), name


def test_a_member_holds_the_rows_that_fully_shard_would_give_it():
    _, (first, second), _ = island(2)
    assert first.shapes(0) == ((3, 3), (1, 4), (1,), (1,))
    assert second.shapes(0) == ((2, 3), (1,)), "what it holds nothing of has no shape"
    assert second.names(0) == ("a", "b", "c", "d")
    assert second.matrices(0, torch.arange(7.0))["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert second.spread(0, [1.0, 2.0, 3.0, 4.0]).tolist() == [1] * 6 + [4]


def test_members_of_an_island_mean_the_same_by_a_fragment():
    _, fragments, _ = island(2, 3)
    names = [fragments[0].names(f) for f in range(3)]
    assert names == [fragments[1].names(f) for f in range(3)]
    assert fragments[0].schema() == fragments[1].schema() == Fragments(Odd(), 3).schema()


def test_gradients_are_shared_and_an_absent_one_stays_so_if_nobody_has_any():
    models, fragments, write = island(2)
    for model in models:
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.ndim and p.requires_grad else None
    vectors = [each.gather_gradients(0) for each in fragments]
    assert [vector.tolist() for vector in vectors] == [[1.0] * 13 + [0.0] + [1.0], [1.0] * 7]
    write(0, [2 * vector for vector in vectors], gradients=True)
    for model in models:
        assert model.c.grad is None
        assert all(bool((p.grad == 2).all()) for p in (model.a, model.b, model.d))
    vectors[0][13] = 5.0
    write(0, vectors, gradients=True)
    assert [model.c.grad.item() for model in models] == [5.0, 5.0]


def test_a_whole_tensor_is_its_own_shard():
    x = torch.ones(2)
    assert local(x) is x
    assert layout(nn.Linear(2, 2)) == ""


def test_clipping_is_torchs():
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    for model in (ours, theirs):
        model(torch.ones(4, 3)).square().sum().backward()
    norm = clip_grad_norm_(list(ours.parameters()), 0.1)
    assert torch.equal(norm, nn.utils.clip_grad_norm_(theirs.parameters(), 0.1))
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert clip_grad_norm_(list(nn.Linear(1, 1).parameters()), 1.0) == 0


def test_an_optimizer_keeps_its_own_state():
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    assert inner_state(optimizer) is optimizer.state
