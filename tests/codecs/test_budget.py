"""Budgets: that they choose, that all members choose alike, and what the choice saves."""

from __future__ import annotations

import math

import pytest
import torch

import thinwire
from small import batch, loss_of, make_model
from staged import run_alone
from thinwire.codecs import Budget, budget, feedback, int4, int8, layers, parse, powersgd, topk
from thinwire.errors import ConfigError
from thinwire.links.local import run
from thinwire.methods import every_step

SHARES = tuple(topk(share) for share in (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4))
SHAPES = ((64, 64), (64,), (32, 64), (64, 32))
SIZES = [math.prod(shape) for shape in SHAPES]


def skewed(seed: int) -> torch.Tensor:
    """One loud layer with few large entries, and two quiet ones without any."""
    g = torch.Generator().manual_seed(seed)
    loud = torch.randn(SIZES[0], generator=g) * (torch.rand(SIZES[0], generator=g) < 0.01) * 100
    return torch.cat([loud, *(torch.randn(size, generator=g) for size in SIZES[1:])])


def rounds(codec: Budget, count: int):
    shared, done = {}, []
    for seed in range(count):
        result, stages = run_alone(codec, skewed(seed), shared)
        shared = result.shared
        done.append((result, stages))
    return done


def bytes_of(stage) -> int:
    return sum(f.numel() * f.element_size() for f in stage.codec.encode(stage.vector, 0).values())


def error_of(number: int, result) -> float:
    return float((skewed(number) - result.sent).square().sum())


@pytest.mark.parametrize("save", ["bytes", "error"])
@pytest.mark.parametrize("rule", ["dynamic", "proportional"])
def test_it_saves_what_it_is_to_save_and_keeps_to_its_limit(save, rule):
    codec = budget(*SHARES, save=save, rule=rule, window=2).fit(SHAPES)
    uniform = layers(SHARES[2]).fit(SHAPES)
    done = rounds(codec, 4)
    assert [len(stages) for _, stages in done] == [2, 2, 1, 1], "two rounds measure"
    before, after = done[1], done[2]
    assert torch.equal(before[0].sent, uniform.decode(uniform.encode(skewed(1), 0), sum(SIZES), 0))
    plain = float((skewed(2) - uniform.decode(uniform.encode(skewed(2), 0), sum(SIZES), 0)).square().sum())
    # The tensors of the next round are not those measured, but of the same kind: 10 % is more than they differ by.
    if save == "bytes":
        assert bytes_of(after[1][0]) <= (0.8 if rule == "dynamic" else 1.0) * bytes_of(before[1][0])
        assert error_of(2, after[0]) < 1.1 * plain
    else:
        assert bytes_of(after[1][0]) <= bytes_of(before[1][0]) + 64
        assert error_of(2, after[0]) < (0.9 if rule == "dynamic" else 1.01) * plain


def test_a_new_choice_comes_every_refresh_and_the_old_one_stays_if_little_is_saved():
    codec = budget(*SHARES, window=1, refresh=3).fit(SHAPES)
    done = rounds(codec, 8)
    assert [len(stages) for _, stages in done] == [2, 1, 1, 2, 1, 1, 2, 1]
    choices = [tuple(result.shared["choice"].tolist()) for result, _ in done]
    assert len(set(choices)) == 1, "tensors of one kind: no new choice saves 5 %"
    assert choices[0] != (2, 2, 2)


def test_options_have_their_effect():
    def choice(**given) -> list[int]:
        return rounds(budget(*SHARES, **{"window": 1, **given}).fit(SHAPES), 2)[1][0].shared["choice"].tolist()

    usual = choice()
    assert sum(choice(limit=1.3)) < sum(usual) < sum(choice(limit=0.8))
    assert choice(like=1) != usual
    assert choice(norm="plain", limit=1.3) != choice(limit=1.3)
    assert len(choice(small=4096)) == 1


RANKS = tuple(powersgd(rank) for rank in (1, 2, 4, 8))


def low_rank(seed: int) -> torch.Tensor:
    """Matrices of rank 1 (loud), 6 and 3, and a little noise."""
    g = torch.Generator().manual_seed(seed)
    parts = []
    for shape, rank, size in zip(SHAPES, (1, 0, 6, 3), (20.0, 1.0, 1.0, 1.0), strict=True):
        if len(shape) == 1:
            parts.append(torch.randn(shape, generator=g))
            continue
        fixed = torch.Generator().manual_seed(1000 + rank)  # the same space in all rounds: the warm start finds it
        a, b = torch.randn(shape[0], rank, generator=fixed), torch.randn(rank, shape[1], generator=fixed)
        parts.append(size * (a @ b) + 0.01 * torch.randn(shape, generator=g))
    return torch.cat([part.reshape(-1) for part in parts])


def test_ranks_of_powersgd():
    """What has rank 1 gets rank 1, and the others more, at the error of one rank for all."""
    codec = budget(*RANKS, like=2, window=2, small=0).fit(SHAPES)
    uniform = powersgd(4).fit(SHAPES)
    shared, alike, sizes, errors = {}, {}, [], []
    for seed in range(8):
        x = low_rank(seed)
        result, stages = run_alone(codec, x, shared)
        plain, plain_stages = run_alone(uniform, x, alike)
        shared, alike = result.shared, plain.shared
        assert len(stages) == (3 if seed < 2 else 2)
        sizes.append((sum(len(s.vector) for s in stages[:2]), sum(len(s.vector) for s in plain_stages)))
        errors.append((float((x - result.sent).square().sum()), float((x - plain.sent).square().sum())))
        if seed == 1:
            assert set(shared) == {"number", "choice"}, "a warm start is of the ranks that were"
    ranks = [RANKS[option].rank for option in shared["choice"].tolist()]
    assert ranks[0] == 1
    assert sizes[0][0] == sizes[0][1]
    assert sizes[-1][0] < 0.9 * sizes[-1][1]
    assert errors[-1][0] <= 1.05 * errors[-1][1]


