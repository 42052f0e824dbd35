"""Tensors cut into spans, and spans put together: how much is worked on at a time.

    part    elements of a tensor, from a multiple of `ALIGN` on
    span    float32 values in one piece of memory: of one part, or of many small tensors one after the other
    bundle  spans whose random words are drawn in one go

In a span a part is filled up to a multiple of `ALIGN` elements, so it begins with a Philox block. A hundred biases then
cost one call of each operation, not a hundred.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from thinwire.codecs.memory import Scratch

ALIGN = 128  # elements: whole blocks of every kind of noise, and of rounding

_Result = TypeVar("_Result")
_Sized = TypeVar("_Sized", "Part", "Span")


@dataclass(frozen=True)
class Part:
    """Elements `start` to `stop` of a tensor.

    source, target  flat and contiguous, of the whole tensor; they may be the same
    tensor          its id
    """

    source: Tensor
    target: Tensor
    tensor: int
    start: int
    stop: int

    @cached_property
    def padded(self) -> int:
        """Elements with what fills its last block."""
        return -(-(self.stop - self.start) // ALIGN) * ALIGN


@dataclass(frozen=True)
class Span:
    """Parts one after the other, each filled up to whole blocks."""

    parts: tuple[Part, ...]

    @cached_property
    def padded(self) -> int:
        return sum(part.padded for part in self.parts)

    def open(self, scratch: Scratch, name: str = "values") -> tuple[Tensor, Tensor]:
        """Where its values are and where they are to be written: float32, the tensor's own memory if it can be.

        name  of the scratch memory if it cannot
        """
        first = self.parts[0]
        if len(self.parts) == 1 and _direct(first.source, first.target):
            return first.source[first.start : first.stop], first.target[first.start : first.stop]
        values = scratch(name, (self.padded,))
        for part, place, rest in self._places(values):
            place.copy_(part.source[part.start : part.stop])
            rest.zero_()
        return values, values

    def close(self, values: Tensor) -> None:
        """Write values that are not in the tensors' own memory."""
        if len(self.parts) == 1 and _direct(self.parts[0].source, self.parts[0].target):
            return
        for part, place, _ in self._places(values):
            part.target[part.start : part.stop].copy_(place)

    def _places(self, values: Tensor) -> Iterator[tuple[Part, Tensor, Tensor]]:
        """Parts, where their values are, and what fills the last block."""
        begin = 0
        for part in self.parts:
            end = begin + part.stop - part.start
            yield part, values[begin:end], values[end : begin + part.padded]
            begin += part.padded


@dataclass(frozen=True)
class Bundle:
    """Spans of one device."""

    spans: tuple[Span, ...]

    @property
    def device(self) -> torch.device:
        return self.spans[0].parts[0].source.device

    @property
    def placed(self) -> Iterator[tuple[Span, int]]:
        """Spans, and how many elements are before them."""
        begin = 0
        for span in self.spans:
            yield span, begin
            begin += span.padded

    def counters(self, per_block: int, scratch: Scratch) -> tuple[int | Tensor, Tensor]:
        """Tensor ids and block indices of its Philox blocks.  int (or int64 [n]) and int64 [n]"""
        parts = [part for span in self.spans for part in span.parts]
        sizes = [part.padded // per_block for part in parts]
        block = scratch(f"block of {per_block}", (sum(sizes),), torch.int64)
        for part, place in zip(parts, block.split_with_sizes(sizes), strict=True):
            first = part.start // per_block
            torch.arange(first, first + place.numel(), out=place)
        if len({part.tensor for part in parts}) == 1:
            return parts[0].tensor, block
        ids = scratch(f"ids of {per_block}", (sum(sizes),), torch.int64)
        for part, place in zip(parts, ids.split_with_sizes(sizes), strict=True):
            place.fill_(part.tensor)
        return ids, block


def bundles(items: Sequence[tuple[Tensor, Tensor, int]], most: int, copied: int) -> list[Bundle]:
    """Tensors of one device, all of them, once.

    items   source, target (flat, contiguous) and id of each
    most    elements of a bundle, rounded up to a multiple of `ALIGN`
    copied  elements of a span that is not in a tensor's own memory, a multiple of `ALIGN`
    """
    most = -(-most // ALIGN) * ALIGN
    alone: list[Part] = []
    small: list[Part] = []
    for source, target, tensor in items:
        n, size = source.numel(), most if _direct(source, target) else min(copied, most)
        for start in range(0, n, size):
            part = Part(source, target, tensor, start, min(start + size, n))
            (small if n <= copied else alone).append(part)
    spans = [Span((part,)) for part in alone] + [Span(parts) for parts in _together(small, min(copied, most))]
    return [Bundle(some) for some in _together(spans, most)]


def _together(things: Sequence[_Sized], most: int) -> Iterator[tuple[_Sized, ...]]:
    """Things in order, as many at a time as have `most` elements."""
    held: list[_Sized] = []
    size = 0
    for thing in things:
        if held and size + thing.padded > most:
            yield tuple(held)
            held, size = [], 0
        held.append(thing)
        size += thing.padded
    if held:
        yield tuple(held)


def _direct(source: Tensor, target: Tensor) -> bool:
    """Whether values are worked on where they are."""
    return source.dtype == target.dtype == torch.float32


_SPARE: list[Scratch] = []  # of the processor: fresh memory costs more than what is computed in it


def each(bundles: Sequence[Bundle], work: Callable[[Bundle, Scratch], _Result]) -> list[_Result]:
    """The results of `work`, in order; on a processor with as many threads as torch uses."""

    def job(bundle: Bundle) -> _Result:
        if bundle.device.type != "cpu":
            return work(bundle, Scratch(bundle.device))
        try:
            scratch = _SPARE.pop()
        except IndexError:
            scratch = Scratch(bundle.device)
        try:
            with torch.no_grad(), np.errstate(all="ignore"):  # of each thread its own; infinities are not our matter
                return work(bundle, scratch)
        finally:
            _SPARE.append(scratch)

    threads = min(torch.get_num_threads(), len(bundles), os.cpu_count() or 1)
    if threads < 2:
        return [job(bundle) for bundle in bundles]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(job, bundles))
