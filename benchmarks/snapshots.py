"""Snapshots: how fast a state is coded, beside a copy of the same memory, and how long training stands still for one.

    OMP_NUM_THREADS=1 python benchmarks/snapshots.py [--mb 64] [--repeats 5] [--steps 60] [--out FILE.md]

Coding: random bytes, code (6, 4), two data shards lost. Every figure is the median over repeats, taken in turns, with
the least and the most beside it. Training: a GPT-like tower of linear layers under Adam, whose state (parameters and two
moments) is snapshotted every few steps into a keeper's shared memory, beside the same steps without snapshots and the
same with a plain copy of all tensors in one go. One thread trains.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from thinwire.snapshots import erasure
from thinwire.snapshots.capture import Capture
from thinwire.snapshots.erasure import Code
from thinwire.snapshots.store import open_store

CODE = Code(6, 4)


def seconds(job: Callable[[], object]) -> float:
    began = time.perf_counter()
    job()
    return time.perf_counter() - began


def coding(megabytes: int, repeats: int) -> list[str]:
    state = np.random.default_rng(0).integers(0, 256, megabytes * 1_000_000, dtype=np.uint8)
    out = np.empty_like(state)
    manifest, shards = erasure.encode(state, CODE, 0)
    kept = {index: shards[index] for index in (2, 3, 4, 5)}

    def without_digests() -> None:
        digest, erasure.digest = erasure.digest, lambda shard: ""
        try:
            erasure.encode(state, CODE, 0)
        finally:
            erasure.digest = digest

    jobs: dict[str, Callable[[], object]] = {
        "copy of the memory": lambda: np.copyto(out, state),
        "SHA-256": lambda: hashlib.sha256(state.data).digest(),
        "encode, without digests": without_digests,
        "encode": lambda: erasure.encode(state, CODE, 0),
        "recover, two data shards lost": lambda: erasure.recover(manifest, kept),
        "recover, none lost": lambda: erasure.recover(manifest, dict(enumerate(shards))),
    }
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            taken[name].append(seconds(job))
    rates = {name: sorted(megabytes / each for each in times) for name, times in taken.items()}
    copy = statistics.median(rates["copy of the memory"])
    lines = ["| | MB of state a second | least, most | of a memory copy |", "|---|---|---|---|"]
    for name, rate in rates.items():
        median = statistics.median(rate)
        lines.append(f"| {name} | {median:.0f} | {rate[0]:.0f}, {rate[-1]:.0f} | {100 * median / copy:.1f} % |")
    assert np.array_equal(erasure.recover(manifest, kept), state)
    return lines


def training(steps: int, width: int, depth: int, batch: int) -> list[str]:
    lines = ["| snapshots | a step | stall of a snapshot | of all time | taken |", "|---|---|---|---|---|"]
    size = 0
    for name, every in (("none", 0), ("a plain copy, every 10 steps", 10), ("beside training, every 10 steps", 10)):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(depth)))
        optimizer = torch.optim.Adam(model.parameters())
        x = torch.randn(batch, width)
        plain = name.startswith("a plain")
        with tempfile.TemporaryDirectory() as folder:
            store = open_store(folder)
            capture = Capture(store, "bench")
            optimizer.register_step_pre_hook(lambda *_, capture=capture: capture.settle())
            held = None

            def step() -> None:
                optimizer.zero_grad()
                (model(x) - x).square().mean().backward()
                optimizer.step()

            for warm in range(3):
                step()
                if every and not plain:  # the first two snapshots make the memory that others use again
                    capture.begin({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, version=warm)
                    capture.settle()
                    capture.finish()
            tensors = [*model.state_dict().values()]
            tensors += [t for state in optimizer.state_dict()["state"].values() for t in state.values()]
            size = sum(tensor.nbytes for tensor in tensors)
            held = [tensor.clone() for tensor in tensors]
            stalls, taken, began, capture.stall_s = 0.0, 0, time.perf_counter(), 0.0
            for number in range(steps):
                if every and number % every == 0:
                    if plain:
                        stalls += seconds(lambda: [a.copy_(b) for a, b in zip(held, tensors, strict=True)])  # noqa: B023
                        taken += 1
                    else:
                        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                        taken += capture.begin(state, version=100 + number)
                step()
            whole = time.perf_counter() - began
            stalls += capture.stall_s
            capture.close()
            store.stop()
        per = f"{1000 * stalls / taken:.1f} ms" if taken else ""
        share = f"{100 * stalls / whole:.2f} %" if taken else ""
        lines.append(f"| {name} | {1000 * whole / steps:.1f} ms | {per} | {share} | {taken or ''} |")
    return [f"State: {size / 1e6:.0f} MB; {steps} steps, batch {batch}.", "", *lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# Snapshots in memory",
        "",
        f"`python benchmarks/snapshots.py --mb {given.mb} --repeats {given.repeats} --steps {given.steps}`: torch "
        f"{torch.__version__}, {platform.machine()}, one thread trains; one run. The machine had other work to do: times "
        "are rough.",
        "",
        f"## Code ({CODE.shards}, {CODE.needed}), {given.mb} MB",
        "",
        *coding(given.mb, given.repeats),
        "",
        "## Training",
        "",
        *training(given.steps, given.width, given.depth, given.batch),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if given.out:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
