"""Deep gradient compression: where it is SGD with momentum, where it is plain SGD, and what masking does."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import thinwire
from memories import Members
from small import adamw, make_model, same, sgd, train
from thinwire.codecs import DGC, dgc, feedback, fp32, int4, int8, parse, topk, warmup, zstd
from thinwire.errors import ConfigError
from thinwire.links.local import run
from thinwire.method import Phases
from thinwire.methods import every_step, local_sgd

DYADIC = st.lists(st.integers(-64, 64).map(float), min_size=16, max_size=16)
ROUNDS = st.lists(DYADIC, min_size=1, max_size=6)
unhurried = settings(deadline=None, max_examples=25)  # torch loads its optimizers when the first is made


def with_momentum(rounds: list[list[float]], momentum: float, *, nesterov: bool = False) -> Tensor:
    """Where torch's SGD with lr 1 gets from zero, negated.  [n]"""
    weights = torch.zeros(len(rounds[0]), requires_grad=True)
    optimizer = torch.optim.SGD([weights], lr=1.0, momentum=momentum, nesterov=nesterov)
    for row in rounds:
        weights.grad = torch.tensor(row)
        optimizer.step()
    return -weights.detach()


def total(scheme: DGC, rounds: list[list[float]]) -> tuple[Tensor, Tensor]:
    """The sum of one member's updates, and what waits."""
    group = Members(scheme, 1)
    moved = sum((group.round([torch.tensor(row)]) for row in rounds), torch.zeros(len(rounds[0])))
    return moved, group.own[0]["residual"]


@unhurried
@given(rounds=ROUNDS, share=st.floats(0.05, 1.0), nesterov=st.booleans())
def test_without_masking_what_was_sent_and_what_waits_are_sgd_with_momentum(rounds, share, nesterov):
    """For every share; exact: small dyadic numbers and a momentum of 1/2 do not round in float32."""
    moved, waits = total(dgc(topk(share), momentum=0.5, masking=False, nesterov=nesterov), rounds)
    assert torch.equal(moved + waits, with_momentum(rounds, 0.5, nesterov=nesterov))


@unhurried
@given(rounds=ROUNDS)
def test_without_masking_any_codec_may_round(rounds):
    """int4 errs; what it errs by waits. Tolerance: quotients by a scale round, six rounds of numbers up to 128."""
    moved, waits = total(dgc(int4, momentum=0.5, masking=False), rounds)
    assert torch.allclose(moved + waits, with_momentum(rounds, 0.5), atol=1e-3)


@unhurried
@given(rounds=ROUNDS)
def test_everything_sent_is_momentum_without_masking_and_plain_sgd_with_it(rounds):
    for codec in (fp32, topk(1.0)):
        moved, waits = total(dgc(codec, momentum=0.5, masking=False), rounds)
        assert torch.equal(moved, with_momentum(rounds, 0.5))
        assert not waits.any()
        moved, _ = total(dgc(codec, momentum=0.5), [[abs(value) + 1 for value in row] for row in rounds])
        assert torch.equal(moved, torch.tensor(rounds).abs().add(1).sum(dim=0)), "every momentum is masked every round"


@unhurried
@given(rounds=ROUNDS, share=st.floats(0.05, 1.0))
def test_no_momentum_is_feedback(rounds, share):
    plain, scheme = Members(feedback(topk(share)), 1), Members(dgc(topk(share), momentum=0.0), 1)
    for row in rounds:
        assert torch.equal(plain.round([torch.tensor(row)]), scheme.round([torch.tensor(row)]))


def test_a_round_by_hand():
    """m = 1/2: u = (4, 2), then (0, 2)/2 + (1, 1) where the first entry was sent and masked."""
    group = Members(dgc(topk(1 / 2), momentum=0.5), 1)
    assert group.round([torch.tensor([4.0, 2.0])]).tolist() == [4, 0]
    assert {name: held.tolist() for name, held in group.own[0].items()} == {"momentum": [0, 2], "residual": [0, 2]}
    assert group.round([torch.tensor([1.0, 1.0])]).tolist() == [0, 4]
    assert {name: held.tolist() for name, held in group.own[0].items()} == {"momentum": [1, 0], "residual": [1, 0]}
    loose = Members(dgc(topk(1 / 2), momentum=0.5, masking=False), 1)
    loose.round([torch.tensor([4.0, 2.0])])
    assert loose.own[0]["momentum"].tolist() == [4, 2]


