"""What both lossless stages do with what stands before them."""

from __future__ import annotations

import pytest
import torch

from doubles import Nonzero
from thinwire.codecs import Rans, Zstd
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
