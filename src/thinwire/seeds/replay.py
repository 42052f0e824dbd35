"""Updates on tensors, span by span: the one loop that perturbing, replaying and combining go through.

    for every bundle of spans, for every batch of steps: Philox words of all its seeds;
        for every block b that fits a cache, for every step:
            b <- keep b;   u = ((c1 z1 + c2 z2) + ...) + c8 z8;   b <- b - u

The order of additions is the contract of docs/perturbations.md. Spans, batches and blocks are not part of it: an
element's arithmetic is its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
from thinwire.seeds.spans import ALIGN, Bundle, bundles, each
from thinwire.seeds.updates import Update

GROUP = 8  # scalars that are added up before the tensor changes
DRAWN = 16  # seeds whose words are made in one go
_BLOCK = 1 << 15  # elements: three arrays of so many fit a core's cache
_FAR = 1 << 22  # elements of a span, and of a block, on another device: there a call costs more than a cache gives
_AGAIN = BATCH * PER_BLOCK  # elements of a bundle: the dice fill a batch, and values stay in a cache
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


def cut(items: Sequence[tuple[Tensor, Tensor, int]], noise: Noise, seeds: int, *, once: bool = True) -> list[Bundle]:
    """Bundles in which the words of `seeds` seeds, but of `DRAWN` at most, fill a batch; and all threads have work.

    items  source, target and id of each tensor; see `bundles`
    once   whether a bundle is gone through once, and not rounded at random; else it is to be of `_AGAIN` elements
    """
    if not on_host(items[0][0].device):
        return bundles(items, _FAR, _FAR)
    share = sum(source.numel() for source, _, _ in items) // torch.get_num_threads()
    most = min(
        BATCH * noise.per_block // max(1, min(seeds, DRAWN)),
        max(share, _FEWEST),
        BATCH * noise.per_block if once else _AGAIN,
    )
    return bundles(items, most, _BLOCK)


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
    if half is not None and not at_random:
        steps = [*steps[:-1], replace(steps[-1], closes=None)]  # writing to the tensor rounds to nearest
    batches = list(_batches(steps, until_closed=at_random))

    def work(bundle: Bundle, scratch: Scratch) -> None:
        counters = bundle.counters(noise.per_block, scratch)
        dice_counters = bundle.counters(PER_BLOCK, scratch) if at_random else None
        opened: list[tuple[Tensor, Tensor]] = []
        for number, batch in enumerate(batches):
            dice = None
            if dice_counters is not None and (closes := batch[-1].closes) is not None:
                drawn = draw([mix(key, closes)], *dice_counters, stream=_ROUNDING, scratch=scratch)[0]
                dice = scratch("dice", (len(drawn),), torch.int32).copy_(drawn)
            seeds = [seed for step in batch for seed in step.seeds]
            words = draw(seeds, *counters, scratch=scratch) if seeds else None
            run = _Batch(batch, words, noise, scratch, half, dice)
            for index, (span, begin) in enumerate(bundle.placed):
                if number == 0:
                    name = "values" if len(batches) == 1 else f"values {index}"
                    opened.append(span.open(lambda size, name=name: scratch(name, (size,))))  # type: ignore[misc]
                source, target = opened[index]
                run(source, target, begin)
                opened[index] = target, target
                if number == len(batches) - 1:
                    span.close(target)

    seeds = max(sum(len(step.seeds) for step in batch) for batch in batches)
    items = [(job.source, job.target, tensor_id(job.name)) for job in jobs]
    each(cut(items, noise, seeds, once=len(batches) == 1 and not at_random), work)


class _Batch:
    """A batch of steps, ready to go over the spans of a bundle.

    words  int32 [seeds of all steps, w], of the whole bundle
    half   what an update is rounded to; None: it is not
    dice   int32 [w / 2] for rounding at random; None: to nearest
    """

    def __init__(
        self, steps: Sequence[_Step], words: Tensor | None, noise: Noise, scratch: Scratch, half: torch.dtype | None,
        dice: Tensor | None,
    ) -> None:  # fmt: skip
        self._steps, self._half, self._dice = steps, half, dice
        self._host = on_host(scratch.device)
        self._size = _BLOCK if self._host else _FAR
        self._spare = scratch("u", (self._size,)), scratch("z", (self._size,))
        held: Any = (*self._spare, words)
        if self._host:
            held = [tensor if tensor is None else tensor.numpy() for tensor in held]
        self._u, self._z, drawn = held
        self._sums, row = [], 0
        for step in steps:
            rows = slice(row, row + len(step.seeds))
            self._sums.append(noise.sum(step.scalars, drawn[rows], scratch) if step.seeds else None)
            row = rows.stop

    def __call__(self, source: Tensor, target: Tensor, first: int) -> None:
        """source [n] -> target [n], which may be the same.

        first  elements of the bundle before this span
        """
        host, n, u, z = self._host, source.numel(), self._u, self._z
        here_all, there_all = (source.numpy(), target.numpy()) if host else (source, target)
        multiply: Any = np.multiply if host else torch.mul
        subtract: Any = np.subtract if host else torch.sub
        for begin in range(0, n, self._size):
            end = min(begin + self._size, n)
            whole = -(-end // ALIGN) * ALIGN - begin
            here, there = here_all[begin:end], there_all[begin:end]
            for step, add in zip(self._steps, self._sums, strict=True):
                if step.keep != 1.0:
                    multiply(here, step.keep, out=there)
                    here = there
                if add is not None:
                    add(first + begin, first + begin + whole, u[:whole], z[:whole])
                    subtract(here, u[: end - begin], out=there)
                    here = there
                if self._half is not None and step.closes is not None:
                    self._round(target[begin:end], first + begin)

    def _round(self, x: Tensor, begin: int) -> None:
        assert self._half is not None
        if self._dice is None:
            nearest(x, self._half)
        else:
            u, z = (spare[: x.numel()] for spare in self._spare)
            stochastic(x, self._half, self._dice[begin // 2 : (begin + x.numel() + 1) // 2], (u, z))


def projected(values: Tensor, words: Tensor, first: int, noise: Noise, scratch: Scratch) -> Tensor:
    """<values, z> of a span for each row of words.  float64 [g], on the processor

    words  int32 [g, w], of the whole bundle
    first  elements of the bundle before this span
    """
    host, n = on_host(values.device), values.numel()
    size = min(_BLOCK if host else _FAR, -(-n // ALIGN) * ALIGN)
    held: Any = (values, scratch("z", (size,)), words)
    x, z, drawn = [tensor.numpy() for tensor in held] if host else held
    times, found = noise.times(1.0), torch.zeros(len(words), dtype=torch.float64)
    for begin in range(0, n, size):
        end = min(begin + size, n)
        whole = -(-end // ALIGN) * ALIGN
        its = slice(4 * (first + begin) // noise.per_block, 4 * (first + whole) // noise.per_block)
        for row in range(len(words)):
            times(drawn[row, its], z[: whole - begin])
            product = z[: end - begin]
            product *= x[begin:end]
            found[row] += float(product.sum())
    return found
