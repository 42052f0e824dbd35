"""Every codec: bits, error and cosine on real tensors, speed against a plain copy, memory; beside what else there is.

    python benchmarks/codecs.py [DATA.txt] [--only EXPRESSION ...] [--missing] [--no-speed] [--mib 64] [--repeats 9]
        [--budget 6]

Real tensors are those of tensors.py. Speed is of a float32 tensor of --mib MiB of normal numbers: in every repeat the
encoding and the decoding each stand between two `y.copy_(x)` of the same tensor, and the quotient of the times, copy
over codec, is a sample: 0.5 is half as fast as a copy. The median is quoted with lowest and highest. Slow codecs get
fewer repeats, at least three: --budget seconds for each. `encode` returns fields; their packet is not part of it.
Memory is the growth of the process's peak resident set (VmHWM) while it encodes that tensor once, its output
included, in a process of its own, over the tensor's size.

A row that is measured goes into results/codecs.json, from which results/codecs.md is written and docs/codecs.md takes
its speeds. --only measures these rows, --missing those that are not in the file yet. --no-speed leaves times
and memory as they are in the file: other work on the machine spoils them, and nothing else.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from expressions import expressions, fitted
from references import Maker, Shapes, Subject, references, versions
from tensors import STEPS, Sample, load
from torch import Tensor

import thinwire
from thinwire.train.corpus import REFERENCE

RESULTS = Path(__file__).with_name("results")
_KEY = 2026
_LINK_BITS_PER_S = 1e9
_FEWEST = 3
_WIDTH = 4096  # the random tensor is fitted as a matrix of rows of so many

Row = dict[str, Any]


def subjects() -> tuple[dict[str, Maker], list[str]]:
    """Codecs by expression, then references by name; and what is missing."""
    found: dict[str, Maker] = {}
    for expression in expressions():
        if fitted(expression, ((1,),)) is not None:  # feedback around one changes neither its bits nor its time
            found[expression] = _codec_maker(expression)
    others, skipped = references()
    return found | others, skipped


def _codec_maker(expression: str) -> Maker:
    def make(shapes: Shapes) -> Subject:
        codec = fitted(expression, shapes)
        assert codec is not None
        n = sum(torch.Size(shape).numel() for shape in shapes)
        return Subject(
            lambda x: codec.encode(x, _KEY),
            lambda fields: codec.decode(fields, n, _KEY),
            lambda fields: sum(field.nbytes for field in fields.values()),
        )

    return make


# --- what is measured -------------------------------------------------------------------------------------------------


def quality(make: Maker, samples: Iterable[Sample]) -> Row:
    """Bits an element, ||x - y||^2 / ||x||^2 and cosine for each kind of tensor, in the order of the samples."""
    row: Row = {}
    for sample in samples:
        subject, x = make(sample.shapes), sample.vector
        sent = subject.encode(x)
        y = subject.decode(sent).double()
        exact = x.double()
        error = float((exact - y).square().sum() / exact.square().sum())
        cosine = float(exact @ y / (exact.norm() * y.norm()).clamp(min=1e-300))
        of_kind = row.setdefault(sample.kind, {"bits": [], "error": [], "cosine": []})
        of_kind["bits"].append(_short(8 * subject.num_bytes(sent) / len(x)))
        of_kind["error"].append(_short(error))
        of_kind["cosine"].append(_short(cosine))
    return row


def speed(make: Maker, x: Tensor, *, repeats: int, budget_s: float) -> Row:
    """Copy's time over encode's and decode's: [median, lowest, highest]; seconds of encode; bytes written."""
    subject, y = make(_as_matrix(len(x))), torch.empty_like(x)
    encode, decode, copies, encode_s = [], [], [], []
    start = time.perf_counter()
    sent = subject.encode(x)  # also the warm-up
    num_bytes = subject.num_bytes(sent)
    subject.decode(sent)
    for done in range(repeats):
        if done >= _FEWEST and time.perf_counter() - start > budget_s:
            break
        first = _seconds(x, lambda: y.copy_(x))
        encoding = _seconds(x, lambda: subject.encode(x))
        second = _seconds(x, lambda: y.copy_(x))
        decoding = _seconds(x, lambda: subject.decode(sent))
        third = _seconds(x, lambda: y.copy_(x))
        copies += [first, second, third]
        encode_s.append(encoding)
        encode.append((first + second) / 2 / encoding)
        decode.append((second + third) / 2 / decoding)
    return {
        "encode": _spread(encode),
        "decode": _spread(decode),
        "encode_s": _short(statistics.median(encode_s)),
        "copy_s": _short(statistics.median(copies)),
        "bytes": num_bytes,
        "repeats": len(encode),
    }


