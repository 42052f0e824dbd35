"""Memory for large results is what small ones are: writable, of the type asked for, and zero where it is to be."""

from __future__ import annotations

import pytest
import torch

from thinwire.codecs.memory import Scratch, empty, zeros

LARGE = (1 << 20) + 3  # above 4 MiB as float32, and no whole number of pages


@pytest.mark.parametrize("count", [0, 1, 1000, LARGE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8], ids=str)
def test_it_holds_what_is_written(count, dtype):
    for made in (empty(count, dtype), zeros(count, dtype)):
        assert (made.shape, made.dtype) == ((count,), dtype)
        made.fill_(3)
        assert bool((made == 3).all())
    assert not zeros(count, dtype).any()


def test_it_outlives_its_maker_and_is_not_shared():
    first, second = zeros(LARGE), zeros(LARGE)
    view = first[5:9]
    first += 1
    del first
    assert view.tolist() == [1] * 4
    assert not second.any()


def test_scratch_is_made_once_and_grows():
    scratch = Scratch(torch.device("cpu"))
    a = scratch("work", (4, 8))
    assert scratch("work", (2, 3)).data_ptr() == a.data_ptr()
    assert scratch("other", (4, 8)).data_ptr() != a.data_ptr()
    assert scratch("work", (100, 100)).shape == (100, 100)
