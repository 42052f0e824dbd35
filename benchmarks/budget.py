"""What a budget saves: bytes at the error of one setting for all layers, on real gradients and deltas.

    python benchmarks/budget.py [DATA.txt] [--seeds 0 1 2]

For every tensor of tensors.py, codec family and uniform setting: the bytes that L-GreCo's dynamic programme and the
proportional control need for at most the same total squared error, measured with the choice made on that very tensor,
and on the next one of the same kind (made at one stage of training, used at the next). Bytes are those of the fields,
parameters that stay as they are included. Of PowerSGD the error is that of the best matrix of the rank, which its warm
start comes near, and bytes are those of matrices alone. One core.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import platform
import statistics
from pathlib import Path

import numpy as np
import torch
from tensors import Sample, load

import thinwire
from thinwire.codecs import Codec, PowerSGD, budget, int2, int3, int4, int6, int8, powersgd, topk
from thinwire.codecs.allocation import total
from thinwire.codecs.budget import Budget
from thinwire.train.corpus import REFERENCE

RESULTS = Path(__file__).with_name("results") / "budget.md"
SHARES = (1 / 1000, 1 / 500, 1 / 200, 1 / 100, 1 / 50, 1 / 20, 1 / 10, 1 / 5)
FAMILIES: dict[str, tuple[Codec | PowerSGD, ...]] = {
    "topk": tuple(topk(share) for share in SHARES),
    "topk | int8": tuple(topk(share) | int8 for share in SHARES),
    "int2 .. int8": (int2, int3, int4, int6, int8),
    "powersgd": tuple(powersgd(rank) for rank in (1, 2, 3, 4, 6, 8, 12, 16)),
    "topk | int8 and int2 .. int8": (*(topk(share) | int8 for share in SHARES), int2, int3, int4, int6, int8),
}
UNIFORM = {
    "topk": ("topk(0.01)", "topk(0.05)"),
    "topk | int8": ("topk(0.01) | int8", "topk(0.05) | int8"),
    "int2 .. int8": ("int3", "int4", "int6"),
    "powersgd": ("powersgd(rank=2)", "powersgd(rank=4)", "powersgd(rank=8)"),
    "topk | int8 and int2 .. int8": ("topk(0.05) | int8", "int4"),
}


def measured(chooser: Budget, choice: np.ndarray, sample: Sample) -> tuple[int, float]:
    """Bytes of the fields and squared error of a sample written with a choice; of ranks, what they come to at best."""
    codec = chooser.written(choice, sample.shapes)
    if isinstance(codec, PowerSGD):
        count = len(chooser.options)
        rows = chooser.measure(sample.vector, sample.shapes, 0).double().numpy().reshape(len(choice), 2 * count + 1)
        return int(total(rows[:, count:-1], choice)), total(rows[:, :count] ** 2, choice)
    fields = codec.encode(sample.vector, 0)
    error = sample.vector - codec.decode(fields, len(sample.vector), 0)
    return sum(f.numel() * f.element_size() for f in fields.values()), float(error.double().square().sum())


def compared(family: str, like: int, rule: str, made_on: Sample, used_on: Sample) -> tuple[float, float]:
    """(bytes of the uniform setting over bytes of the choice, error of the choice over the uniform setting's)."""
    chooser = budget(*FAMILIES[family], like=like, rule=rule).fit(made_on.shapes)  # type: ignore[arg-type]
    table = chooser.measure(made_on.vector, made_on.shapes, 0).double().numpy()
    uniform = np.full(table.size // (2 * len(chooser.options) + 1), like)
    bytes_uniform, error_uniform = measured(chooser, uniform, used_on)
    bytes_chosen, error_chosen = measured(chooser, chooser.choose(table, uniform), used_on)
    return bytes_uniform / bytes_chosen, error_chosen / error_uniform


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default=REFERENCE)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    samples = {seed: load(args.data, seed=seed) for seed in args.seeds}
    rows = []
    for family, names in UNIFORM.items():
        specs = [option.spec for option in FAMILIES[family]]
        for name in names:
            like = specs.index(thinwire.codecs.parse(name).spec)
            for kind in ("gradient", "delta"):
                cells = []
                for rule, later in (("dynamic", False), ("dynamic", True), ("proportional", False)):
                    found = []
                    for all_samples in samples.values():
                        kept = [sample for sample in all_samples if sample.kind == kind]
                        pairs = list(itertools.pairwise(kept)) if later else [(sample, sample) for sample in kept]
                        found += [compared(family, like, rule, a, b) for a, b in pairs]
                    saved, error = zip(*found, strict=True)
                    cells.append(
                        f"{statistics.median(saved):.2f} ({min(saved):.2f} .. {max(saved):.2f}) "
                        f"at {statistics.median(error):.2f} of the error"
                    )
                told = [text.replace("|", "\\|") for text in (family, f"`{name}`")]
                rows.append("| " + " | ".join([*told, kind, *cells]) + " |")
                print(rows[-1], flush=True)
    layers = sum(1 for shape in samples[args.seeds[0]][0].shapes if len(shape) > 1)
    text = f"""# What a budget saves

Times fewer bytes than one setting for all layers, median (lowest .. highest) over {len(args.seeds)} seed(s) and three
stages of training (two where the choice is used a stage later), and the total squared error beside it. The model has
{layers} matrices.

| options | uniform setting | tensor | dynamic programme | used one stage later | proportional control |
|---|---|---|---|---|---|
{chr(10).join(rows)}

`python benchmarks/budget.py DATA.txt`, seeds {", ".join(map(str, args.seeds))}; {datetime.date.today()},
{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, thinwire {thinwire.__version__}.
"""
    RESULTS.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
