"""Top-k against the framework's, its ties, and what its decoder refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinwire.codecs import TopK, topk
from thinwire.errors import ConfigError, PacketError

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(FLOATS, min_size=1, max_size=60), st.floats(0.01, 1.0))
def test_the_kept_are_the_largest_and_of_equals_the_first(values: list[float], share: float) -> None:
    x = torch.tensor(values)
    fields = topk(share).encode(x, 0)
    order = sorted(range(len(x)), key=lambda i: (-abs(x[i].item()), i))
    assert fields["index"].tolist() == sorted(order[: len(fields["index"])])
    assert torch.equal(fields["value"], x[fields["index"].long()])


def test_many_numbers_at_once() -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    kept = topk(1 / 64).encode(x, 0)["value"]
    assert torch.equal(kept.abs().sort().values, x.abs().topk(1563).values.flip(0))


def test_everything_is_kept_at_full_rate() -> None:
    x = torch.randn(100)
    assert torch.equal(topk(1).decode(topk(1).encode(x, 0), 100, 0), x)


def test_a_larger_share_keeps_more() -> None:
    assert [topk(s).layout(1000)["index"][1] for s in (1e-9, 1 / 64, 0.5, 1)] == [1, 16, 500, 1000]


@pytest.mark.parametrize("index", [[1, 1], [2, 1], [-1, 3], [3, 4], [0, 2**31 - 1]])
def test_positions_that_no_encoder_writes_are_refused(index: list[int]) -> None:
    fields = {"value": torch.ones(2), "index": torch.tensor(index, dtype=torch.int32)}
    with pytest.raises(PacketError, match=r"'index' is not a list of ascending positions\n  expected  .* below 4"):
        topk(0.5).decode(fields, 4, 0)


@pytest.mark.parametrize("share", [0, -0.1, 1.5, float("nan"), "1/64", True, None])
def test_shares_out_of_range_are_refused(share: object) -> None:
    with pytest.raises(
        ConfigError, match=r"topk is to keep a share of .*\n  expected  a number in \(0, 1\]: the share"
    ):
        TopK(share)  # type: ignore[arg-type]


def test_vectors_beyond_int32_are_refused_before_anything_is_computed() -> None:
    x = torch.zeros(1).expand(2**31)  # no memory behind it
    with pytest.raises(ConfigError, match=r"topk of a vector of 2147483648 elements\n  expected  fewer than 2\^31"):
        topk(0.5).encode(x, 0)