def test_all_members_choose_the_same_ranks():
    method = every_step(codec=budget(powersgd(1), powersgd(2), limit=4.0, window=2, small=4))

    def member(link):
        model = torch.nn.Linear(12, 12)
        torch.nn.init.zeros_(model.weight), torch.nn.init.zeros_(model.bias)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        g = torch.Generator().manual_seed(link.rank)
        with thinwire.synchronize(model, optimizer, method, link) as sync:
            for _ in range(5):
                noise = 0.1 * torch.randn(12, 12, generator=g)
                model.weight.grad = torch.randn(12, 1, generator=g) @ torch.ones(1, 12) + noise
                model.bias.grad = torch.randn(12, generator=g)
                optimizer.step()
            return model.weight.detach().clone(), sync.state_dict()["fragments"][0]["carried"]["stages"]

    results = run(3, member)
    assert all(torch.equal(weight, results[0][0]) for weight, _ in results)
    assert results[0][1]["choice"].tolist() == [0], "gradients of rank one, but for the noise"


def test_unfitted_it_writes_a_vector_as_one_layer():
    x = torch.randn(4096)
    result, stages = run_alone(budget(int4, int8, window=1), x, {})
    assert len(stages) == 2
    assert result.sent.shape == x.shape


def test_all_members_choose_alike_and_go_on_after_a_resume():
    """Members whose gradients differ; the state saved and loaded gives the same bits."""
    method = every_step(codec=feedback(budget(*SHARES, window=2, refresh=4, small=8)))

    def member(link, stop):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        saved = None
        with thinwire.synchronize(model, optimizer, method, link) as sync:
            for step in range(8):
                if step == stop:
                    saved = sync.state_dict(), {n: p.clone() for n, p in model.state_dict().items()}
                    for p in model.parameters():
                        p.data.zero_()
                    sync.load_state_dict(saved[0])
                    model.load_state_dict(saved[1])
                optimizer.zero_grad()
                loss_of(model, *batch(step, link.rank)).backward()
                optimizer.step()
            state = sync.state_dict()["fragments"][0]["carried"]
        return [p.detach().clone() for p in model.parameters()], state

    whole, resumed = run(3, lambda link: member(link, None)), run(3, lambda link: member(link, 5))
    for weights, state in [*whole, *resumed]:
        assert all(torch.equal(a, b) for a, b in zip(weights, whole[0][0], strict=True))
        assert torch.equal(state["stages"]["choice"], whole[0][1]["stages"]["choice"])
    assert set(whole[0][1]["stages"]["choice"].tolist()) != {2}


def test_the_expression():
    made = budget(topk(1 / 200), topk(1 / 100), like=0, save="error", window=3, refresh=7, small=0, rule="proportional")
    assert parse(made.spec) == made
    assert parse(f"feedback({budget(*SHARES).spec})") == feedback(budget(*SHARES))
    assert budget(*SHARES).spec.startswith("budget(topk(0.015625")
    assert every_step(codec=budget(*SHARES)).codec == feedback(budget(*SHARES)), "as its options want"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: budget(topk(1 / 2)), r"a budget of 1 option\(s\)\n  expected  two codecs or more"),
        (lambda: budget(topk(1 / 2), 3), "a budget with option 3"),
        (
            lambda: budget(powersgd(1), topk(1 / 2)),
            r"a budget with option TopK.*\n  expected  .*, or two ranks",
        ),
        (lambda: budget(*SHARES, like=5), "like=5 of 5 options\n  expected  a whole number from 0 to 4"),
        (lambda: budget(*SHARES, save="time"), "save='time'\n  expected  save one of 'bytes', 'error'"),
        (lambda: budget(*SHARES, limit=0), "limit=0\n  expected  a number above 0"),
        (lambda: budget(*SHARES, window=0), "window=0 with refresh=100"),
        (lambda: budget(*SHARES, like=0.5), "like=0.5 of 5 options"),
        (lambda: budget(*SHARES, window=2.5), "window=2.5 with refresh=100"),
        (lambda: budget(*SHARES, refresh="10"), "window=10 with refresh='10'"),
        (lambda: budget(*SHARES, window=9, refresh=8), "window=9 with refresh=8"),
        (lambda: budget(*SHARES, window=1.5, refresh=2.5), "window=1.5 with refresh=2.5\n  expected  whole numbers"),
        (lambda: budget(*SHARES, window="9"), "window='9' with refresh=100"),
        (lambda: budget(*SHARES, like=True), "like=True of 5 options"),
        (lambda: budget(*SHARES, limit="1"), "limit='1'\n  expected  a number above 0"),
        (lambda: budget(*SHARES, small=-1), "small=-1\n  expected  a whole number of at least 0"),
        (lambda: budget(*SHARES) | int8, r"budget\(.* \| ...: it is no codec but a round of several exchanges"),
    ],
)
def test_what_cannot_be_budgeted_is_refused(make, said):
    with pytest.raises(ConfigError, match=said):
        make()
