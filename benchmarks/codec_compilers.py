"""Whether a compiler would be worth having: vectorised torch on pieces against numba and torch.compile.

    python benchmarks/codec_compilers.py [--mib 64] [--repeats 9] [--out FILE.md]

Three operations: int8 with blocks of 256, int4 with blocks of 64, and the choice of the largest hundredth by a
threshold estimated from every 61st element. Each is the same arithmetic three times: torch calls on pieces that fit
the cache (for int8 and int4 the codecs themselves), numba loops, and torch.compile of the same torch calls on the whole
tensor. Figures are copy's time over the operation's, as in codecs.py, interleaved with the copies. `first call` is
what a process waits before the first result, compilation included, with empty caches; numba and torch.compile would
pay it once for each kind of operation and, torch.compile, again for other shapes; on two cores, which come second,
torch.compile's workers are there already. Needs numba, and a C++ compiler for torch.compile; what is missing is skipped
with a sentence.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

import thinwire
from thinwire.codecs import int4, int8
from thinwire.codecs.blocks import pieces

_SHARE = 0.01
_STRIDE = 61  # of the sample; prime, so that it does not keep step with rows

#: name -> (encode: x -> parts, decode: parts, n -> x or None where there is nothing to compare)
Operation = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


# --- torch on pieces --------------------------------------------------------------------------------------------------


def on_pieces() -> dict[str, Operation]:
    """As the library does it."""
    found: dict[str, Operation] = {}
    for name, codec in (("int8", int8), ("int4", int4)):
        found[name] = (
            lambda x, codec=codec: (codec.encode(x, 0), len(x)),  # type: ignore[misc]
            lambda sent, codec=codec: codec.decode(*sent, 0),  # type: ignore[misc]
        )

    def choose(x: Tensor) -> tuple[Tensor, Tensor, int]:
        t = _threshold(x)
        found = []
        for start, stop, _ in pieces(len(x), 1, x.device):
            piece = x[start:stop]
            found.append(np.flatnonzero(piece.abs().ge_(t).numpy()) + start)
        index = torch.from_numpy(np.concatenate(found))
        return x[index], index, len(x)

    return found | {"choice of 1 %": (choose, _put_back)}


def _threshold(x: Tensor) -> Tensor:
    sample = x[::_STRIDE].abs()
    return sample.kthvalue(len(sample) - int(len(sample) * _SHARE)).values


def _put_back(sent: tuple[Tensor, Tensor, int]) -> Tensor:
    value, index, n = sent
    return torch.zeros(n).index_copy_(0, index, value)


# --- numba ------------------------------------------------------------------------------------------------------------


def with_numba(parallel: bool) -> dict[str, Operation]:
    """Loops over blocks; raises ImportError without numba."""
    import numba
    from numba import njit, prange

    numba.set_num_threads(2 if parallel else 1)

    @njit(parallel=parallel, nogil=True, error_model="numpy")
    def encode8(x, scale, code):  # type: ignore[no-untyped-def]
        for b in prange(len(scale)):
            row = x[b * 256 : (b + 1) * 256]
            largest = np.float32(0)
            for i in range(len(row)):
                largest = max(largest, abs(row[i]))
            s = largest / np.float32(127)
            scale[b] = s
            divisor = s if s > 0 else np.float32(np.inf)
            for i in range(len(row)):
                code[b * 256 + i] = np.int8(np.rint(row[i] / divisor))

    @njit(parallel=parallel, nogil=True)
    def decode8(scale, code, x):  # type: ignore[no-untyped-def]
        for b in prange(len(scale)):
            for i in range(b * 256, min((b + 1) * 256, len(x))):
                x[i] = code[i] * scale[b]

    @njit(parallel=parallel, nogil=True, error_model="numpy")
    def encode4(x, scale, code):  # type: ignore[no-untyped-def]
        for b in prange(len(scale)):
            row = x[b * 64 : (b + 1) * 64]
            largest = np.float32(0)
            for i in range(len(row)):
                largest = max(largest, abs(row[i]))
            s = largest / np.float32(7)
            scale[b] = s
            divisor = s if s > 0 else np.float32(np.inf)
            for i in range(32):
                low = np.uint8(np.int32(np.rint(row[i] / divisor)) + 8)
                high = np.uint8(np.int32(np.rint(row[i + 32] / divisor)) + 8)
                code[b * 32 + i] = low | (high << 4)

    @njit(parallel=parallel, nogil=True)
    def decode4(scale, code, x):  # type: ignore[no-untyped-def]
        for b in prange(len(scale)):
            for i in range(32):
                byte = code[b * 32 + i]
                x[b * 64 + i] = np.float32(np.int32(byte & 15) - 8) * scale[b]
                x[b * 64 + i + 32] = np.float32(np.int32(byte >> 4) - 8) * scale[b]

    @njit(nogil=True)
    def choose_into(x, t, index):  # type: ignore[no-untyped-def]
        kept = 0
        for i in range(len(x)):
            index[kept] = i
            kept += abs(x[i]) >= t  # without a branch
        return kept

    def quantise(kernel: Any, block: int, code_bytes: int, dtype: torch.dtype) -> Callable[[Tensor], Any]:
        def encode(x: Tensor) -> tuple[Tensor, Tensor, int]:
            scale, code = torch.empty(-(-len(x) // block)), torch.empty(len(x) * code_bytes // 2, dtype=dtype)
            kernel(x.numpy(), scale.numpy(), code.numpy())
            return scale, code, len(x)

        return encode

    def restore(kernel: Any) -> Callable[[Any], Tensor]:
        def decode(sent: tuple[Tensor, Tensor, int]) -> Tensor:
            x = torch.empty(sent[2])
            kernel(sent[0].numpy(), sent[1].numpy(), x.numpy())
            return x

        return decode

    def choose(x: Tensor) -> tuple[Tensor, Tensor, int]:
        index = np.empty(len(x) + 1, dtype=np.int64)  # pages that are not reached are never touched
        kept = choose_into(x.numpy(), _threshold(x).numpy()[()], index)
        chosen = torch.from_numpy(index[:kept].copy())
        return x[chosen], chosen, len(x)

    return {
        "int8": (quantise(encode8, 256, 2, torch.int8), restore(decode8)),
        "int4": (quantise(encode4, 64, 1, torch.uint8), restore(decode4)),
        "choice of 1 %": (choose, _put_back),
    }


# --- torch.compile ----------------------------------------------------------------------------------------------------


def with_compile() -> dict[str, Operation]:
    """Whole-tensor torch code, fused by inductor; needs a C++ compiler."""
    if not (shutil.which("g++") or shutil.which("clang++")):
        raise ImportError("no C++ compiler")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()
    torch.compiler.reset()

    def scales(rows: Tensor, largest_code: int) -> tuple[Tensor, Tensor]:
        scale = rows.abs().amax(dim=1) / largest_code
        return scale, torch.where(scale == 0, torch.inf, scale).unsqueeze(1)

    @torch.compile(dynamic=False)
    def encode8(x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.view(-1, 256)
        scale, divisor = scales(rows, 127)
        return scale, (rows / divisor).round().to(torch.int8).view(-1)

    @torch.compile(dynamic=False)
    def decode8(scale: Tensor, code: Tensor) -> Tensor:
        return (code.view(-1, 256) * scale.unsqueeze(1)).view(-1)

    @torch.compile(dynamic=False)
    def encode4(x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.view(-1, 64)
        scale, divisor = scales(rows, 7)
        codes = ((rows / divisor).round() + 8).to(torch.uint8)
        return scale, (codes[:, 32:] << 4 | codes[:, :32]).view(-1)

    @torch.compile(dynamic=False)
    def decode4(scale: Tensor, code: Tensor) -> Tensor:
        packed = code.view(-1, 32)
        codes = torch.cat([packed & 15, packed >> 4], dim=1).float() - 8
        return (codes * scale.unsqueeze(1)).view(-1)

    @torch.compile(dynamic=False)
    def mask(x: Tensor, t: Tensor) -> Tensor:
        return x.abs() >= t

    def choose(x: Tensor) -> tuple[Tensor, Tensor, int]:
        index = torch.from_numpy(np.flatnonzero(mask(x, _threshold(x)).numpy()))  # its length depends on the data
        return x[index], index, len(x)

    return {
        "int8": (encode8, lambda sent: decode8(*sent)),
        "int4": (encode4, lambda sent: decode4(*sent)),
        "choice of 1 %": (choose, _put_back),
    }


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timed:
    """Copy's time over encode's and decode's, one number a repeat; what the first call took beyond a later one."""

    encode: list[float]
    decode: list[float]
    first_s: float

    def cells(self) -> str:
        spreads = [f"{statistics.median(x):.2g} ({min(x):.2g} to {max(x):.2g})" for x in (self.encode, self.decode)]
        return f"{' | '.join(spreads)} | {self.first_s:.1f} s"


