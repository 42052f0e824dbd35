"""What both lossless stages do with what stands before them."""

from __future__ import annotations

import pytest
import torch

from doubles import Nonzero
from thinwire.codecs import Rans, Zstd, int8, layers, parse, topk, warmup
from written import again

X = torch.randn(5000, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("stage", [Rans, Zstd])
@pytest.mark.parametrize("n", [0, 1, 5, 5000])
def test_a_left_side_of_varying_size_is_squeezed_too(stage: type[Rans] | type[Zstd], n: int) -> None:
    x, zeros = X[:n].round(), torch.zeros(n)
    codec = stage(Nonzero())
    fields = codec.encode(x, 0)
    assert torch.equal(codec.decode(fields, n, 0), x)
    assert all(len(fields[name]) <= size for name, (_, size) in codec.layout(n).items())
    assert [len(field) for field in codec.encode(zeros, 0).values()] == [0, 0]
    assert torch.equal(again(codec, zeros), zeros)


@pytest.mark.parametrize("stage", [Rans(), Zstd()])
def test_what_stands_before_is_seen_through_it(stage: Rans | Zstd) -> None:
    """So that what wants a selection, or a share that begins larger, takes it as it takes the left side alone."""
    inner = topk(1 / 8) | int8
    codec = inner | stage
    assert codec.leads == (topk(1 / 8),)
    assert codec.selects
    assert not (int8 | stage).selects
    assert codec.selection == topk(1 / 8)
    assert codec.lead(lambda _: topk(1 / 2)) == topk(1 / 2) | int8 | stage
    assert codec.contraction(64) == inner.contraction(64)
    for expression in ("dgc({})", "gmf({})", "feedback(warmup({}, 10))"):
        memory = parse(expression.format(codec.spec))
        assert parse(memory.spec) == memory
    assert warmup(codec, rounds=5).at(0).leads[0] == warmup(inner, rounds=5).at(0).leads[0]
    cut = (layers(topk(1 / 8), small=1) | stage).fit(((4, 4), (4, 4)))
    assert cut == layers(topk(1 / 8), small=1).fit(((4, 4), (4, 4))) | stage
    assert cut.part(0, 16) == layers(topk(1 / 8), small=1).fit(((4, 4), (4, 4))).part(0, 16) | stage