def test_what_a_chain_rounds_off_waits_too():
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    group = Members(dgc(topk(1 / 4) | int4), 1)
    sent = group.round([x])
    assert torch.equal(group.own[0]["residual"], x - sent)
    assert group.own[0]["residual"][sent != 0].any()
    assert not group.own[0]["momentum"][sent != 0].any()


def test_clipping_is_local_and_before_the_momentum():
    """Four members: each is cut to a norm of 2 / sqrt(4) = 1."""
    x = [torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4]), torch.zeros(2), torch.full((2,), 3e38)]
    clipped, free = Members(dgc(fp32, clip=2.0), 4), Members(dgc(fp32), 4)
    clipped.round(x)
    free.round(x)
    expected = [[0.6, 0.8], [0.3, 0.4], [0.0, 0.0], [math.sqrt(0.5)] * 2]
    for sent, row in zip(clipped.sent, expected, strict=True):
        assert torch.allclose(sent, torch.tensor(row))
    assert torch.equal(free.sent[0], x[0])


def test_a_member_that_a_round_did_not_count_keeps_its_memory():
    group = Members(dgc(topk(1 / 2)), 2)
    group.round([torch.tensor([4.0, 2.0])] * 2)
    before = group.own[1]
    group.round([torch.tensor([1.0, 1.0]), None])
    assert group.own[1] is before
    assert group.own[0] is not before
    assert torch.equal(group.own[1]["residual"], torch.tensor([0.0, 2.0]))


def test_inputs_are_not_changed():
    for scheme in (dgc(fp32, nesterov=True, clip=0.5), dgc(fp32)):
        group, x = Members(scheme, 1), torch.ones(4)
        group.round([x])
        held = {name: value.clone() for name, value in group.own[0].items()}
        before = group.own[0]
        group.round([x])
        assert x.tolist() == [1] * 4
        assert all(torch.equal(before[name], held[name]) for name in held)


@pytest.mark.parametrize("options", [{"masking": False}, {"masking": True}, {"nesterov": True}])
def test_memories_outlive_the_vector(options):
    group, x = Members(dgc(topk(1 / 2), **options), 1), torch.arange(4.0)
    group.round([x])
    held = {name: value.clone() for name, value in group.own[0].items()}
    x.fill_(100.0)
    assert all(torch.equal(value, held[name]) for name, value in group.own[0].items())


