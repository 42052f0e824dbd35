"""Chains: names of fields, one form for every way of joining, and what cannot be joined."""

from __future__ import annotations

import pytest
import torch

from thinwire.codecs import Chain, e3m0, feedback, fp32, int4, int8, topk, zstd
from thinwire.errors import ConfigError

X = torch.randn(1000, generator=torch.Generator().manual_seed(0))


def test_the_values_are_written_by_the_second_and_the_rest_stays() -> None:
    codec = topk(1 / 10) | int8
    fields, kept = codec.encode(X, 0), topk(1 / 10).encode(X, 0)
    assert list(fields) == ["value.scale", "value.code", "index"]
    assert torch.equal(fields["index"], kept["index"])
    written = int8.decode(int8.encode(kept["value"], 0), 100, 0)
    assert torch.equal(codec.decode(fields, 1000, 0), topk(1 / 10).decode({**kept, "value": written}, 1000, 0))


def test_fp32_before_a_codec_changes_nothing_but_names() -> None:
    assert torch.equal(
        (fp32 | int4).decode((fp32 | int4).encode(X, 0), 1000, 0), int4.decode(int4.encode(X, 0), 1000, 0)
    )


def test_chains_lean_left() -> None:
    left = (topk(1 / 2) | topk(1 / 4)) | int4
    assert topk(1 / 2) | (topk(1 / 4) | int4) == left
    assert Chain(topk(1 / 2), Chain(topk(1 / 4), int4)) == left
    assert list(left.layout(8)) == ["value.value.scale", "value.value.code", "value.index", "index"]


def test_top_k_of_top_k_is_top_k() -> None:
    twice = topk(1 / 2) | topk(1 / 5)
    once = topk(1 / 10)
    assert torch.equal(twice.decode(twice.encode(X, 0), 1000, 0), once.decode(once.encode(X, 0), 1000, 0))
    assert twice.contraction(1000) == pytest.approx(once.contraction(1000))


def test_both_parts_get_their_own_randomness() -> None:
    """The same codec after fp32 draws other numbers than alone."""
    stochastic = int8(rounding="stochastic")
    alone, after = stochastic.encode(X, 5)["code"], (fp32 | stochastic).encode(X, 5)["value.code"]
    assert not torch.equal(alone, after)


def test_bounds_multiply() -> None:
    parts = topk(1 / 4).contraction(1000), int4.contraction(250)
    assert parts[0] is not None
    assert parts[1] is not None
    assert (topk(1 / 4) | int4).contraction(1000) == parts[0] * parts[1]
    assert (fp32 | int4(rounding="stochastic")).variance(1000) == int4(rounding="stochastic").variance(1000)
    assert (topk(1 / 4) | int4(rounding="stochastic")).variance(1000) is None


def test_traits_are_those_of_the_weaker_part() -> None:
    assert not (topk(1 / 4) | int4).traits.reencodes
    assert (topk(1 / 4) | int4).traits.wants_feedback
    assert (fp32 | fp32).traits == fp32.traits
    assert (fp32 | int8(rounding="stochastic")).traits.unbiased
    assert not (topk(1 / 4) | int8(rounding="stochastic")).traits.unbiased


def test_what_cannot_be_joined_is_refused_in_three_parts() -> None:
    with pytest.raises(
        ConfigError, match=r"int8 \| int4: int8 leaves no float32 values that int4 could write"
    ) as caught:
        int8 | int4
    assert "topk, dct, rotation, fp32" in caught.value.expected
    assert "put int8 last" in caught.value.mend
    with pytest.raises(ConfigError, match=r"a codec of variable size inside a chain"):
        Chain(topk(1 / 4), e3m0 | zstd)
    with pytest.raises(ConfigError, match=r"int8 \| 3: the right side is no codec"):
        int8 | 3  # type: ignore[operator]
    with pytest.raises(ConfigError, match=r"feedback goes around the whole chain"):
        topk(1 / 4) | feedback(int4)  # type: ignore[operator]
