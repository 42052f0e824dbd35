"""Methods that leave members apart in part: SPARTA, and DeMo with its momentum at home."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import thinwire
from small import batch, loss_of, make_model, sgd, train
from thinwire import ConfigError, demo, local_sgd, sparta
from thinwire.codecs import ErrorFeedback, bf16, dct, fp32, randk, topk
from thinwire.codecs.randk import RandK
from thinwire.links.base import Link
from thinwire.links.local import run
from thinwire.method import Method
from thinwire.outer import Patch
from thinwire.payloads import Delta
from thinwire.randomness import mix
from thinwire.schedules import Every


def follow(link: Link, method: Method, steps: int) -> list[Tensor]:
    """All parameters as one vector, after every local step."""
    model = make_model()
    optimizer = sgd(model)
    seen = []
    with thinwire.synchronize(model, optimizer, method, link):
        for step in range(steps):
            loss_of(model, *batch(step, link.rank)).backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return seen


# --- sparta ----------------------------------------------------------------------------------------------------------


def test_all_parameters_are_local_sgd():
    """theta - mean(a - theta_j) against mean(theta_j): float32 sums of the same numbers in another order."""
    part = run(3, lambda link: train(link, sparta(share=1.0, every=2), 8))
    whole = run(3, lambda link: train(link, local_sgd(every=2), 8))
    for a, b in zip(part, whole, strict=True):
        assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a.live, b.live, strict=True))


def test_what_was_drawn_is_the_mean_and_the_rest_is_each_members_own():
    with_it, without = (run(2, lambda link, m=m: follow(link, m, 1)) for m in (sparta(share=0.25), local_sgd(every=9)))
    n = with_it[0][0].numel()
    drawn = RandK(0.25).decode(RandK(0.25).encode(torch.ones(n), key := mix(mix(0, 0, 0), 2)), n, key) != 0
    assert 0.2 < drawn.float().mean() < 0.3
    mean = (without[0][0] + without[1][0]) / 2
    for ours, alone in zip(with_it, without, strict=True):
        assert torch.equal(ours[0][~drawn], alone[0][~drawn])
        assert torch.allclose(ours[0][drawn], mean[drawn], atol=1e-6)
    assert torch.equal(with_it[0][0][drawn], with_it[1][0][drawn]), "to the bit"


def test_a_mean_that_comes_late_goes_under_the_steps_made_since():
    """Sent after step 2, applied after step 3: the third step's change is kept where entries were averaged."""
    method = sparta(share=1.0).but(schedule=Every(2, overlap=1))
    late = run(2, lambda link: follow(link, method, 3))
    alone = run(2, lambda link: follow(link, local_sgd(every=9), 3))
    mean = (alone[0][1] + alone[1][1]) / 2
    for ours, own in zip(late, alone, strict=True):
        assert torch.allclose(ours[2], mean + (own[2] - own[1]), atol=1e-6)


def test_every_entry_is_averaged_sooner_or_later():
    """1 - (1 - p)^T of the entries after T rounds: 0.954 for p = 0.05 and T = 60; within three standard deviations."""
    n, p, rounds = 4000, 0.05, 60
    touched = torch.zeros(n, dtype=torch.bool)
    for number in range(rounds):
        key = mix(0, number, 0)
        touched |= RandK(p).decode(RandK(p).encode(torch.ones(n), key), n, key) != 0
    expected = 1 - (1 - p) ** rounds
    assert touched.float().mean().item() == pytest.approx(expected, abs=3 * (expected * (1 - expected) / n) ** 0.5)


def test_the_models_stay_closer_the_more_is_averaged():
    def spread(share: float | None) -> float:
        method = local_sgd(every=99) if share is None else sparta(share=share)
        rows = torch.stack([seen[-1] for seen in run(3, lambda link: follow(link, method, 30))])
        return float((rows - rows.mean(dim=0)).norm())

    apart, little, much = spread(None), spread(0.02), spread(0.2)
    assert much < 0.7 * little < 0.7 * apart