def memory(name: str, mib: int) -> float:
    """Peak growth over the tensor's size, measured in a fresh process."""
    command = [sys.executable, __file__, "--memory-of", name, "--mib", str(mib)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return _short(float(done.stdout))


def _memory_here(name: str, mib: int) -> float:
    torch.set_num_threads(1)
    make = _codec_maker(name) if name in expressions() else references()[0][name]  # loads no package in vain
    x = _normal(mib)
    small = make(((64, 64),))
    small.decode(small.encode(x[:4096]))  # what is loaded at the first use is not the codec's
    subject = make(_as_matrix(len(x)))
    before = _status_bytes("VmRSS")
    sent = subject.encode(x)
    grown = _status_bytes("VmHWM") - before
    del sent
    return max(0, grown) / x.nbytes


def _status_bytes(entry: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(entry + ":"):
            return 1024 * int(line.split()[1])
    raise SystemExit(f"/proc/self/status has no {entry}: memory is measured on Linux")


def _seconds(x: Tensor, work: Callable[[], object]) -> float:
    """Of one call; what it returns is given back after the clock has stopped."""
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    kept = work()
    if x.is_cuda:
        torch.cuda.synchronize()
    took = time.perf_counter() - start
    del kept
    return took


def _normal(mib: int) -> Tensor:
    return torch.empty(mib << 18).normal_(generator=torch.Generator().manual_seed(0))


def _as_matrix(n: int) -> Shapes:
    return ((n // _WIDTH, _WIDTH),)


def _spread(samples: Sequence[float]) -> list[float]:
    return [_short(statistics.median(samples)), _short(min(samples)), _short(max(samples))]


def _short(value: float) -> float:
    return float(f"{value:.4g}")


# --- what is written --------------------------------------------------------------------------------------------------


def about(args: argparse.Namespace, skipped: Sequence[str]) -> Row:
    """Where and how."""
    cpu = next((x.split(":")[1].strip() for x in _lines("/proc/cpuinfo") if x.startswith("model name")), "")
    row = {
        "mib": args.mib,
        "repeats": args.repeats,
        "data": "Python's language reference" if args.data == REFERENCE else Path(args.data).name,
        "date": datetime.date.today().isoformat(),
        "machine": f"{psutil.cpu_count()} processors ({cpu}), {psutil.virtual_memory().total / 2**30:.0f} GiB, "
        f"Linux {platform.release().split('-')[0]}",
        "versions": {
            "thinwire": thinwire.__version__,
            "torch": torch.__version__,
            "Python": platform.python_version(),
            **versions(),
        },
        "skipped": list(skipped),
    }
    if torch.cuda.is_available():
        row["gpu"] = torch.cuda.get_device_name()
    return row


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def markdown(told: Mapping[str, Any], rows: Mapping[str, Row]) -> str:
    """The tables."""
    machines = {"1": "One core", "2": "Two cores", "cuda": f"On {told.get('gpu')}"}
    versions_told = ", ".join(f"{name} {number}" for name, number in told["versions"].items())
    copies = [rows[name]["1"]["copy_s"] for name in rows if "1" in rows[name]]
    parts = [
        "Written by `python benchmarks/codecs.py`, which says how each figure is measured.",
        f"{told['date']}. {versions_told}. {told['machine']}.",
        *told["skipped"],
        "",
        f"## Size and error\n\nReal tensors of a byte-level GPT of 0.9M parameters on {told['data']}, seed 0, at steps "
        f"{', '.join(map(str, STEPS))}; normal: a million normal numbers. Error is `||x - C(x)||^2 / ||x||^2`; bits "
        "are an element's, the median over the tensors, without the packet's header.\n",
        _quality_table(rows),
    ]
    if not copies:
        return "\n".join(parts) + "\n"
    parts += [
        f"\n## Speed\n\n{told['mib']} MiB of normal float32 numbers, {told['repeats']} repeats, fewer where a codec is "
        f"slow: median (lowest to highest) of copy's time over the codec's. A copy took "
        f"{1000 * statistics.median(copies):.1f} ms on one core. Memory: peak growth while encoding, output included, "
        "over the tensor's size. Link: how many times quicker encoding is than a 1 Gbit/s link moves the float32 "
        "tensor, and than it moves what was written; below 1 the codec is slower than the link.\n",
    ]
    for machine, heading in machines.items():
        if any(machine in row for row in rows.values()):
            parts += [f"### {heading}\n", _speed_table(rows, machine)]
    return "\n".join(parts).rstrip() + "\n"


def _quality_table(rows: Mapping[str, Row]) -> str:
    lines = [
        "| codec | bits: gradient, delta, normal | error: gradient | cosine | error: delta | cosine | error: normal |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        bits = ", ".join(f"{statistics.median(row[kind]['bits']):.3g}" for kind in ("gradient", "delta", "normal"))
        cells = [_escaped(name), bits]
        for kind in ("gradient", "delta"):
            cells += [_several(row[kind]["error"], ".2g"), _several(row[kind]["cosine"], ".4f")]
        lines.append(f"| {' | '.join(cells)} | {row['normal']['error'][0]:.2g} |")
    return "\n".join(lines)


def _speed_table(rows: Mapping[str, Row], machine: str) -> str:
    lines = [
        "| codec | encode | decode | memory | link: float32 | link: its output |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if machine not in row:
            continue
        timed = row[machine]
        link = [_times(8 * size / _LINK_BITS_PER_S / timed["encode_s"]) for size in (4 * timed["n"], timed["bytes"])]
        used = "" if "memory" not in row or machine == "cuda" else f"{row['memory']:.2f}"
        cells = [_fraction(timed["encode"]), _fraction(timed["decode"]), used, *link]
        lines.append(f"| {_escaped(name)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _times(quotient: float) -> str:
    return "-" if quotient > 1000 else f"{quotient:.2g}" if quotient < 10 else f"{quotient:.0f}"


def _fraction(spread: Sequence[float]) -> str:
    median, lowest, highest = spread
    return "no work" if median > 20 else f"{median:.2g} ({lowest:.2g} to {highest:.2g})"


def _several(values: Sequence[float], form: str) -> str:
    return ", ".join(f"{value:{form}}" for value in values)


def _escaped(name: str) -> str:
    return f"`{name}`".replace("|", "\\|") if ":" not in name else name


def measured(name: str, make: Maker, samples: Sequence[Sample], x: Tensor, args: argparse.Namespace) -> Row:
    """A whole row."""
    row = quality(make, samples)
    if args.no_speed:
        return row
    for threads in (1, 2):
        torch.set_num_threads(threads)
        row[str(threads)] = {"n": len(x)} | speed(make, x, repeats=args.repeats, budget_s=args.budget)
    torch.set_num_threads(1)
    row["memory"] = memory(name, args.mib)
    if torch.cuda.is_available():
        try:
            row["cuda"] = {"n": len(x)} | speed(make, x.cuda(), repeats=args.repeats, budget_s=args.budget)
        except (RuntimeError, TypeError) as error:  # a reference that is for processors only
            print(f"{name} does not run on the GPU: {str(error).splitlines()[0]}")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default=REFERENCE)
    parser.add_argument("--only", action="append", metavar="EXPRESSION")
    parser.add_argument("--missing", action="store_true")
    parser.add_argument("--no-speed", action="store_true")
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--budget", type=float, default=6.0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(_memory_here(args.memory_of, args.mib))
        return
    file = args.results / "codecs.json"
    kept = json.loads(file.read_text()) if file.exists() else {"about": {}, "rows": {}}
    old: dict[str, Row] = kept["rows"]
    makers, skipped = subjects()
    wanted = args.only or [name for name in makers if not (args.missing and name in old)]
    for name in wanted:
        if name not in makers:
            raise SystemExit(f"{name!r} is not in benchmarks/expressions.py; add its line there")
    torch.set_num_threads(1)
    normal = torch.empty(1_000_000).normal_(generator=torch.Generator().manual_seed(0))
    samples = [*load(args.data), Sample("normal", 0, normal, ("x",), ((1000, 1000),))]
    x = _normal(0 if args.no_speed else args.mib)
    told = about(args, skipped)
    if args.no_speed:
        told |= {part: kept["about"][part] for part in ("mib", "repeats") if part in kept["about"]}
    new: dict[str, Row] = {}
    for name in wanted:
        start = time.perf_counter()
        try:
            new[name] = (old.get(name, {}) if args.no_speed else {}) | measured(name, makers[name], samples, x, args)
        except Exception as error:
            if name in expressions():
                raise
            skipped.append(f"{name} is left out: it does not run here ({type(error).__name__}: {error}).")
            told["skipped"] = list(skipped)
            print(skipped[-1])
            continue
        timed = new[name].get("1", {"encode": "", "decode": ""})
        print(f"{name}: {timed['encode']} {timed['decode']} in {time.perf_counter() - start:.0f} s", flush=True)
        rows = {each: (old | new)[each] for each in [*makers, *(old.keys() - makers.keys())] if each in old | new}
        args.results.mkdir(parents=True, exist_ok=True)
        file.write_text(_compact(told, rows))
        (args.results / "codecs.md").write_text(markdown(told, rows))


def _compact(told: Row, rows: Mapping[str, Row]) -> str:
    """JSON with a line for each row."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    return f'{{\n "about": {json.dumps(told)},\n "rows": {{\n{lines}\n }}\n}}\n'


if __name__ == "__main__":
    main()
