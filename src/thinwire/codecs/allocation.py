"""One option for each layer, so that a total stays within a limit and another becomes least: the budget's arithmetic.

    minimise  sum_l value[l, o_l]   subject to  sum_l weight[l, o_l] <= limit

Values are bytes and weights errors, or the other way round.
Source  the dynamic programme over a limit in 10,000 equal steps is that of Alimohammadi et al. 2022, arXiv:2210.17357
        (L-GreCo), weights rounded up.
Differs options that alone exceed the limit are left out, not counted as if they just met it; rounding down is tried
        too, and taken where it keeps to the limit.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_STEPS = 10_000

Table = NDArray[np.float64]
Choice = NDArray[np.int64]


def allocate(weight: Table, value: Table, limit: float, steps: int = _STEPS) -> Choice:
    """The option of each layer, by dynamic programming.

    weight, value  [layers, options], finite and not negative
    returns        [layers]; if no choice keeps to the limit, every layer's option of least weight
    cost           O(layers options steps) time
    """
    best: Choice = weight.argmin(axis=1)
    if limit <= 0 or total(weight, best) > limit:
        return best
    # Rounded down a solution may exceed the limit, and is the best there is if it does not; rounded up it never does,
    # but may miss those that just meet it, such as one setting for all.
    scaled = weight * (steps / limit)
    for used in (np.floor(scaled), np.rint(scaled), np.ceil(scaled)):
        choice = _programme(used, value, steps)
        if choice is not None and total(weight, choice) <= limit and total(value, choice) < total(value, best):
            best = choice
    return best


def total(table: Table, choice: Choice) -> float:
    """What a choice comes to."""
    return float(np.take_along_axis(table, choice[:, None], axis=1).sum())


def _programme(used: Table, value: Table, steps: int) -> Choice | None:
    """The choice of least value that uses at most `steps` whole steps, or None."""
    layers, options = used.shape
    best = np.zeros(steps + 1)  # least value of the layers so far, by steps used at most
    chosen = np.zeros((layers, steps + 1), dtype=np.int64)
    for layer in range(layers):
        candidates = np.full((options, steps + 1), math.inf)
        for option in range(options):
            if used[layer, option] <= steps:
                step = int(used[layer, option])
                candidates[option, step:] = best[: steps + 1 - step] + value[layer, option]
        chosen[layer] = candidates.argmin(axis=0)
        best = candidates.min(axis=0)
    if not math.isfinite(best[steps]):
        return None
    choice: Choice = np.zeros(layers, dtype=np.int64)
    at = steps
    for layer in reversed(range(layers)):
        choice[layer] = chosen[layer, at]
        at -= int(used[layer, choice[layer]])
    return choice


def in_proportion(weight: Table, value: Table, limit: float, sizes: Table) -> Choice:
    """The control: every layer may weigh in proportion to its size, as much as the limit lets all of them.

    sizes    [layers], not negative: elements where weights are bytes, energies where they are errors
    returns  [layers] the option of least value among those a layer may have, or its lightest if it may have none
    """
    for rate in np.unique(weight / np.maximum(sizes, np.finfo(np.float64).tiny)[:, None])[::-1]:
        allowed = np.where(weight <= rate * sizes[:, None], value, math.inf)
        fits = np.isfinite(allowed.min(axis=1))
        choice: Choice = np.where(fits, allowed.argmin(axis=1), weight.argmin(axis=1))
        if total(weight, choice) <= limit:
            return choice
    return weight.argmin(axis=1)  # type: ignore[no-any-return]
