"""FedZip and the lossless stages on a real update: how small it gets, and what it does to the model.

    python benchmarks/fedzip.py [--data FILE] [--warm 100] [--steps 100] [--seeds 0,1] [--out FILE.md]

One member trains the GPT of 0.9M parameters (context 128, batch 8, AdamW at 2e-3, one thread) for `warm` steps, then
for `steps` more, which are the update. Each codec writes the whole update as one packet; rate is 4 bytes a parameter
over the packet's bytes, header and all. The loss is on held-out text, of the model before plus the decoded update.

The second table goes on for several such updates, one applied after the other, with error feedback and without.
"""

from __future__ import annotations

import argparse
import math
import platform
import re
import statistics
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import thinwire
from thinwire.codecs import Codec, parse
from thinwire.packet import Packet
from thinwire.train.tasks import Task
from thinwire.train.text import TextOptions

CODECS = [
    "fp32", "bf16 | zstd", "bf16 | rans", "int8 | zstd", "int8 | rans", "int8 | rans(segment=65536)",
    "int8 | rans(segment=8192)", "int4 | zstd", "int4 | rans", "kmeans(16) | rans", "kmeans(3) | rans",
    "topk(0.2) | kmeans(3)", "topk(0.2) | kmeans(3) | zstd", "topk(0.2) | kmeans(3) | rans",
    "topk(0.01) | kmeans(4) | rans", "topk(0.003) | kmeans(4)", "topk(0.003) | kmeans(4) | rans",
    "topk(0.003, index='smallest') | kmeans(4) | rans", "topk(0.001) | kmeans(4) | rans",
    "topk(0.001, index='smallest') | kmeans(4) | rans",
]  # fmt: skip
SEVERAL = ["fp32", "topk(0.01) | kmeans(4) | rans", "topk(0.003) | kmeans(4) | rans"]


def train(task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, first: int, steps: int) -> Tensor:
    """What `steps` local steps add to the parameters.  [n]"""
    before = parameters_to_vector(model.parameters()).detach().clone()
    for step in range(first, first + steps):
        task.loss(model, task.batch(step, 0, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters_to_vector(model.parameters()).detach() - before


def loss_at(task: Task, model: nn.Module, params: Tensor) -> float:
    vector_to_parameters(params, model.parameters())
    return task.evaluate(model)["loss"]


def plain(expression: str) -> Codec:
    codec = parse(expression)
    assert isinstance(codec, Codec)
    return codec


def packet_bytes(codec: Codec, x: Tensor) -> tuple[int, Tensor]:
    fields = codec.encode(x, 0)
    return Packet(codec.spec, len(x), fields).to_bytes().numel(), codec.decode(fields, len(x), 0)


def floor(codec: str, n: int) -> str:
    """Rate of topk(p) | kmeans(k), were positions written at H(p) bits an element and codes for nothing."""
    if not codec.startswith("topk"):
        return ""
    p = float(re.findall(r"[\d.]+", codec)[0])
    return f"{32 / -(p * math.log2(p) + (1 - p) * math.log2(1 - p)):.0f}"


def one_update(task: Task, seed: int, warm: int, steps: int) -> dict[str, tuple[float, float, float]]:
    """Codec -> rate, relative squared error, loss after the decoded update."""
    torch.manual_seed(seed)
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    train(task, model, optimizer, 0, warm)
    before = parameters_to_vector(model.parameters()).detach().clone()
    delta = train(task, model, optimizer, warm, steps)
    found = {"nothing": (math.inf, 1.0, loss_at(task, model, before))}
    for expression in CODECS:
        size, decoded = packet_bytes(plain(expression), delta)
        error = ((decoded - delta).square().sum() / delta.square().sum()).item()
        found[expression] = (4 * len(delta) / size, error, loss_at(task, model, before + decoded))
    return found


def several_updates(task: Task, seed: int, steps: int, updates: int, expression: str, *, memory: bool) -> float:
    """Loss after some updates, each of `steps` local steps from where the decoded ones led."""
    torch.manual_seed(seed)
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    codec = plain(expression)
    anchor = parameters_to_vector(model.parameters()).detach().clone()
    residual = torch.zeros_like(anchor)
    for update in range(updates):
        target = train(task, model, optimizer, update * steps, steps) + residual
        decoded = codec.decode(codec.encode(target, update), len(target), update)
        residual = target - decoded if memory else residual
        anchor = anchor + decoded
        vector_to_parameters(anchor.clone(), model.parameters())
    return task.evaluate(model)["loss"]


def cell(codec: str) -> str:
    """An expression within a table."""
    return "`" + codec.replace("|", "\\|") + "`" if codec != "nothing" else codec


def spread(values: list[float], form: str) -> str:
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="reference")
    parser.add_argument("--warm", type=int, default=100)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    tasks = {s: TextOptions(data=args.data, size="0.9M", context=128, batch_size=8).build(seed=s) for s in seeds}
    runs = [one_update(task, seed, args.warm, args.steps) for seed, task in tasks.items()]
    n = sum(p.numel() for p in tasks[seeds[0]].model().parameters())
    lines = [
        f"An update of {args.steps} steps after {args.warm}, {n} parameters, data {Path(args.data).name}, "
        f"seeds {args.seeds}. thinwire {thinwire.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, one thread.",
        "",
        "| codec | rate, mean (lowest to highest) | rate if positions took their entropy and all else nothing "
        "| error, share of the energy | validation loss |",
        "|---|---|---|---|---|",
    ]
    for name in runs[0]:
        rates, errors, losses = ([run[name][i] for run in runs] for i in range(3))
        rate = "" if name == "nothing" else spread(rates, ".2f")
        lines.append(
            f"| {cell(name)} | {rate} | {floor(name, n)} | {statistics.mean(errors):.4f} | {spread(losses, '.3f')} |"
        )
    lines += ["", f"Loss after {args.updates} updates of {args.steps} steps from the start:", ""]
    lines += ["| codec | without feedback | with feedback |", "|---|---|---|"]
    for name in SEVERAL:
        ends = [
            spread([several_updates(t, s, args.steps, args.updates, name, memory=m) for s, t in tasks.items()], ".3f")
            for m in ((False,) if name == "fp32" else (False, True))
        ]
        lines.append(f"| {cell(name)} | {' | '.join([*ends, ''][:2])} |")
    text = "\n".join(lines)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
