"""Which samples a member draws: pure functions of a key, so that a resumed run needs no data state."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from thinwire.randomness import mix, random_bytes

_EPOCH = int.from_bytes(b"epoch", "little")  # keeps these keys apart from those of other draws
_HELD_OUT = int.from_bytes(b"heldout", "little")


def uniform(key: int, count: int, below: int) -> Tensor:
    """`count` integers, uniform in [0, below) up to a bias of below / 2^63.

    returns  int64 [count], equal for equal keys on every machine
    """
    words = random_bytes(key, 8 * count).view(torch.int64)  # [count]
    return words.bitwise_and((1 << 63) - 1).remainder(below)


def permutation(key: int, n: int) -> Tensor:
    """The numbers 0..n-1 in random order: int64 [n]."""
    return random_bytes(key, 8 * n).view(torch.int64).argsort(stable=True)


def epoch_positions(seed: int, step: int, rank: int, world: int, *, batch_size: int, n: int) -> Tensor:
    """The samples of one member at one step: int64 [batch_size].

    All epochs, each in an order of its own, form one endless row. The members take from it in turn, `batch_size` at a
    time: members never share a sample, and after n samples each was seen exactly once. Batches may span two epochs.
    """
    first = (step * world + rank) * batch_size
    row = torch.arange(first, first + batch_size)  # [batch_size], places in the endless row
    epochs = row.div(n, rounding_mode="floor")
    picked = torch.empty_like(row)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        here = epochs == epoch
        picked[here] = _order(seed, epoch, n)[row[here] - epoch * n]
    return picked


def held_out(n: int, share: float) -> tuple[Tensor, Tensor]:
    """Samples to train on and samples to evaluate on; the same split for every seed, so that runs compare.

    returns  int64 [n - k], int64 [k] with k = share * n, at least 1
    """
    order = permutation(mix(_HELD_OUT, n), n)
    k = max(1, int(n * share))
    return order[:-k].sort().values, order[-k:].sort().values


@lru_cache(maxsize=4)  # of a pure function: the epoch under way is asked for at every step; callers only read it
def _order(seed: int, epoch: int, n: int) -> Tensor:
    return permutation(mix(seed, _EPOCH, epoch), n)
