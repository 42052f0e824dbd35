"""Ensembles of domain experts: the mathematics on distributions that are known, and the bytes on a link."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from thinwire import ConfigError
from thinwire.ensembles import (
    PURPOSE,
    cached_prior,
    gather,
    geometric,
    mixture,
    next_token,
    posterior,
    score,
    steps_within,
    uniform,
)
from thinwire.links.local import run

# Two bigram models of two tokens: rows are the token before, columns the next one.
CHAINS = torch.tensor([[[0.9, 0.1], [0.4, 0.6]], [[0.5, 0.5], [0.5, 0.5]]], dtype=torch.float64)


def walk(chain: Tensor, length: int, seed: int) -> Tensor:
    """A text of `length` + 1 tokens from a bigram model.  int64 [length + 1]"""
    draws = torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).tolist()
    first, tokens = chain[:, 0].tolist(), [0]
    for draw in draws:
        tokens.append(0 if draw < first[tokens[-1]] else 1)
    return torch.tensor(tokens)


def scores_of(tokens: Tensor) -> Tensor:
    """Both experts' log-probabilities of every token after the first.  [2, t]"""
    return CHAINS.log()[:, tokens[:-1], tokens[1:]].float()


# --- the posterior ------------------------------------------------------------------------------------------------


def test_the_posterior_finds_the_domain_at_the_rate_of_the_kl_divergence():
    """Log odds over length -> E_stationary KL(true || other). Ten texts of 2000 tokens: within 4 standard errors."""
    true, other = CHAINS
    stationary = torch.tensor([0.8, 0.2], dtype=torch.float64)  # 0.8 * 0.1 = 0.2 * 0.4
    rate = float((stationary.unsqueeze(1) * true * (true / other).log()).sum())
    found = []
    for seed in range(10):
        scores = scores_of(walk(true, 2000, seed))
        told = posterior(scores, uniform(2))
        assert told[0, -1] > -1e-6, "it is sure"
        odds = scores.double().cumsum(dim=1)
        found.append(float(odds[0, -2] - odds[1, -2]) / 1999)
        middle = told[0, 20].double() - told[1, 20].double()
        assert float(middle) == pytest.approx(float(odds[0, 19] - odds[1, 19]), abs=1e-4), "log odds are what was seen"
    spread = torch.tensor(found).std() / math.sqrt(len(found))
    assert sum(found) / len(found) == pytest.approx(rate, abs=4 * float(spread))


def test_the_posterior_knows_nothing_of_the_token_it_weighs():
    scores = scores_of(walk(CHAINS[0], 50, 0))
    changed = scores.clone()
    changed[:, 30] = torch.tensor([-9.0, -1.0])
    assert torch.equal(posterior(scores, uniform(2))[:, :31], posterior(changed, uniform(2))[:, :31])
    assert not torch.equal(posterior(scores, uniform(2))[:, 31], posterior(changed, uniform(2))[:, 31])


def test_one_token_by_hand():
    """Uniform: (0.9 + 0.5) / 2. A prior of 3 to 1: 0.75 * 0.9 + 0.25 * 0.5. Then the second, weighed by the first."""
    scores = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log()
    assert mixture(scores[:, :1], uniform(2)).exp().tolist() == pytest.approx([0.7])
    prior = torch.tensor([0.75, 0.25]).log()
    told = 0.675 / (0.675 + 0.125)
    assert mixture(scores, prior).exp().tolist() == pytest.approx([0.8, told * 0.1 + (1 - told) * 0.5])
    assert geometric(scores).exp().tolist() == pytest.approx([math.sqrt(0.45), math.sqrt(0.05)])


def test_identical_experts_answer_as_each_of_them():
    scores = scores_of(walk(CHAINS[0], 100, 1))[:1].expand(3, -1)
    assert torch.allclose(mixture(scores, uniform(3)), scores[0], atol=1e-6)
    assert torch.allclose(geometric(scores), scores[0], atol=1e-6)


def test_probabilities_sum_to_one_but_for_the_geometric_mean():
    tokens = walk(CHAINS[0], 30, 2)
    seen, rows = scores_of(tokens), CHAINS[:, tokens[-1]].log().float()
    told = next_token(rows, seen, torch.tensor([0.2, 0.8]).log())
    assert float(told.exp().sum()) == pytest.approx(1.0, abs=1e-6)
    assert float(next_token(rows, seen[:, :0], uniform(2)).exp().sum()) == pytest.approx(1.0, abs=1e-6)
    assert float(geometric(rows).exp().sum()) < 1 - 1e-3


def test_the_next_token_is_what_the_mixture_says_of_it():
    tokens = walk(CHAINS[0], 30, 3)
    scores, prior = scores_of(tokens), torch.tensor([0.3, 0.7]).log()
    rows = CHAINS[:, tokens[-2]].log().float()
    told = next_token(rows, scores[:, :-1], prior)
    assert float(told[tokens[-1]]) == pytest.approx(float(mixture(scores, prior)[-1]), abs=1e-5)


