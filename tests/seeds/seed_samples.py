"""A small model tuned by two members: base, log and what comes of it."""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from torch import Tensor

from thinwire.seeds import rebuild
from thinwire.seeds.digests import digest
from thinwire.seeds.log import Closed, Log
from thinwire.seeds.recipe import Recipe

RECIPE = Recipe(seed=5, samples=2, rule="momentum(0.5)", decay=0.1)


def tuned() -> dict[str, Tensor]:
    """Names out of order, half precision, a vector, a matrix that is tied to `out.weight`."""
    torch.manual_seed(0)
    return {
        "layers.1.weight": torch.randn(4, 6),
        "layers.0.bias": torch.randn(6),
        "layers.0.weight": torch.randn(6, 4).bfloat16(),
        "embed.weight": torch.randn(5, 4),
    }


def frozen() -> dict[str, Tensor]:
    return {"mean": torch.arange(3), "layers.2.weight": torch.ones(2, 2, dtype=torch.float16)}


ALIASES = {"out.weight": "embed.weight"}


def begun(recipe: Recipe = RECIPE) -> Log:
    """The log before the first round."""
    return Log.of(tuned().items(), recipe, frozen=frozen().items(), aliases=ALIASES)


def grown(log: Log, rounds: int, *, lr: float = 0.1, members: int = 2, seed: int = 1) -> Log:
    """With so many rounds of normal scalars more."""
    drawn, state, closed = random.Random(seed), log.state, list(log.rounds)
    for number in range(len(closed), len(closed) + rounds):
        told = {
            member: log.recipe.encode([drawn.gauss(0, 1) for _ in range(log.recipe.samples)], state, number, member)
            for member in range(members)
        }
        closed.append(Closed(number, lr, {member: codes.numpy().tobytes() for member, codes in told.items()}))
        state, _ = log.recipe.step(state, closed[-1])
    return replace(log, rounds=tuple(closed))


def lived(rounds: int, every: int = 2) -> tuple[Log, dict[str, Tensor]]:
    """The log that a member writes and the weights that it holds, moved round by round."""
    model, log = tuned(), begun()
    whole = grown(log, rounds)
    state = log.recipe.start()
    for closed in whole.rounds:
        state, update = log.recipe.step(state, closed)
        rebuild.apply(list(model.items()), [update], log.recipe)
        log = log.append(closed)
        if len(log.rounds) % every == 0:
            log = log.checked(digest(model.items()))
    return log.checked(digest(model.items())), model
