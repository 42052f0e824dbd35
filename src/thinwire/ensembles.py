"""Ensembles of domain experts (HDEE): nothing is sent while they train, four bytes a token when they answer together.

    train    a seed model; from it one expert for each domain d, trained apart on that domain; steps or sizes may
             differ, under one budget  sum_d steps_d * tokens * parameters_d
    answer   p(x_t | x_<t) = sum_d p_d(x_t | x_<t) p(d | x_<t),    p(d | x_<t) ~ p(d) prod_(s<t) p_d(x_s | x_<s)

Error   identical experts answer as each of them. The mean loss over a text is at most that of any one expert and
        -log p(d) / length more: a wrong prior costs a constant, not a rate.
Size    training: none. Scoring a text: 4 bytes a token from each member to each other; drawing the next token: 4 bytes
        an entry of the vocabulary.
State   one model of every member's own; the prior, alike on all members.
Source  Ersoy et al. 2025, arXiv:2502.19385 (HDEE): equal or different sizes and steps; Li et al. 2022, arXiv:2208.03306
        (branch, train, merge); Gururangan et al. 2022, arXiv:2108.05036: posterior and cached prior, decay 0.3 over 100
        sequences.
Differs the cached prior is an average whose weights sum to one. HDEE's code multiplies the old prior by the n-th power
        of the decay, which leaves nearly the last sequence's posterior alone.

Letters: d experts, t tokens, v vocabulary. Probabilities are natural logarithms in float32; experts share a tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from thinwire.collectives import gather_packets
from thinwire.errors import ConfigError
from thinwire.links.base import Link
from thinwire.packet import Header, Packet

PURPOSE = "experts"  # what the link's meter counts these bytes under


def steps_within(
    budget: float, *, tokens: int, parameters: Sequence[int], weights: Sequence[float] | None = None
) -> list[int]:
    """Training steps of each expert under one budget of tokens times parameters.

    budget      sum over experts of steps * tokens * parameters is at most this
    tokens      of a step
    parameters  of each expert; may differ (M_He in the paper)
    weights     steps are in proportion to them, say to the seed model's loss on the domain (I_He); None for equal steps
    raises      ConfigError if an expert would make no step
    """
    weights = [1.0] * len(parameters) if weights is None else list(weights)
    if len(weights) != len(parameters) or not all(0 < each < math.inf for each in weights):
        raise ConfigError(
            f"weights {weights} for {len(parameters)} experts",
            expected="a number above 0 for each expert",
            mend="weigh by the seed model's loss on each domain, or leave weights out for equal steps",
        )
    unit = budget / (tokens * sum(w * p for w, p in zip(weights, parameters, strict=True)))
    # An exact share may come out a rounding below the whole number that it is.
    steps = [math.floor(w * unit * (1 + 2.0**-40)) for w in weights]
    if not parameters or min(steps) < 1:
        raise ConfigError(
            f"a budget of {budget:g} gives {len(steps)} experts {steps} steps",
            expected="at least one step for each expert",
            mend="raise the budget, or train fewer or smaller experts",
        )
    return steps


def uniform(experts: int) -> Tensor:
    """The prior that knows nothing.  [d]"""
    return torch.full((experts,), -math.log(experts))


def posterior(scores: Tensor, prior: Tensor) -> Tensor:
    """log p(d | x_<t) at every position, from what was seen before it.

    scores   [d, t] each expert's log-probability of the token that came
    prior    [d] log-probabilities
    returns  [d, t]
    """
    before = torch.cat([torch.zeros_like(scores[:, :1]), scores[:, :-1]], dim=1).double().cumsum(dim=1)
    return (before + prior.double().unsqueeze(1)).log_softmax(dim=0).float()


def mixture(scores: Tensor, prior: Tensor) -> Tensor:
    """log p(x_t | x_<t) of the ensemble at every position.

    scores   [d, t] each expert's log-probability of the token that came
    prior    [d] log-probabilities
    returns  [t]
    """
    return (scores + posterior(scores, prior)).logsumexp(dim=0)


def geometric(scores: Tensor) -> Tensor:
    """The cheap variant: the mean of log-probabilities, without a posterior. Not normalised: it sums to less than one.

    scores   [d, t]
    returns  [t]
    """
    return scores.mean(dim=0)


def next_token(distributions: Tensor, seen: Tensor, prior: Tensor) -> Tensor:
    """The ensemble's distribution of the next token.

    distributions  [d, v] each expert's log-probabilities
    seen           [d, t] each expert's log-probabilities of the tokens so far; t may be 0
    prior          [d] log-probabilities
    returns        [v] log-probabilities
    """
    weights = (seen.double().sum(dim=1) + prior.double()).log_softmax(dim=0).float()
    return (distributions + weights.unsqueeze(1)).logsumexp(dim=0)


def cached_prior(held_out: Iterable[Tensor], experts: int, *, decay: float = 0.3) -> Tensor:
    """A domain's prior, from sequences of it that no expert was trained on.

    p(d) <- decay p(d) + (1 - decay) p(d | sequence)      beginning with all alike

    held_out  [d, t] scores of each sequence; HDEE takes 100
    returns   [d] log-probabilities
    """
    if not 0 <= decay < 1:
        raise ConfigError(f"decay={decay}", expected="a number in [0, 1)", mend="0.3 is the papers' value")
    prior = uniform(experts).exp()
    for scores in held_out:
        told = (scores.double().sum(dim=1) + prior.double().log()).softmax(dim=0).float()
        prior = decay * prior + (1 - decay) * told
    return prior.log()


def gather(link: Link, own: Tensor) -> Tensor:
    """What every member's expert says, by rank; all members call it together.

    own      [n] this member's: log-probabilities of the tokens of a text, or of the vocabulary for the next one
    returns  [members, n], alike on all of them
    raises   PeerLost; ConfigError if what this member says is not a vector, PacketError if lengths differ
    """
    if own.ndim != 1:
        raise ConfigError(
            f"log-probabilities of shape {tuple(own.shape)}",
            expected="a vector: one number for each token",
            mend="flatten them; gather(link, scores.flatten()).view(-1, *scores.shape) gives them back",
        )
    value = own.detach().float()
    packet = Packet("fp32", len(value), {"value": value}, Header(sender=link.rank))
    layout = {"value": (torch.float32, len(value))}
    found = gather_packets(link.open(PURPOSE), link.rank, link.members, packet, layout, "what the experts say")
    return torch.stack([packet.fields["value"].to(own.device) for packet in found.values()])


def score(logits: Tensor, targets: Tensor) -> Tensor:
    """An expert's log-probabilities of the tokens that came.

    logits   [..., v], of any float dtype
    targets  int64 [...]
    returns  [...]
    """
    picked = logits.float().log_softmax(dim=-1).gather(-1, targets.unsqueeze(-1))
    return picked.squeeze(-1)
