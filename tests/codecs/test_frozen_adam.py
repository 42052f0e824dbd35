"""1-bit Adam: Adam while nothing is frozen, Adam with a known variance afterwards, and signs that do their work."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import thinwire
from memories import Members, vectors
from small import make_model, same, sgd, train
from thinwire.codecs import fp16, fp32, frozen_adam, int8, parse, sign, switch, topk
from thinwire.errors import ConfigError
from thinwire.links.local import run
from thinwire.methods import every_step, one_bit_adam

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


def small_steps(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-2)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-2)


def directions(rounds: list[Tensor], freeze: int) -> list[Tensor]:
    """Adam's updates of one member's gradients in float64, v and its correction as they were at step `freeze`.  [n]"""
    m = v = torch.zeros(len(rounds[0]), dtype=torch.float64)
    found = []
    for t, g in enumerate(rounds, start=1):
        m = BETA1 * m + (1 - BETA1) * g.double()
        if t <= freeze:
            v = BETA2 * v + (1 - BETA2) * g.double() ** 2
        found.append(m / (1 - BETA1**t) / ((v / (1 - BETA2 ** min(t, freeze))).sqrt() + EPS))
    return found


@pytest.mark.parametrize("members", [1, 3])
def test_never_frozen_it_is_adam(members):
    """Against torch.optim.Adam on combined gradients. Adam divides by sqrt(v): relative errors of 1e-6 a step remain
    such, ten steps of 0.01 long."""
    for codec in (frozen_adam(fp32), frozen_adam(switch(fp32, 99, sign))):
        ours = run(members, lambda link, c=codec: train(link, every_step(codec=c), 10, make_optimizer=small_steps))
        theirs = run(members, lambda link: train(link, every_step(), 10, make_optimizer=adam))
        for a, b in zip(ours[0].live, theirs[0].live, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-5)


def test_decay_of_the_inner_optimizer_is_adamws():
    def with_decay(kind, **options):
        return lambda model: kind(model.parameters(), lr=1e-2, weight_decay=0.1, **options)

    codec = frozen_adam(fp32)
    ours = run(2, lambda link: train(link, every_step(codec=codec), 8, make_optimizer=with_decay(torch.optim.SGD)))
    theirs = run(2, lambda link: train(link, every_step(), 8, make_optimizer=with_decay(torch.optim.AdamW)))
    for a, b in zip(ours[0].live, theirs[0].live, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("freeze", [1, 4, 20])
def test_frozen_and_without_loss_it_is_adam_with_the_variance_of_that_step(freeze):
    """Tolerance: float32 against float64, some ten roundings a step, relative to directions of about one."""
    group, rounds = Members(frozen_adam(switch(fp32, freeze, topk(1.0))), 1), [vectors(1, 40, t)[0] for t in range(12)]
    for x, expected in zip(rounds, directions(rounds, freeze), strict=True):
        assert torch.allclose(group.round([x]).double(), expected, rtol=1e-5, atol=1e-5)
    assert int(group.shared["rounds"]) == 12
    frozen = group.shared["variance"]
    group.round([rounds[0]])
    assert torch.equal(frozen, group.shared["variance"]) == (freeze < 12)


def test_what_signs_lose_waits():
    """b1 = 0: the sum of what was sent and what waits is the sum of gradients. Tolerance: sums of 20 float32 rounds."""
    group = Members(frozen_adam(switch(fp32, 1, sign(block=8)), beta1=0.0), 2)
    group.round(vectors(2, 40, 0))
    sent, given = torch.zeros(40), torch.zeros(40)
    for number in range(1, 21):
        x = vectors(2, 40, number)
        group.round(x)
        sent, given = sent + group.shared["momentum"], given + (x[0] + x[1]) / 2
    owed = (group.own[0]["residual"] + group.own[1]["residual"]) / 2
    assert torch.allclose(sent + owed, given, atol=20 * 16 * 2.0**-24)
    assert owed.any()


def test_entries_that_never_had_a_gradient_stay():
    """One bit cannot be zero: without the mask it would be divided by sqrt(0) + eps."""
    group = Members(frozen_adam(switch(fp32, 2, sign(block=8))), 2)
    for number in range(6):
        x = vectors(2, 16, number)
        for each in x:
            each[5:8] = 0 if number < 4 else 1
        update = group.round(x)
        assert not update[5:8].any()
        assert update.abs().max() < 100
        assert all(not own["residual"][5:8].any() for own in group.own if own)
    assert update[:5].all()


def test_a_gradient_that_comes_too_late_does_not_disturb_the_others():
    """To the bit: an entry without a variance is not in the block's magnitude, whatever its gradient is later."""
    late, never = (Members(frozen_adam(switch(fp32, 2, sign(block=8))), 1) for _ in range(2))
    for number in range(5):
        x = vectors(1, 8, number)[0]
        x[3] = 0
        quiet = never.round([x])
        x = x.clone()
        x[3] = 100.0 if number >= 2 else 0.0
        assert torch.equal(late.round([x]), quiet)


