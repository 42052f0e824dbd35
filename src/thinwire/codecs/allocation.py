"""One option for each layer, so that a total stays within a limit and another becomes least: the budget's arithmetic.

    minimise  sum_l value[l, o_l]   subject to  sum_l weight[l, o_l] <= limit

Values are bytes and weights errors, or the other way round.
Source  the dynamic programme over a limit in 10,000 equal steps is that of Alimohammadi et al. 2022, arXiv:2210.17357
        (L-GreCo); rounding weights up keeps every solution within the limit, at the cost of at most a step a layer.
Differs options that alone exceed the limit are left out, not counted as if they just met it.
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
    layers, options = weight.shape
    lightest: Choice = weight.argmin(axis=1)
    if limit <= 0 or weight.min(axis=1).sum() > limit:
        return lightest
    used = np.ceil(weight * (steps / limit) - 1e-9)  # a float's worth of mercy: what is a whole step stays one
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
        return lightest  # within the limit only by less than the rounding
    choice: Choice = np.zeros(layers, dtype=np.int64)
    at = steps
    for layer in reversed(range(layers)):
        choice[layer] = chosen[layer, at]
        at -= int(used[layer, choice[layer]])
    return choice


def in_proportion(weight: Table, value: Table, limit: float, sizes: Table) -> Choice:
    """The control: every layer gets a share of the limit in proportion to its size, and its best option within it.

    sizes    [layers], not negative: elements where the limit is of bytes, energies where it is of errors
    returns  [layers]; a layer whose share is too small for any option gets the one of least weight
    """
    shares = limit * sizes / max(sizes.sum(), np.finfo(np.float64).tiny)
    allowed = np.where(weight <= shares[:, None], value, math.inf)
    fits = np.isfinite(allowed.min(axis=1))
    choice: Choice = np.where(fits, allowed.argmin(axis=1), weight.argmin(axis=1))
    return choice