def test_the_model_to_use_is_the_mean_of_all():
    def member(link: Link) -> tuple[list[Tensor], list[Tensor], bool]:
        model = make_model()
        optimizer = sgd(model)
        with thinwire.synchronize(model, optimizer, sparta(share=0.1), link) as sync:
            for step in range(3):
                loss_of(model, *batch(step, link.rank)).backward()
                optimizer.step()
                optimizer.zero_grad()
            live = torch.cat([p.detach().flatten() for p in model.parameters()])
            with sync.evaluating():
                used = torch.cat([p.detach().flatten() for p in model.parameters()])
            after = torch.cat([p.detach().flatten() for p in model.parameters()])
            return [live, used, after], sync.consensus(), sync.has_consensus

    results = run(2, member)
    mean = torch.stack([vectors[0] for vectors, _, _ in results]).mean(dim=0)
    for (live, used, after), consensus, has in results:
        assert torch.equal(used, mean)
        assert torch.equal(consensus[0], mean)
        assert torch.equal(live, after)
        assert not has


def test_patch_refuses_members_that_select_for_themselves():
    with pytest.raises(ConfigError, match=r"Patch\(\) with codec .*topk\(0.1\).*entries of its own\n.*\n.*randk"):
        Method(schedule=Every(1), payload=Delta(), codec=ErrorFeedback(topk(0.1), decay=0), outer=Patch())
    for codec in (fp32, randk(0.1) | bf16):
        sparta(codec=codec)
    for codec in (randk(0.1), ErrorFeedback(randk(0.1), decay=0.5)):  # the first is given a memory by Method
        with pytest.raises(ConfigError, match=r"feedback\(randk.*owed as well\n.*without memory\n.*decay=0"):
            Method(schedule=Every(1), payload=Delta(), codec=codec, outer=Patch())
    with pytest.raises(ConfigError, match=r"Patch.*over Islands.*\n.*\n.*Everyone"):
        sparta().but(topology=thinwire.topologies.Islands(2))
    with pytest.raises(ConfigError, match=r"Patch.*with aggregator Median.*\n.*plain mean"):
        sparta(codec=fp32).but(aggregator=thinwire.aggregators.Median())


# --- demo ------------------------------------------------------------------------------------------------------------


def test_all_coefficients_are_sign_sgd_on_the_mean_gradient():
    """With all of them sent nothing waits; coefficients near 0 may round to the other sign: the codec's 2^-28."""
    steps, lr = 5, 0.1
    ours = run(2, lambda link: follow(link, demo(codec=dct(1.0)), steps))
    model = make_model()
    flips = 0
    for step in range(steps):
        for rank in range(2):
            (loss_of(model, *batch(step, rank)) / 2).backward()
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(lr * p.grad.sign())
        model.zero_grad()
        reference = torch.cat([p.detach().flatten() for p in model.parameters()])
        flips += int((ours[0][step] - reference).abs().gt(lr / 2).sum())
    assert torch.equal(ours[0][-1], ours[1][-1])
    assert flips == 0


def test_sent_and_kept_are_the_decayed_input():
    """m_i before = q_i + m_i after, for every member and round; by hand with the codec itself."""
    codec, decay = dct(1 / 8), 0.9
    memory = demo(codec=codec, decay=decay).feedback
    generator = torch.Generator().manual_seed(1)
    own, place, expected = {}, None, torch.zeros(200)
    for number in range(6):
        g = torch.randn(200, generator=generator)
        target, held = memory.prepare(g, own, {}, place)
        expected = decay * (expected if number else torch.zeros(200)) + g
        assert torch.allclose(target, expected, atol=1e-6)
        sent = codec.decode(codec.encode(target, number), 200, number)
        own = memory.commit(target, held, sent)
        assert torch.equal(own["residual"], target - sent)
        expected = expected - sent


def test_a_step_is_a_sign_times_the_learning_rate_and_nothing_moves_without_a_coefficient():
    """By 0.1 or not at all, alike on all members."""
    seen = run(2, lambda link: follow(link, demo(codec=dct(1 / 64)), 2))
    moves = (seen[0][1] - seen[0][0]).abs()
    assert torch.all((moves - 0.1).abs().lt(1e-6) | moves.lt(1e-6))
    assert torch.equal(seen[0][1], seen[1][1])
