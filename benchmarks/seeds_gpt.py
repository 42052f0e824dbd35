"""A GPT pretrained on one text and tuned to another: by seeds and scalars, by gradients, by adapters.

    python benchmarks/seeds_gpt.py DATA.txt [--pretrain 600] [--steps 3000] [--seeds 3] [--out FILE.md]

A byte-level GPT of 0.9M parameters learns Python's own language reference (AdamW, one process), and is then tuned to
DATA.txt by four members on the local link, batches of 8 windows of 64 a member. Loss is on held-out windows of
DATA.txt. Bytes are those of all packets that a member sent. One gradient is counted as three forward passes. --tune
tries other learning rates on another seed; the table says whether that was done.

A run that is done is a line of results/seeds_gpt.jsonl and is not done again.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import thinwire
from thinwire.links.base import Link
from thinwire.seeds.pool import FedKSeed
from thinwire.seeds.pool_tuner import PoolTuner
from thinwire.train.tasks import Task
from thinwire.train.text import TextOptions

RESULTS = Path(__file__).with_name("results")
MEMBERS, TUNED = 4, 100  # the seed of --tune, which no table has
OPTIONS = {"size": "0.9M", "context": 64, "batch_size": 8}


@dataclass(frozen=True)
class Contender:
    """How members tune; `rates` are those that --tune tries, `lr` the one that was best."""

    kind: str
    lr: float
    rates: tuple[float, ...]
    share: float = 1.0  # of --steps
    adapters: bool = False
    options: tuple[tuple[str, Any], ...] = ()


CONTENDERS = {
    "AdamW, every step": Contender("ddp", 1e-3, (5e-4, 1e-3, 2e-3), 0.1),
    "AdamW, DiLoCo every 30": Contender("diloco", 1e-3, (5e-4, 1e-3, 2e-3), 0.1),
    "LoRA of rank 4, every step": Contender("ddp", 1e-2, (3e-3, 1e-2, 2e-2), 0.1, True),
    "ferret, every 30": Contender("ferret", 1e-3, (5e-4, 1e-3, 2e-3), 0.1),
    "one byte": Contender("bytes", 3e-4, (1e-4, 3e-4, 1e-3)),
    "one byte, adam": Contender("bytes", 1e-3, (3e-4, 1e-3, 3e-3), 1.0, False, (("rule", "adam"),)),
    "one byte, momentum": Contender("bytes", 3e-5, (1e-5, 3e-5, 1e-4), 1.0, False, (("rule", "momentum"),)),
    "one byte, 8 samples": Contender("bytes", 1e-3, (3e-4, 1e-3, 3e-3), 1 / 8, False, (("samples", 8),)),
    "one byte, one of four with gradients": Contender("bytes", 3e-4, (3e-4,), 1.0, False, (("backward", 1),)),
    "FedKSeed, 1024 seeds, 20 steps a round": Contender("pool", 3e-4, (1e-4, 3e-4, 1e-3)),
    "one byte, LoRA of rank 4": Contender("bytes", 3e-3, (1e-3, 3e-3, 1e-2), 1.0, True, (("eps", 1e-2),)),
    "one byte, layers by quarters": Contender("bytes", 1e-3, (3e-4, 1e-3), 1.0, False, (("noise", "sparse(0.25)"),)),
}  # fmt: skip


def pretrained(steps: int) -> nn.Module:
    """On the language reference; kept beside the results while the script runs."""
    torch.manual_seed(0)
    task = TextOptions(**OPTIONS).build(seed=0)
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        for member in range(MEMBERS):
            (task.loss(model, task.batch(step, member, MEMBERS)) / MEMBERS).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def adapted(model: nn.Module) -> nn.Module:
    import peft

    torch.manual_seed(0)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "blocks" in name]
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=names)).eval()


def member(link: Link, base: nn.Module, task: Task, contender: Contender, lr: float, steps: int, seed: int) -> Any:
    model = copy.deepcopy(base)
    model = adapted(model) if contender.adapters else model
    start = time.perf_counter()
    if contender.kind == "bytes":
        options = dict(contender.options)
        backward = link.rank < options.pop("backward", 0)
        recipe = thinwire.just_one_byte(seed=seed, **options)
        passes = 2 * recipe.samples * steps
        loss: Callable[..., torch.Tensor] = lambda batch: task.loss(model, batch)  # noqa: E731
        with thinwire.tune(model, recipe, link, backward=backward, compare_every=200) as tuner:
            for step in range(steps):
                tuner.step(loss, task.batch(step, link.rank, MEMBERS), lr=lr * (1 - step / steps))
    elif contender.kind == "pool":
        pool = FedKSeed(seeds=1024, steps=20, lr=lr, eps=1e-3, seed=seed, share=1.0)
        passes = 2 * steps
        with PoolTuner(model, pool, link) as tuner:
            for first in range(0, steps, pool.steps):
                tuner.round(
                    lambda step, first=first: task.loss(model, task.batch(first + step, link.rank, MEMBERS)),
                    factor=1 - first / steps,
                )
    else:
        passes = 3 * steps
        method = {
            "ddp": thinwire.every_step,
            "diloco": lambda: thinwire.diloco(every=30),
            "ferret": lambda: thinwire.ferret(every=30),
        }[contender.kind]()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
        with thinwire.synchronize(model, optimizer, method, link, seed=seed):
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
                task.loss(model, task.batch(step, link.rank, MEMBERS)).backward()
                optimizer.step()
                optimizer.zero_grad()
    return {
        "loss": task.evaluate(model)["loss"] if link.rank == 0 else None,
        "tuned": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "passes": passes,
        "sent_bytes": sum(each.sent_bytes for each in link.meter.by_purpose().values()),
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--pretrain", type=int, default=600)
    parser.add_argument("--steps", type=int, default=3000, help="of the zeroth-order contenders with one sample")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    base = pretrained(args.pretrain)
    record = RESULTS / "seeds_gpt.jsonl"
    done = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    chosen = {name: each for name, each in CONTENDERS.items() if not args.only or name in args.only}
    for seed in [TUNED] if args.tune else range(args.seeds):
        task = TextOptions(**OPTIONS, data=args.data).build(seed=seed)
        for name, contender in chosen.items():
            for lr in contender.rates if args.tune else [contender.lr]:
                wanted = {"name": name, "steps": round(args.steps * contender.share), "lr": lr, "seed": seed}
                if any({key: line[key] for key in wanted} == wanted for line in done):
                    continue
                work = (base, task, contender, lr, wanted["steps"], seed)
                line = wanted | thinwire.run(MEMBERS, lambda link, work=work: member(link, *work))[0]
                print(line, flush=True)
                done.append(line)
                with record.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    if args.out:
        task = TextOptions(**OPTIONS, data=args.data).build(seed=0)
        args.out.write_text(_markdown(done, task.evaluate(base)["loss"], args))


def _markdown(lines: list[dict[str, Any]], before: float, args: argparse.Namespace) -> str:
    told = [
        "Written by `python benchmarks/seeds_gpt.py`, which says what is tuned to what.",
        f"Pretrained for {args.pretrain} steps; tuned to {Path(args.data).name}. thinwire {thinwire.__version__}, "
        f"torch {torch.__version__}, Python {platform.python_version()}; the machine was shared.",
        "",
        "| tuned by | learning rate | steps | numbers tuned | forward passes a member | loss, mean (lowest to highest) "
        "| bytes sent a member | a step | seeds |",
        "|---|---|---|---|---|---|---|---|---|",
        f"| nothing | | 0 | 0 | 0 | {before:.3f} | 0 | 0 | |",
    ]
    for name, contender in CONTENDERS.items():
        found = [
            line for line in lines if line["name"] == name and line["seed"] != TUNED and line["lr"] == contender.lr
        ]
        if found:
            losses = [line["loss"] for line in found]
            one = found[0]
            told.append(
                f"| {name} | {contender.lr:g} | {one['steps']} | {one['tuned']:,} | {one['passes']:,} "
                f"| {statistics.mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f}) | {one['sent_bytes']:,} "
                f"| {one['sent_bytes'] / one['steps']:,.0f} | {len(found)} |"
            )
    tried = [line for line in lines if line["seed"] == TUNED]
    if not tried:
        told += ["", "Learning rates are first guesses: no others were tried."]
    if tried:
        told += ["", "Learning rates tried on another seed, and their losses:", ""]
        for name in dict.fromkeys(line["name"] for line in tried):
            found = ", ".join(f"{line['lr']:g}: {line['loss']:.3f}" for line in tried if line["name"] == name)
            told.append(f"* {name}: {found}")
    return "\n".join(told) + "\n"


if __name__ == "__main__":
    main()