def test_the_ensemble_is_no_worse_than_its_best_expert_and_a_constant():
    for seed in range(5):
        scores = scores_of(walk(CHAINS[seed % 2], 200, seed))
        assert float(mixture(scores, uniform(2)).sum()) >= float(scores.sum(dim=1).max()) - math.log(2) - 1e-3


def test_long_texts_stay_finite():
    scores = torch.full((2, 5000), -20.0)
    scores[1] -= 5
    assert torch.isfinite(mixture(scores, uniform(2))).all()
    assert mixture(scores, uniform(2))[-1] == -20.0


# --- the prior ------------------------------------------------------------------------------------------------------


def test_the_cached_prior_learns_the_domain():
    held_out = [scores_of(walk(CHAINS[1], 60, seed)) for seed in range(20)]
    prior = cached_prior(held_out, 2)
    assert float(prior.exp().sum()) == pytest.approx(1.0, abs=1e-6)
    assert prior[1] > math.log(0.9)
    text = scores_of(walk(CHAINS[1], 5, 99))
    assert mixture(text, prior).sum() > mixture(text, uniform(2)).sum(), "it helps at the beginning of a text"


def test_the_cached_prior_by_hand():
    """One sequence of odds 3 to 1 from even: 0.3 * 0.5 + 0.7 * 0.75; a second: 0.675 -> posterior 0.8617."""
    sequence = torch.tensor([[0.75], [0.25]]).log()
    assert cached_prior([], 2).exp().tolist() == pytest.approx([0.5, 0.5])
    assert cached_prior([sequence], 2).exp()[0].item() == pytest.approx(0.675)
    told = 0.675 * 0.75 / (0.675 * 0.75 + 0.325 * 0.25)
    assert cached_prior([sequence] * 2, 2).exp()[0].item() == pytest.approx(0.3 * 0.675 + 0.7 * told)
    assert cached_prior([sequence], 2, decay=0.0).exp()[0].item() == pytest.approx(0.75)


def test_a_decay_of_one_is_refused():
    with pytest.raises(ConfigError, match=r"decay=1.0\n.*in \[0, 1\)\n.*0.3 is the papers'"):
        cached_prior([], 2, decay=1.0)


# --- the budget -----------------------------------------------------------------------------------------------------


def test_one_budget_however_it_is_spent():
    """tokens x parameters, not steps: an expert twice as large makes half the progress for it."""
    budget = 3 * 100 * 64 * 1000
    assert steps_within(budget, tokens=64, parameters=[1000] * 3) == [100] * 3
    assert steps_within(budget, tokens=64, parameters=[1000] * 3, weights=[1, 2, 3]) == [50, 100, 150]
    assert steps_within(budget, tokens=64, parameters=[500, 1000, 1500]) == [100] * 3
    steps = steps_within(budget, tokens=64, parameters=[500, 1000, 2500], weights=[1.0, 1.3, 1.7])
    spent = sum(s * 64 * p for s, p in zip(steps, [500, 1000, 2500], strict=True))
    assert budget - 64 * 4000 <= spent <= budget
    assert [round(each / steps[0], 1) for each in steps] == [1.0, 1.3, 1.7]


def test_budgets_that_make_no_sense():
    with pytest.raises(ConfigError, match=r"gives 2 experts \[0, 0\] steps\n.*at least one.*\n.*raise the budget"):
        steps_within(100, tokens=64, parameters=[1000, 1000])
    for weights in ([1.0], [1.0, 0.0], [1.0, math.inf]):
        with pytest.raises(ConfigError, match=r"for 2 experts\n.*above 0 for each expert\n.*seed model's loss"):
            steps_within(1e9, tokens=64, parameters=[10, 10], weights=weights)


# --- over a link ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("members", [1, 2, 3])
def test_members_score_together_for_four_bytes_a_token(members):
    """Each has one expert; what is mixed has the bits of having all of them. Twice the tokens: 4 bytes each more."""

    def member(link, length):
        generator = torch.Generator().manual_seed(link.rank)
        logits, targets = torch.randn(length, 7, generator=generator), torch.arange(length) % 7
        together = gather(link, score(logits, targets))
        return together, mixture(together, uniform(members)), link.meter.by_purpose()[PURPOSE].sent_bytes

    found = run(members, lambda link: member(link, 50))
    apart = []
    for rank in range(members):
        logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(rank))
        apart.append(torch.log_softmax(logits, dim=1)[torch.arange(50), torch.arange(50) % 7])
    for together, mixed, _ in found:
        assert torch.equal(together, torch.stack(apart))
        assert torch.equal(mixed, mixture(torch.stack(apart), uniform(members)))
    twice = run(members, lambda link: member(link, 100))
    assert [b[2] - a[2] for a, b in zip(found, twice, strict=True)] == [4 * 50 * (members - 1)] * members
    assert found[0][2] < (4 * 50 + 200) * max(1, members - 1), "a header beside them"


def test_only_a_vector_is_gathered():
    def member(link):
        text = r"shape \(2, 3\)\n.*a vector.*\n.*gather\(link, scores.flatten"
        with pytest.raises(ConfigError, match=text):
            gather(link, torch.zeros(2, 3))

    run(2, member)
