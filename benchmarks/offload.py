"""A model that does not fit a limit on memory, tuned from a file; one process for each figure, one thread.

    python benchmarks/offload.py [--stages 24] [--steps 8] [--limit-mb 120] [--out FILE.md]

The model is a tower of residual blocks, 512 to 2048 to 512, in float32; the task is to tell 8 classes of a fixed
teacher, from a fixed batch of 256. The limit is RLIMIT_DATA, which counts a process's private memory but not the
libraries' code: of what the process has after importing torch and the limit on top, the model may use the limit. That
it holds is shown by loading the file whole under it. Peak memory is VmHWM less what there was after imports. Times are
medians over steps; "in memory" is the same steps without a limit, weights on the host.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from thinwire.seeds.offload import Offloaded
from thinwire.seeds.recipe import Recipe
from thinwire.seeds.shelves import FileShelf, HostShelf
from thinwire.seeds.sides import SidedTuner

WIDTH, INNER, CLASSES, BATCH = 512, 2048, 8, 256
RECIPE = Recipe(seed=1, samples=1, eps=1e-3, code="byte")
LR = 1e-4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def tower(stages: int) -> dict[str, nn.Module]:
    return {**{f"block.{i}": Block() for i in range(stages)}, "head": nn.Linear(WIDTH, CLASSES)}


def work() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, WIDTH, generator=g)
    return x, (x @ torch.randn(WIDTH, CLASSES, generator=g)).argmax(dim=1)


def kilobytes(word: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith(word)).split()[1])


def write(path: str, stages: int) -> dict[str, object]:
    torch.manual_seed(0)
    state = {f"{name}.{key}": value for name, m in tower(stages).items() for key, value in m.state_dict().items()}
    save_file(state, path)
    return {"parameters": sum(value.numel() for value in state.values())}


def tune(path: str, stages: int, steps: int, limit_mb: int) -> dict[str, object]:
    """Tune from the file under the limit; without one, from the host's memory."""
    x, y = work()
    with torch.device("meta"):
        modules = tower(stages)
    nn.functional.cross_entropy(x @ torch.randn(WIDTH, CLASSES), y)  # libraries' own memory, before it is counted
    refused = False
    before_kb = kilobytes("VmRSS")
    if limit_mb:
        most = (kilobytes("VmData") << 10) + (limit_mb << 20)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        try:
            {name: value.clone() for name, value in load_file(path).items()}
        except (RuntimeError, MemoryError):
            refused = True
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    shelf = FileShelf(path) if limit_mb else HostShelf(load_file(path))
    losses, times = [], []
    with SidedTuner(Offloaded(modules, shelf, RECIPE), RECIPE) as tuner:
        for _ in range(steps):
            start = time.perf_counter()
            losses.append(tuner.step(x, lambda output: nn.functional.cross_entropy(output, y), lr=LR).loss)
            times.append(time.perf_counter() - start)
        final = float(nn.functional.cross_entropy(tuner.model.forward(x), y))
        start = time.perf_counter()
        if not limit_mb:
            for _ in range(2 * RECIPE.samples):
                tuner.model.forward(x)
    passes_s = time.perf_counter() - start
    peak_mb = (kilobytes("VmHWM") - before_kb) / 1024
    return {
        "refused": refused,
        "first": losses[0],
        "final": final,
        "step_s": statistics.median(times),
        "passes_s": passes_s,
        "peak_mb": peak_mb,
        "digest": tuner.log.result,
        "log_bytes": len(tuner.log.to_bytes()),
    }


def child(*words: object) -> dict[str, object]:
    command = [sys.executable, __file__, "--child", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def report(stages: int, steps: int, limit_mb: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.safetensors"
        parameters = child("write", path, stages)["parameters"]
        copy = f"{folder}/copy.safetensors"
        Path(copy).write_bytes(Path(path).read_bytes())
        size_mb = Path(path).stat().st_size / 2**20
        limited, free = child("tune", path, stages, steps, limit_mb), child("tune", copy, stages, steps, 0)
    assert limited["refused"], "the model fits the limit: choose more stages"
    assert limited["digest"] == free["digest"], "a file and memory gave different bits"
    lines = [
        "# A model larger than the memory it is tuned in",
        "",
        f"`python benchmarks/offload.py --stages {stages} --steps {steps} --limit-mb {limit_mb}`: {parameters:,}"
        f" parameters, {size_mb:.0f} MiB, in {stages} stages of {size_mb / stages:.1f} MiB; {RECIPE.samples} sample,"
        f" seed {RECIPE.seed}, lr {LR}, one run. torch {torch.__version__}, {platform.machine()}, one thread.",
        "",
        "| | from a file, limited | in memory |",
        "|---|---|---|",
        f"| memory allowed | {limit_mb} MiB | no limit |",
        "| loading the file whole | refused | loads |",
        f"| peak over what the libraries take | {limited['peak_mb']:.0f} MiB | {free['peak_mb']:.0f} MiB |",
        f"| a step | {limited['step_s']:.2f} s | {free['step_s']:.2f} s |",
        f"| the step's forward passes alone | | {free['passes_s']:.2f} s |",
        f"| loss, first and after {steps} steps | {limited['first']:.4f}, {limited['final']:.4f} |"
        f" {free['first']:.4f}, {free['final']:.4f} |",
        f"| digest of the weights | {limited['digest']} | the same |",
        f"| log of the run | {limited['log_bytes']} bytes | the same |",
        "",
        "The file is read and written through the system's page cache, which is not counted and was warm. The"
        " machine had other work to do: times are rough.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=24)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--limit-mb", type=int, default=120)
    parser.add_argument("--out", default="benchmarks/results/offload.md")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        torch.set_num_threads(1)
        what, path, *numbers = given.child
        print(json.dumps({"write": write, "tune": tune}[what](path, *map(int, numbers))))  # type: ignore[operator]
        return
    text = report(given.stages, given.steps, given.limit_mb)
    Path(given.out).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
