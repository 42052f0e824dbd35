"""The identity that error feedback exists for, its decay, and what it may go around."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from thinwire.codecs import ErrorFeedback, TopK, bf16, feedback, fp16, fp32, int4, parse, topk
from thinwire.codecs.feedback import Place
from thinwire.codecs.stages import Tensors
from thinwire.errors import ConfigError

ALONE = Place(0, (0,))


def turn(memory: ErrorFeedback, x: Tensor, own: Tensors, key: int = 0) -> tuple[Tensor, Tensors]:
    """A round of one member: what others read of it, and what it remembers."""
    target, held = memory.prepare(x, own, {}, ALONE)
    sent = memory.codec.decode(memory.codec.encode(target, key), len(x), key)
    return sent, memory.commit(target, held, sent)


DYADIC = st.lists(st.integers(-64, 64).map(lambda i: i / 16), min_size=24, max_size=24)


@given(rounds=st.lists(DYADIC, min_size=1, max_size=8), share=st.floats(0.05, 1.0))
def test_nothing_is_lost(rounds: list[list[float]], share: float) -> None:
    """sum of decoded + last residual == sum of inputs; exact, because small dyadic sums do not round in float32."""
    memory = ErrorFeedback(TopK(share))
    own, decoded = {}, torch.zeros(24)
    for key, row in enumerate(rounds):
        sent, own = turn(memory, torch.tensor(row), own, key)
        decoded += sent
    assert torch.equal(decoded + own["residual"], torch.tensor(rounds).sum(dim=0))


def test_without_it_the_small_ones_are_lost_for_ever() -> None:
    """A constant vector whose second entry is never the largest: only the memory gets it across."""
    x = torch.tensor([3.0, 1.0])
    memory, alone = feedback(topk(1 / 2)), topk(1 / 2)
    own, with_memory, without = {}, torch.zeros(2), torch.zeros(2)
    for key in range(12):
        sent, own = turn(memory, x, own, key)
        with_memory += sent
        without += alone.decode(alone.encode(x, key), 2, 0)
    assert without.tolist() == [36, 0]
    assert ((with_memory - 12 * x).abs() <= 4).all()


def test_decay_zero_is_no_feedback_and_decay_between_forgets_some() -> None:
    x, own = torch.tensor([3.0, 1.0]), {"residual": torch.tensor([0.0, 1.0])}
    for decay, left in ((0.0, 1.0), (0.5, 1.5), (1.0, 2.0)):
        memory = feedback(topk(1 / 2), decay=decay)
        assert turn(memory, x, own)[1]["residual"].tolist() == [0, left]
        assert memory.keeps == decay, "the owner of a shard forgets as much"


def test_inputs_are_not_changed() -> None:
    """fp32 hands on the very tensor it is given: the residual must not be computed in place."""
    x, own = torch.ones(3), {"residual": torch.full((3,), 2.0)}
    sent, after = turn(feedback(fp32), x, own)
    assert x.tolist() == [1] * 3
    assert own["residual"].tolist() == [2] * 3
    assert sent.tolist() == [3] * 3
    assert after["residual"].tolist() == [0] * 3


def test_the_inner_codec_is_called() -> None:
    x = torch.randn(64)
    sent, after = turn(feedback(bf16), x, {})
    assert torch.equal(sent, x.bfloat16().float())
    assert torch.equal(after["residual"], x - sent)


def test_a_codec_that_claims_no_contraction_is_refused_unless_nothing_is_remembered() -> None:
    with pytest.raises(ConfigError, match=r"feedback around fp16: its error may be larger than what it is given"):
        feedback(fp16)
    assert feedback(fp16, decay=0.0).codec == fp16


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
