"""Snapshots: how fast a state is coded, beside a copy of the same memory, and how long training stands still for one.

    OMP_NUM_THREADS=1 python benchmarks/snapshots.py [--mb 64] [--repeats 5] [--steps 60] [--out FILE.md]

Coding: random bytes, code (6, 4), two data shards lost. Every figure is the median over repeats, taken in turns, with
the least and the most beside it. Training: a tower of linear layers under Adam, whose state (parameters, two moments)
goes into a keeper's shared memory every few steps, beside the same steps without snapshots and the same with a plain
copy of all tensors in one go. One thread trains.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from thinwire.snapshots import erasure
from thinwire.snapshots.capture import Capture
from thinwire.snapshots.erasure import Code
from thinwire.snapshots.store import open_store

CODE = Code(6, 4)


def seconds(job: Callable[[], object]) -> float:
    """Of processor time: all of the coding is done by one thread."""
    began = time.process_time()
    job()
    return time.process_time() - began


def coding(megabytes: int, repeats: int) -> list[str]:
    state = np.random.default_rng(0).integers(0, 256, megabytes * 1_000_000, dtype=np.uint8)
    out = state.copy()  # its pages are there
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
    lines = ["| | MB of state a second of processor time | least, most | of a memory copy |", "|---|---|---|---|"]
    for name, rate in rates.items():
        median = statistics.median(rate)
        lines.append(f"| {name} | {median:.0f} | {rate[0]:.0f}, {rate[-1]:.0f} | {100 * median / copy:.1f} % |")
    assert np.array_equal(erasure.recover(manifest, kept), state)
    return lines


class Trainee:
    """A model under Adam, and its state."""

    def __init__(self, width: int, depth: int, batch: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(depth)))
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.x = torch.randn(batch, width)
        self.step()

    def step(self) -> None:
        self.optimizer.zero_grad()
        (self.model(self.x) - self.x).square().mean().backward()
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def tensors(self) -> list[torch.Tensor]:
        moments = self.optimizer.state_dict()["state"].values()
        return [*self.model.state_dict().values(), *(each for of in moments for each in of.values())]


class Nothing:
    """No snapshots."""

    def __init__(self, trainee: Trainee, folder: str) -> None: ...

    def take(self, number: int) -> bool:
        return True

    def end(self) -> float:
        return 0.0


class Beside:
    """Snapshots as thinwire takes them."""

    def __init__(self, trainee: Trainee, folder: str) -> None:
        self.store, self.trainee = open_store(folder), trainee
        self.capture = Capture(self.store, "bench")
        self.hook = trainee.optimizer.register_step_pre_hook(lambda *_: self.capture.settle())
        for version in range(2):  # the first two make the memory that all others use again
            self.capture.begin(trainee.state(), version=version)
            self.capture.finish()
        self.capture.stall_s = 0.0

    def take(self, number: int) -> bool:
        return self.capture.begin(self.trainee.state(), version=100 + number)

    def end(self) -> float:
        self.capture.close()
        self.hook.remove()
        self.store.stop()
        return self.capture.stall_s


class AtOnce:
    """A copy of all tensors between two steps."""

    def __init__(self, trainee: Trainee, folder: str) -> None:
        self.live, self.stall_s = trainee.tensors(), 0.0
        self.held = [tensor.clone() for tensor in self.live]

    def take(self, number: int) -> bool:
        began = time.perf_counter()
        for held, live in zip(self.held, self.live, strict=True):
            held.copy_(live)
        self.stall_s += time.perf_counter() - began
        return True

    def end(self) -> float:
        return self.stall_s


def training(steps: int, every: int, repeats: int, trainee: Trainee) -> list[str]:
    walls: dict[str, list[float]] = {}
    spent: dict[str, list[float]] = {}
    stalls: dict[str, float] = {}
    taken: dict[str, int] = {}
    for _ in range(repeats):
        for name, kind in (("none", Nothing), ("a copy of all tensors at once", AtOnce), ("beside training", Beside)):
            with tempfile.TemporaryDirectory() as folder:
                way = kind(trainee, folder)
                began_cpu = time.process_time()
                for number in range(steps):
                    began = time.perf_counter()
                    taken[name] = taken.get(name, 0) + (number % every == 0 and way.take(number))
                    trainee.step()
                    walls.setdefault(name, []).append(time.perf_counter() - began)
                spent.setdefault(name, []).append((time.process_time() - began_cpu) / steps)
                stalls[name] = stalls.get(name, 0.0) + way.end()
    size = sum(tensor.nbytes for tensor in trainee.tensors())
    lines = [
        f"State: {size / 1e6:.0f} MB; {repeats} times {steps} steps of each in turns, a snapshot every {every}. "
        "Processor time is the trainer's, its copying thread included; the keeper's is not in it.",
        "",
        "| snapshots | a step, median | processor time of a step | stall of a snapshot | of all time | taken |",
        "|---|---|---|---|---|---|",
    ]
    for name, times in walls.items():
        stall = f"{1000 * stalls[name] / taken[name]:.1f} ms | {100 * stalls[name] / sum(times):.2f} %"
        lines.append(
            f"| {name} | {1000 * statistics.median(times):.1f} ms | {1000 * statistics.median(spent[name]):.1f} ms "
            f"| {stall if name != 'none' else '|'} | {taken[name] if name != 'none' else ''} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=10)
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
        f"{torch.__version__}, {platform.machine()}, one thread trains; one run. The load was "
        f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores as it began: times are rough.",
        "",
        f"## Code ({CODE.shards}, {CODE.needed}), {given.mb} MB",
        "",
        *coding(given.mb, given.repeats),
        "",
        "## Training",
        "",
        *training(given.steps, given.every, given.repeats, Trainee(given.width, given.depth, given.batch)),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if given.out:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