def momentum_sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def test_over_a_link_it_is_training_with_momentum():
    """Everything sent, no masking, plain SGD inside: every_step with SGD(momentum). Tolerance: other order of sums."""
    ours = run(3, lambda link: train(link, every_step(codec=dgc(fp32, masking=False)), 10, make_optimizer=sgd))
    theirs = run(3, lambda link: train(link, every_step(), 10, make_optimizer=momentum_sgd))
    for a, b in zip(ours[0].live, theirs[0].live, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    masked = run(3, lambda link: train(link, every_step(codec=dgc(fp32)), 10, make_optimizer=sgd))
    plain = run(3, lambda link: train(link, every_step(), 10, make_optimizer=sgd))
    for a, b in zip(masked[0].live, plain[0].live, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours[0].live[0], masked[0].live[0], atol=1e-3)


def test_momentum_twice_is_refused():
    def member(link):
        model = make_model()
        said = r"SGD with momentum behind dgc\(fp32\), which has a momentum of its own\n.*\n.*set momentum=0"
        for method in (every_step(codec=dgc(fp32)), Phases(every_step(codec=dgc(fp32)), 3, local_sgd())):
            with pytest.raises(ConfigError, match=said):
                thinwire.synchronize(model, momentum_sgd(model), method, link)
        for allowed in (every_step(codec=dgc(fp32, momentum=0.0)), local_sgd(codec=dgc(topk(1 / 4)))):
            thinwire.synchronize(model, momentum_sgd(model), allowed, link)
        return True

    assert run(1, member) == [True]


def test_moments_behind_it_are_warned_of(caplog):
    def member(link):
        model = make_model()
        thinwire.synchronize(model, adamw(model), every_step(codec=dgc(topk(1 / 4))), link)
        return True

    assert run(1, member) == [True]
    assert "AdamW has moments of its own behind dgc(topk(0.25)), which is made for plain SGD" in caplog.text


def test_the_method_is_its_memory_around_a_warmup():
    method = thinwire.dgc(codec=topk(1 / 64) | int4, momentum=0.5, clip=1.0, warmup=9)
    assert method == every_step(codec=dgc(warmup(topk(1 / 64) | int4, 9), momentum=0.5, clip=1.0))
    assert thinwire.dgc(warmup=0) == every_step(codec=dgc(topk(0.001)))
    assert thinwire.dgc(warmup=3) == every_step(codec=dgc(warmup(topk(0.001), 3, 3)))
    loose = thinwire.dgc(codec=int8, masking=False, nesterov=True, warmup=0)
    assert loose == every_step(codec=dgc(int8, masking=False, nesterov=True))
    with pytest.raises(
        ConfigError, match=r"dgc with codec feedback\(int8\): it has a memory of its own\n.*\n.*codec=int8"
    ):
        thinwire.dgc(codec=feedback(int8))


def test_the_method_without_loss_is_training_with_momentum():
    """Nothing dropped and no masking; tolerance: other order of sums."""
    lossless = thinwire.dgc(codec=topk(1.0), masking=False, warmup=0)
    ours = run(3, lambda link: train(link, lossless, 10, make_optimizer=sgd))
    theirs = run(3, lambda link: train(link, every_step(), 10, make_optimizer=momentum_sgd))
    for a, b in zip(ours[0].live, theirs[0].live, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_expression():
    for scheme in (dgc(topk(1 / 64)), dgc(topk(1 / 64) | int4 | zstd, 0.5, False, True, 2.0)):
        assert parse(scheme.spec) == scheme
    assert dgc(topk(1 / 64), momentum=0.5).spec == "dgc(topk(0.015625), momentum=0.5)"
    assert dgc(int8, masking=False, clip=1).spec == "dgc(int8, masking=False, clip=1)"


def test_what_it_cannot_go_around_is_refused():
    said = (
        r"dgc around int8: it does not keep some elements and drop the others\n.*\n.*dgc\(topk\(1/64\)\), or feedback"
    )
    with pytest.raises(ConfigError, match=said):
        dgc(int8)
    assert dgc(warmup(topk(1 / 64), rounds=5)).codec.selects
    with pytest.raises(ConfigError, match="dgc around fp16: its error may be larger"):
        dgc(thinwire.codecs.fp16, masking=False)
    with pytest.raises(ConfigError, match="dgc around DGC"):
        dgc(dgc(topk(1 / 64)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"momentum": 1.0}, "dgc with momentum 1.0\n  expected  a number at least 0 and below 1\n  mend      0.9 is"),
        ({"momentum": -0.1}, "dgc with momentum -0.1"),
        ({"momentum": math.nan}, "dgc with momentum nan"),
        ({"momentum": "1"}, "dgc with momentum '1'"),
        ({"masking": 1}, "dgc with masking 1\n  expected  True or False"),
        ({"nesterov": "no"}, "dgc with nesterov 'no'"),
        ({"clip": 0}, "dgc is to clip at a norm of 0\n  expected  a number above 0"),
        ({"clip": True}, "dgc is to clip at a norm of True"),
    ],
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        dgc(topk(1 / 4), **options)


def test_masking_and_nesterov_change_what_is_learned():
    base = every_step(codec=dgc(topk(1 / 4)))
    first = run(2, lambda link: train(link, base, 6, make_optimizer=sgd))[0].live
    for options in ({"masking": False}, {"nesterov": True}, {"momentum": 0.5}, {"clip": 0.1}):
        other = every_step(codec=dgc(topk(1 / 4), **options))
        assert not same(first, run(2, lambda link, other=other: train(link, other, 6, make_optimizer=sgd))[0].live)