def timed(operation: Operation, expected: Tensor, x: Tensor, repeats: int) -> Timed:
    """Measure, after a look at whether it is the same operation."""
    encode, decode = operation
    y = torch.empty_like(x)
    y.copy_(x)
    start = time.perf_counter()
    sent = encode(x)
    decoded = decode(sent)
    first = time.perf_counter() - start
    assert torch.allclose(decoded, expected, rtol=1e-6), "not the same operation"
    ratios: tuple[list[float], list[float]] = ([], [])
    later = []
    for _ in range(repeats):
        times = [_seconds(work) for work in (
            lambda: y.copy_(x), lambda: encode(x), lambda: y.copy_(x), lambda: decode(sent), lambda: y.copy_(x)
        )]  # fmt: skip
        ratios[0].append((times[0] + times[2]) / 2 / times[1])
        ratios[1].append((times[2] + times[4]) / 2 / times[3])
        later.append(times[1] + times[3])
    return Timed(*ratios, max(0.0, first - statistics.median(later)))


def choice(found: Mapping[tuple[str, int, str], Timed]) -> str:
    """What follows, with the figures of one core."""
    parts = [
        "The codecs use torch on pieces: it is there wherever torch is and gives its first result at once. (topk "
        "itself chooses with numpy on pieces, by a threshold from a sample: codecs.md has its speed.)"
    ]
    for kind in ("numba", "torch.compile"):
        some = {name: each for (name, threads, k), each in found.items() if threads == 1 and k == kind}
        if not some:
            continue
        ours = {name: found[name, 1, "torch on pieces"] for name in some}
        encode, decode = (
            ", ".join(
                f"{statistics.median(getattr(some[n], way)) / statistics.median(getattr(ours[n], way)):.2g}"
                for n in some
            )
            for way in ("encode", "decode")
        )
        waits = ", ".join(f"{each.first_s:.1f}" for each in some.values())
        parts.append(
            f"{kind} encodes at {encode} times its speed and decodes at {decode} times ({', '.join(some)}), after "
            f"{waits} s of compiling."
        )
    parts.append(
        "numba is one more package of that size, needs a release for every new Python, and works on no GPU tensor by "
        "the same code; torch.compile needs a C++ compiler on the user's machine and compiles anew for other lengths."
    )
    return " ".join(parts)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    kept = work()
    took = time.perf_counter() - start
    del kept
    return took


