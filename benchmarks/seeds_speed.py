"""Perturbing and replaying against a plain copy of the same tensors.

    python benchmarks/seeds_speed.py [--repeats 7] [--scalars 1 8 64 512] [--tensors 4M 16M small] [--out FILE.md]

4M and 16M are one tensor of so many elements; `small` has the shapes of a MiniLM-like encoder of six layers without its
embedding: 96 tensors, most of them biases and norms. In every repeat what is measured stands between two copies of
the same tensors (`y.copy_(x)` of each); the quotient of the times, mean of the two copies over the operation, is a
sample. 1 is as fast as a copy; a replay of m scalars at m times the cost of a copy has 1/m. The last column is the cost of a
scalar in copies. The median is quoted, with lowest and highest. Times are of the thread itself (CPU time), so that
other work on the machine takes part in them through caches and memory only; one thread.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import thinwire
from thinwire.seeds.directions import apply_all_, perturbed_all
from thinwire.seeds.updates import Update

_EPS = 2.0**-10
_MINILM = [(384, 384), (384,), (384, 384), (384,), (384, 384), (384,), (384, 384), (384,), (384,), (384,),
           (1536, 384), (1536,), (384, 1536), (384,), (384,), (384,)]  # fmt: skip
TENSORS = {"4M": [(1 << 22,)], "16M": [(1 << 24,)], "small": 6 * _MINILM}


def update(scalars: int) -> Update:
    """Of a size that leaves weights where they are, more or less."""
    return Update(tuple(range(scalars)), tuple((-1) ** i * 2.0**-20 for i in range(scalars)))


def samples(copy: Callable[[], object], run: Callable[[], object], repeats: int) -> list[float]:
    """Copies that fit into the time of a run, inverted: speed as a fraction of a copy's."""
    copy()
    run()
    found = []
    for _ in range(repeats):
        first, whole, second = _seconds(copy), _seconds(run), _seconds(copy)
        found.append((first + second) / 2 / whole)
    return found


def _seconds(run: Callable[[], object]) -> float:
    start = time.thread_time()
    run()
    return time.thread_time() - start


def rows(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, counts: Sequence[int], repeats: int) -> list[list[str]]:
    """A row an operation: name, median, lowest, highest, copies a scalar, ns an element and scalar."""
    generator = torch.Generator().manual_seed(0)
    tensors = [(0.05 * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]
    others = [torch.empty_like(tensor) for tensor in tensors]
    pairs = [(f"layer.{index}.w", tensor) for index, tensor in enumerate(tensors)]
    elements = sum(tensor.numel() for tensor in tensors)

    def copy() -> None:
        for tensor, other in zip(tensors, others, strict=True):
            other.copy_(tensor)

    operations: list[tuple[str, int, Callable[[], object]]] = [
        ("perturbed", 1, lambda: perturbed_all(pairs, 1, _EPS, out=others))
    ]
    for rounding in ("stochastic",) if dtype == torch.float32 else ("stochastic", "nearest"):
        for count in counts:
            name = f"apply_, {count} scalars" + ("" if dtype == torch.float32 else f", {rounding}")
            operations.append((name, count, _replay(pairs, count, rounding)))
    found = []
    for name, count, run in operations:
        fractions = samples(copy, run, repeats)
        start = time.thread_time()
        run()
        ns = (time.thread_time() - start) * 1e9 / elements / count
        middle = statistics.median(fractions)
        told = [f"{x:.3g}" for x in (middle, min(fractions), max(fractions), 1 / middle / count, ns)]
        found.append([name, *told])
    return found


def _replay(pairs: Sequence[tuple[str, Tensor]], count: int, rounding: str) -> Callable[[], object]:
    told = [update(count)]
    return lambda: apply_all_(pairs, told, rounding=rounding)  # type: ignore[arg-type]


def table(sizes: Sequence[str], counts: Sequence[int], repeats: int) -> str:
    lines = [
        f"thinwire {thinwire.__version__}, torch {torch.__version__}, numpy {np.__version__}, "
        f"Python {platform.python_version()}, {_processor()}, one thread, {repeats} repeats, "
        f"{datetime.date.today().isoformat()}.",
        "",
        "| tensors | dtype | operation | speed / copy, median | lowest | highest | copies a scalar | ns an element and "
        "scalar |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for size in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            for row in rows(TENSORS[size], dtype, counts, repeats):
                lines.append("| " + " | ".join([size, str(dtype).removeprefix("torch."), *row]) + " |")
                print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}" if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--scalars", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--tensors", nargs="+", choices=list(TENSORS), default=list(TENSORS))
    parser.add_argument("--out", type=Path, help="a file to write the table to")
    parser.add_argument("--note", default="", help="a line below the table, such as what else ran on the machine")
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = table(options.tensors, options.scalars, options.repeats) + (f"\n{options.note}\n" if options.note else "")
    print(text)
    if options.out is not None:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
