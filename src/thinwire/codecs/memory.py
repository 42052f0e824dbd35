"""Memory for results and for intermediate results: on a processor, most of what a careless codec costs.

Fresh memory is handed out by the system page by page, and every page is a trap of about two microseconds: a tensor of
64 MiB in pages of 4 KiB costs several copies of it. Hence large results live in huge pages, and intermediate results
of one piece are written where those of the piece before were.
"""

from __future__ import annotations

import math
import mmap
import sys
from contextlib import suppress

import torch
from torch import Tensor

from thinwire.packet import Layout

_LARGE = 1 << 22  # bytes; what is smaller, the allocator keeps and gives again


def empty(count: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Memory of any content, [count]; on Linux in huge pages if it is large."""
    if _is_large(count, dtype, device):
        return _huge(count, dtype)
    return torch.empty(count, dtype=dtype, device=device)


def zeros(count: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """The same, all zero. What the system hands out is: large memory need not be written."""
    if _is_large(count, dtype, device):
        return _huge(count, dtype)
    return torch.zeros(count, dtype=dtype, device=device)


def _is_large(count: int, dtype: torch.dtype, device: torch.device | str) -> bool:
    return sys.platform == "linux" and torch.device(device).type == "cpu" and count * dtype.itemsize >= _LARGE


def _huge(count: int, dtype: torch.dtype) -> Tensor:
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them: the same memory, in small pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)  # holds on to `memory`


def fields(layout: Layout, device: torch.device) -> dict[str, Tensor]:
    """Memory for the fields of a layout."""
    return {name: empty(count, dtype, device) for name, (dtype, count) in layout.items()}


class Scratch:
    """Memory for intermediate results: made with the first piece of a call, written again with every other."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held: dict[str, Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """What is called `name`, with any content; what it held before is lost."""
        count = math.prod(shape)
        held = self._held.get(name)
        if held is None or len(held) < count:
            held = self._held[name] = torch.empty(count, dtype=dtype, device=self.device)
        return held[:count].view(shape)