def _installed_mb(*packages: str) -> float:
    files = [file for package in packages for file in distribution(package).files or []]
    return sum(Path(str(file.locate())).stat().st_size for file in files if Path(str(file.locate())).exists()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    x = torch.empty(args.mib << 18).normal_(generator=torch.Generator().manual_seed(0))
    expected = {name: decode(encode(x)) for name, (encode, decode) in on_pieces().items()}
    told = [f"thinwire {thinwire.__version__}", f"torch {torch.__version__}", f"Python {platform.python_version()}"]
    found: dict[tuple[str, int, str], Timed] = {}
    notes: list[str] = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        makers: dict[str, Callable[[], dict[str, Operation]]] = {
            "torch on pieces": on_pieces,
            "numba": lambda: with_numba(threads > 1),  # noqa: B023
            "torch.compile": with_compile,
        }
        for kind, make in makers.items():
            try:
                operations = make()
            except ImportError as error:
                notes += [f"{kind} is left out: {error}."] if threads == 1 else []
                continue
            for name, operation in operations.items():
                found[name, threads, kind] = each = timed(operation, expected[name], x, args.repeats)
                print(f"| {name} | {threads} | {kind} | {each.cells()} |", flush=True)
    with suppress(ImportError):
        told.append(f"numba {version('numba')} ({_installed_mb('numba', 'llvmlite'):.0f} MB with llvmlite)")
    text = "\n".join([
        "Written by `python benchmarks/codec_compilers.py`, which says what is measured.",
        f"{datetime.date.today().isoformat()}. {', '.join(told)}. {psutil.cpu_count()} processors, "
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB, Linux {platform.release().split('-')[0]}. {args.mib} MiB of "
        f"normal float32 numbers, {args.repeats} repeats: median (lowest to highest) of copy's time over the "
        "operation's.",
        *notes,
        "",
        "| operation | cores | how | encode | decode | first call |",
        "|---|---|---|---|---|---|",
        *(f"| {name} | {threads} | {kind} | {each.cells()} |" for (name, threads, kind), each in sorted(found.items())),
        "", choice(found),
    ])  # fmt: skip
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
