"""Tensors cut into spans: as much as is worked on at a time, whether it is a part of one tensor or many small ones.

A part begins at a multiple of `ALIGN` elements of its tensor, so at the beginning of a Philox block, and in a span it
takes a multiple of `ALIGN` elements. A hundred biases then cost one call of each operation, not a hundred.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from thinwire.codecs.memory import Scratch

ALIGN = 128  # elements: whole blocks of every kind of noise, and of rounding
_SMALL = 1 << 16  # elements: what has fewer shares a span with others
_COPIED = 1 << 19  # elements at most of a span that is worked on in a copy

_Result = TypeVar("_Result")


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

    @property
    def padded(self) -> int:
        """Elements with what fills its last block."""
        return -(-(self.stop - self.start) // ALIGN) * ALIGN


@dataclass(frozen=True)
class Span:
    """Parts one after the other, each filled up to whole blocks."""

    parts: tuple[Part, ...]

    @property
    def padded(self) -> int:
        return sum(part.padded for part in self.parts)

    def counters(self, per_block: int, scratch: Scratch) -> tuple[int | Tensor, Tensor]:
        """Tensor ids and block indices of its Philox blocks.  int (or int64 [n]) and int64 [n]"""
        device = self.parts[0].source.device
        sizes = [part.padded // per_block for part in self.parts]
        begins = [part.start // per_block for part in self.parts]
        if len(self.parts) == 1:
            block = scratch(f"block of {per_block}", (sizes[0],), torch.int64)
            return self.parts[0].tensor, torch.arange(begins[0], begins[0] + sizes[0], out=block)
        ids = torch.tensor([part.tensor for part in self.parts]).repeat_interleave(torch.tensor(sizes))
        blocks = torch.cat([torch.arange(begin, begin + size) for begin, size in zip(begins, sizes, strict=True)])
        return ids.to(device), blocks.to(device)

    def open(self, scratch: Scratch) -> tuple[Tensor, Tensor]:
        """Where its values are and where they are to be written: float32, the tensor's own memory if it can be."""
        first = self.parts[0]
        if len(self.parts) == 1 and first.source.dtype == first.target.dtype == torch.float32:
            return first.source[first.start : first.stop], first.target[first.start : first.stop]
        values = scratch("values", (self.padded,))
        for part, place, rest in self._places(values):
            place.copy_(part.source[part.start : part.stop])
            rest.zero_()
        return values, values

    def close(self, values: Tensor) -> None:
        """Write values that are not in the tensors' own memory."""
        for part, place, _ in self._places(values):
            target = part.target[part.start : part.stop]
            if target.data_ptr() != place.data_ptr():
                target.copy_(place)

    def _places(self, values: Tensor) -> Iterator[tuple[Part, Tensor, Tensor]]:
        """Parts, where their values are, and what fills the last block."""
        begin = 0
        for part in self.parts:
            end = begin + part.stop - part.start
            yield part, values[begin:end], values[end : begin + part.padded]
            begin += part.padded


def cut(items: Sequence[tuple[Tensor, Tensor, int]], most: int) -> Iterator[Span]:
    """Spans of tensors of one device.

    items  source, target (flat, contiguous) and id of each
    most   elements of a span; rounded up to a multiple of `ALIGN`
    """
    most = -(-most // ALIGN) * ALIGN
    together: list[Part] = []
    for source, target, tensor in items:
        direct = source.dtype == target.dtype == torch.float32
        size = most if direct else min(most, _COPIED)
        for start in range(0, len(source), size):
            part = Part(source, target, tensor, start, min(start + size, len(source)))
            if len(source) >= _SMALL:
                yield Span((part,))
                continue
            if together and sum(other.padded for other in together) + part.padded > min(most, _COPIED):
                yield Span(tuple(together))
                together = []
            together.append(part)
    if together:
        yield Span(tuple(together))


_SPARE: list[Scratch] = []  # of the processor: fresh memory costs more than what is computed in it


def each(spans: Sequence[Span], work: Callable[[Span, Scratch], _Result]) -> list[_Result]:
    """The results of `work`, in order; on a processor with as many threads as torch uses."""

    def job(span: Span) -> _Result:
        device = span.parts[0].source.device
        if device.type != "cpu":
            return work(span, Scratch(device))
        try:
            scratch = _SPARE.pop()
        except IndexError:
            scratch = Scratch(device)
        try:
            with torch.no_grad(), np.errstate(all="ignore"):  # of each thread its own; infinities are not our matter
                return work(span, scratch)
        finally:
            _SPARE.append(scratch)

    threads = min(torch.get_num_threads(), len(spans), os.cpu_count() or 1)
    if threads < 2:
        return [job(span) for span in spans]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(job, spans))
