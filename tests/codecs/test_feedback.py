"""The identity that error feedback exists for, its decay, and what it may go around."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinwire.codecs import ErrorFeedback, TopK, bf16, feedback, fp32, int4, parse, topk
from thinwire.errors import ConfigError

DYADIC = st.lists(st.integers(-64, 64).map(lambda i: i / 16), min_size=24, max_size=24)


@given(rounds=st.lists(DYADIC, min_size=1, max_size=8), share=st.floats(0.05, 1.0))
def test_nothing_is_lost(rounds: list[list[float]], share: float) -> None:
    """sum of decoded + last residual == sum of inputs; exact, because small dyadic sums do not round in float32."""
    memory = ErrorFeedback(TopK(share))
    residual, decoded = None, torch.zeros(24)
    for key, row in enumerate(rounds):
        fields, residual = memory.encode(torch.tensor(row), residual, key)
        decoded += memory.decode(fields, 24, 0)
    assert residual is not None
    assert torch.equal(decoded + residual, torch.tensor(rounds).sum(dim=0))


def test_without_it_the_small_ones_are_lost_for_ever() -> None:
    """A constant vector whose second entry is never the largest: only the memory gets it across."""
    x = torch.tensor([3.0, 1.0])
    memory, alone = feedback(topk(1 / 2)), topk(1 / 2)
    residual, with_memory, without = None, torch.zeros(2), torch.zeros(2)
    for key in range(12):
        fields, residual = memory.encode(x, residual, key)
        with_memory += memory.decode(fields, 2, 0)
        without += alone.decode(alone.encode(x, key), 2, 0)
    assert without.tolist() == [36, 0]
    assert ((with_memory - 12 * x).abs() <= 4).all()


def test_decay_zero_is_no_feedback_and_decay_between_forgets_some() -> None:
    x, residual = torch.tensor([3.0, 1.0]), torch.tensor([0.0, 1.0])
    assert feedback(topk(1 / 2), decay=0.0).encode(x, residual, 0)[1].tolist() == [0, 1]
    assert feedback(topk(1 / 2), decay=0.5).encode(x, residual, 0)[1].tolist() == [0, 1.5]
    assert feedback(topk(1 / 2)).encode(x, residual, 0)[1].tolist() == [0, 2]


def test_inputs_are_not_changed_and_fields_survive() -> None:
    """fp32 hands on the very tensor it is given: the residual must not be computed in place."""
    x, residual = torch.ones(3), torch.full((3,), 2.0)
    fields, new = feedback(fp32).encode(x, residual, 0)
    assert x.tolist() == [1] * 3
    assert residual.tolist() == [2] * 3
    assert new.tolist() == [0] * 3
    assert fields["value"].tolist() == [3] * 3


def test_the_inner_codec_is_called() -> None:
    x = torch.randn(64)
    fields, residual = feedback(bf16).encode(x, None, 0)
    assert torch.equal(fields["value"], x.bfloat16())
    assert torch.equal(residual, x - x.bfloat16().float())


def test_expression() -> None:
    assert feedback(topk(1 / 64) | int4).spec == "feedback(topk(0.015625) | int4)"
    assert feedback(int4, decay=0.9).spec == "feedback(int4, decay=0.9)"
    for memory in (feedback(topk(1 / 64) | int4), feedback(int4, decay=0.9)):
        assert parse(memory.spec) == memory


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan"), "1", True])
def test_decays_out_of_range_are_refused(decay: object) -> None:
    said = f"feedback is to keep {decay!r} of the residual from round to round\n  expected  decay between 0"
    with pytest.raises(ConfigError, match=re.escape(said)):
        feedback(int4, decay)  # type: ignore[arg-type]


def test_it_goes_around_a_codec_and_nothing_goes_after_it() -> None:
    with pytest.raises(ConfigError, match=r"feedback around ErrorFeedback\("):
        feedback(feedback(int4))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"feedback\(topk\(0.5\)\) \| ...: what follows would be outside") as caught:
        feedback(topk(1 / 2)) | int4
    assert caught.value.mend == "write feedback(topk(0.5) | ...)"
