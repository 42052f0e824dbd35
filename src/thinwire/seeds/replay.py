"""Updates on tensors, span by span: the one loop that perturbing, replaying and combining go through.

    for every span, for every batch of steps: Philox words of all its seeds; then for every block that fits a cache:
        for every step:   b <- keep b;   u = ((c1 z1 + c2 z2) + ...) + c8 z8;   b <- b - u

The order of additions is the contract of docs/perturbations.md. Spans, batches and blocks are not part of it: an
element's arithmetic is its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from thinwire.codecs.memory import Scratch
from thinwire.errors import ConfigError
from thinwire.randomness import mix
from thinwire.seeds.noise import Noise
from thinwire.seeds.philox import BATCH, draw, on_host, tensor_id
from thinwire.seeds.rounding import PER_BLOCK, Rounding, nearest, stochastic
from thinwire.seeds.spans import ALIGN, Span, cut, each
from thinwire.seeds.updates import Update

GROUP = 8  # scalars that are added up before the tensor changes
DRAWN = 32  # seeds whose words are made in one go
_BLOCK = 1 << 15  # elements: three arrays of so many fit a core's cache
_FAR = 1 << 22  # elements of a span, and of a block, on another device: there a call costs more than a cache gives
_FEWEST = 1 << 18  # elements of a span, to be worth a thread
_ROUNDING = 1  # the Philox stream of rounding


@dataclass(frozen=True)
class Job:
    """A tensor to read and one to write: the same, or another of its shape.

    source, target  flat and contiguous
    decays          whether `keep` is for it
    reached         bool [seeds of all updates]: which of them perturb it; None for all
    """

    name: str
    source: Tensor
    target: Tensor
    decays: bool
    reached: np.ndarray | None


@dataclass(frozen=True)
class _Step:
    """Up to eight scalars of an update.

    keep    what is multiplied with before; 1.0 in all but an update's first step
    closes  the update's round in its last step, else None
    """

    seeds: tuple[int, ...]
    scalars: tuple[float, ...]
    keep: float
    closes: int | None


def replay(jobs: Sequence[Job], updates: Sequence[Update], noise: Noise, rounding: Rounding, key: int) -> None:
    """Apply all updates to all tensors. Those that the same steps are for share spans."""
    scalars = [exact(update.scalars) for update in updates]
    alike: dict[tuple[object, ...], list[Job]] = {}
    for job in jobs:
        who = None if job.reached is None else job.reached.tobytes()
        alike.setdefault((job.source.device, job.source.dtype, job.target.dtype, job.decays, who), []).append(job)
    for some in alike.values():
        steps = list(_steps(updates, scalars, some[0]))
        if steps:
            _replay_alike(some, steps, noise, rounding, key)
        else:
            _copy(some)


def exact(scalars: Sequence[float]) -> tuple[float, ...]:
    """The scalars, if they are finite float32 numbers.

    raises  ConfigError naming the first that is not
    """
    with np.errstate(over="ignore"):
        held = np.asarray(scalars, dtype=np.float64).astype(np.float32)
    wrong = [c for c, rounded in zip(scalars, held.tolist(), strict=True) if c != rounded or not np.isfinite(rounded)]
    if wrong:
        raise ConfigError(
            f"a scalar of {wrong[0]!r}",
            expected="a finite number that float32 holds exactly, so that all members multiply with the same",
            mend="round it once, where it is made: float(numpy.float32(scalar))",
        )
    return tuple(scalars)


def most(noise: Noise, seeds: int, tensors: Sequence[Tensor]) -> int:
    """Elements of a span: with so many, the words of `seeds` seeds fill a batch, and all threads have work."""
    if not on_host(tensors[0].device):
        return _FAR
    share = sum(tensor.numel() for tensor in tensors) // torch.get_num_threads()
    return min(BATCH * noise.per_block // max(1, min(seeds, DRAWN)), max(share, _FEWEST))


def _steps(updates: Sequence[Update], scalars: Sequence[tuple[float, ...]], job: Job) -> Iterator[_Step]:
    """Groups of scalars that are not zero and whose seeds perturb the tensor. An update that does nothing is none."""
    begin = 0
    for update, values in zip(updates, scalars, strict=True):
        reached = [True] * len(values) if job.reached is None else job.reached[begin : begin + len(values)]
        begin += len(values)
        told = [(seed, c) for seed, c, here in zip(update.seeds, values, reached, strict=True) if c and here]
        keep = exact([update.keep])[0] if job.decays else 1.0
        groups = [told[first : first + GROUP] for first in range(0, len(told), GROUP)]
        if not groups and keep != 1.0:
            groups = [[]]
        for index, group in enumerate(groups):
            yield _Step(
                tuple(seed for seed, _ in group),
                tuple(c for _, c in group),
                keep if index == 0 else 1.0,
                update.round if index == len(groups) - 1 else None,
            )


def _batches(steps: Sequence[_Step], *, until_closed: bool) -> Iterator[list[_Step]]:
    """As many steps as have `DRAWN` seeds together; if `until_closed`, of one update only."""
    batch: list[_Step] = []
    for step in steps:
        if batch and sum(len(other.seeds) for other in batch) + len(step.seeds) > DRAWN:
            yield batch
            batch = []
        batch.append(step)
        if until_closed and step.closes is not None:
            yield batch
            batch = []
    if batch:
        yield batch


def _copy(jobs: Sequence[Job]) -> None:
    for job in jobs:
        if job.target is not job.source:
            job.target.copy_(job.source)


def _replay_alike(jobs: Sequence[Job], steps: Sequence[_Step], noise: Noise, rounding: Rounding, key: int) -> None:
    """Tensors of one kind, that the same steps are for."""
    first = jobs[0]
    half = None if first.target.dtype == torch.float32 else first.target.dtype
    at_random = half is not None and rounding == "stochastic"
    batches = list(_batches(steps, until_closed=at_random))

    def work(span: Span, scratch: Scratch) -> None:
        source, target = span.open(scratch)
        counters = span.counters(noise.per_block, scratch)
        for batch in batches:
            closes = batch[-1].closes
            dice = None
            if at_random and closes is not None:
                drawn = draw([mix(key, closes)], *span.counters(PER_BLOCK, scratch), stream=_ROUNDING, scratch=scratch)[
                    0
                ]
                dice = scratch("dice", (len(drawn),), torch.int32).copy_(drawn)
            seeds = [seed for step in batch for seed in step.seeds]
            words = draw(seeds, *counters, scratch=scratch) if seeds else None
            _batch(batch, source, target, words, noise, scratch, half, dice)
            source = target
        span.close(target)

    seeds = max(sum(len(step.seeds) for step in batch) for batch in batches)
    items = [(job.source, job.target, tensor_id(job.name)) for job in jobs]
    each(list(cut(items, most(noise, seeds, [job.source for job in jobs]))), work)


def _batch(
    batch: Sequence[_Step], source: Tensor, target: Tensor, words: Tensor | None, noise: Noise, scratch: Scratch,
    half: torch.dtype | None, dice: Tensor | None,
) -> None:  # fmt: skip
    """A batch of steps on a span: source [n] -> target [n], which may be the same.

    words  int32 [seeds of all steps, w]
    half   what an update is rounded to; None: it is not
    dice   int32 [n / 2] for rounding at random; None: to nearest
    """
    host, n = on_host(source.device), source.numel()
    size = min(_BLOCK if host else _FAR, -(-n // ALIGN) * ALIGN)
    held: Any = (source, target, scratch("u", (size,)), scratch("z", (size,)), words)
    if host:
        held = [None if tensor is None else tensor.numpy() for tensor in held]
    here_all, there_all, u, z, drawn = held
    multiply: Any = np.multiply if host else torch.mul
    subtract: Any = np.subtract if host else torch.sub
    sums, row = [], 0
    for step in batch:
        sums.append(noise.sum(step.scalars, drawn[row : row + len(step.seeds)], scratch) if step.seeds else None)
        row += len(step.seeds)
    for begin in range(0, n, size):
        end = min(begin + size, n)
        whole = -(-end // ALIGN) * ALIGN
        here, there = here_all[begin:end], there_all[begin:end]
        for step, add in zip(batch, sums, strict=True):
            if step.keep != 1.0:
                multiply(here, step.keep, out=there)
                here = there
            if add is not None:
                add(begin, whole, u[: whole - begin], z[: whole - begin])
                subtract(here, u[: end - begin], out=there)
                here = there
            if half is not None and step.closes is not None:
                rounded = target[begin:end]
                if dice is None:
                    nearest(rounded, half)
                else:
                    stochastic(rounded, half, dice[begin // 2 : (end + 1) // 2])


def projected(values: Tensor, words: Tensor, noise: Noise, scratch: Scratch) -> Tensor:
    """<values, z> of a span for each row of words.  float64 [g], on the processor"""
    host, n = on_host(values.device), values.numel()
    size = min(_BLOCK if host else _FAR, -(-n // ALIGN) * ALIGN)
    held: Any = (values, scratch("z", (size,)), words)
    if host:
        held = [tensor.numpy() for tensor in held]
    x, z, drawn = held
    times, found = noise.times(1.0), torch.zeros(len(words), dtype=torch.float64)
    for begin in range(0, n, size):
        end = min(begin + size, n)
        whole = -(-end // ALIGN) * ALIGN
        for row, its in enumerate(drawn[:, 4 * begin // noise.per_block : 4 * whole // noise.per_block]):
            times(its, z[: whole - begin])
            product = z[: end - begin]
            product *= x[begin:end]
            found[row] += float(product.sum())
    return found