def test_a_member_that_a_round_did_not_count_keeps_what_waits_and_follows_the_rest():
    group = Members(frozen_adam(switch(fp32, 1, sign(block=8))), 2)
    for number in range(3):
        group.round(vectors(2, 16, number))
    before, moved = group.own[1], group.shared["momentum"]
    group.round([vectors(1, 16, 9)[0], None])
    assert group.own[1] is before
    assert not torch.equal(moved, group.shared["momentum"])
    assert int(group.shared["rounds"]) == int(group.stages["rounds"]) == 4


def test_shared_state_is_alike_on_processors_that_fuse_products_and_sums_and_on_others():
    first, second = (x.numpy() for x in vectors(2, 5000))
    group, f = Members(frozen_adam(fp32), 1), np.float32
    group.round([torch.from_numpy(first)])
    group.round([torch.from_numpy(second)])
    m, v = first * f(1 - BETA1), (first * first) * f(1 - BETA2)
    m, v = m * f(BETA1) + second * f(1 - BETA1), v * f(BETA2) + (second * second) * f(1 - BETA2)
    assert np.array_equal(group.shared["momentum"].numpy(), m)
    assert np.array_equal(group.shared["variance"].numpy(), v)


def test_it_trains_at_one_bit():
    """On the small task: nearer to Adam's loss than a quarter of the way that Adam comes, for a 20th of the bytes."""

    def losses(method, make_optimizer, steps):
        def member(link):
            trained = train(link, method, steps, make_optimizer=make_optimizer)
            model = make_model()
            with torch.no_grad():
                for p, value in zip(model.parameters(), trained.live, strict=True):
                    p.copy_(value)
                x, y = held_out()
                return float(nn.functional.cross_entropy(model(x), y)), trained.sent_bytes

        return run(2, member)[0]

    def held_out():
        from small import batch

        parts = [batch(1000 + number, 0) for number in range(8)]
        return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])

    first, _ = losses(every_step(), adam, 0)
    exact, _ = losses(every_step(), adam, 60)
    ours, sent = losses(one_bit_adam(freeze=15), small_steps, 60)
    _, warm = losses(one_bit_adam(freeze=15), small_steps, 15)
    assert exact < ours < exact + (first - exact) / 4
    assert (sent - warm) / 45 < warm / 15 / 3, "packets here are small: headers are most of them"


def test_the_method_is_its_parts():
    assert one_bit_adam() == every_step(codec=frozen_adam(switch(fp32, 1000, sign)))
    other = one_bit_adam(freeze=5, codec=int8, beta1=0.5, beta2=0.9, eps=1e-4)
    assert other == every_step(codec=frozen_adam(switch(fp32, 5, int8), beta1=0.5, beta2=0.9, eps=1e-4))
    with pytest.raises(ConfigError, match=r"one_bit_adam with codec feedback\(int8\): it has a memory of its own"):
        one_bit_adam(codec=thinwire.codecs.feedback(int8))


def test_members_agree_and_every_option_changes_the_result():
    first = run(3, lambda link: train(link, one_bit_adam(freeze=3), 7, make_optimizer=sgd))
    assert all(same(first[0].live, other.live) for other in first)
    for options in ({"freeze": 4}, {"codec": int8}, {"beta1": 0.5}, {"beta2": 0.9}, {"eps": 1e-2}):
        method = one_bit_adam(**{"freeze": 3, **options})
        assert not same(first[0].live, run(3, lambda link, m=method: train(link, m, 7, make_optimizer=sgd))[0].live)


def test_expression():
    for codec in (frozen_adam(fp32), frozen_adam(switch(fp32, 5, sign), beta1=0.8, beta2=0.9, eps=1e-6)):
        assert parse(codec.spec) == codec
    assert frozen_adam(switch(fp32, 5, sign), eps=1e-6).spec == "frozen_adam(switch(fp32, 5, sign), eps=1e-06)"


def test_what_it_cannot_go_around_is_refused():
    said = r"frozen_adam around sign: it loses something before the variance is known\n.*\n.*switch\(fp32, 1000, sign\)"
    with pytest.raises(ConfigError, match=said):
        frozen_adam(sign)
    with pytest.raises(ConfigError, match=r"frozen_adam around switch.int8, 5, sign.: it loses something"):
        frozen_adam(switch(int8, 5, sign))
    with pytest.raises(ConfigError, match=r"frozen_adam around switch.fp32, 5, fp16.: its error may be larger"):
        frozen_adam(switch(fp32, 5, fp16))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"beta1": 1.0},
            "frozen_adam with beta1 1.0\n  expected  a number at least 0 and below 1\n  mend      leave",
        ),
        ({"beta2": math.nan}, "frozen_adam with beta2 nan"),
        ({"eps": 0}, "frozen_adam with eps 0\n  expected  a number above 0"),
    ],
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        frozen_adam(fp32, **options)
