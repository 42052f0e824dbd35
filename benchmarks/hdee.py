"""Domain experts that never talk while they train, beside one model that is kept in step, at equal compute.

    python benchmarks/hdee.py [--data FILE] [--seeds 0,1,2] [--seed-steps 200] [--budget-steps 300] [--out FILE.md]

Three domains of bytes, all offline: `plays` is --data (left out: the reference, every second character's case turned),
`reference` the text of Python's language reference, `code` the sources of the standard library's asyncio, email and
json. Each has its last tenth held out. The model is the GPT of width 64 (context 64, batch 8 windows, AdamW at 2e-3,
then 1e-3 for the experts, one thread).

A seed model is trained on all three in turn. Then the same budget, tokens times parameters, is spent in four ways:
one model whose gradients three members combine in every step (its bytes are metered on a simulated link); three experts
of equal size and steps; steps in proportion to the seed's loss on the domain; sizes of 2, 4 and 6 layers from the
easiest domain to the hardest, each from a seed of its own size (seeds are not counted, as in the paper). Losses are
nats a byte on 48 held-out windows of each domain, answered by the ensemble without being told the domain.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import thinwire
from thinwire import ensembles
from thinwire.links.base import Link
from thinwire.randomness import mix
from thinwire.train.corpus import Corpus, byte_tokens, documents, split
from thinwire.train.gpt import GPT, next_token_loss

CONTEXT, BATCH, WIDTH, LAYERS, WINDOWS = 64, 8, 64, 4, 48
TOKENS = CONTEXT * BATCH
SIZES = (2, 4, 6)  # layers, from the easiest domain to the hardest
NAMES = ("plays", "reference", "code")


def domains(data: str | None) -> list[Corpus]:
    reference = documents("reference")
    plays = documents(data) if data else [text.swapcase() for text in reference]
    library = Path(sysconfig.get_paths()["stdlib"])
    code = [text for folder in ("asyncio", "email", "json") for text in documents(str(library / folder))]
    return [split(byte_tokens(texts), context=CONTEXT, data=name)
            for name, texts in zip(NAMES, (plays, reference, code), strict=True)]  # fmt: skip


def fresh(seed: int, layers: int) -> GPT:
    torch.manual_seed(seed)
    return GPT(256, CONTEXT, layers, 4, WIDTH)


def train(model: nn.Module, steps: int, lr: float, corpus: Callable[[int], Corpus], seed: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step in range(steps):
        batch = corpus(step).draw(mix(seed, step), count=BATCH, context=CONTEXT)
        next_token_loss(model(batch.inputs), batch.targets).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def scores(model: nn.Module, corpus: Corpus, part: str = "valid") -> Tensor:
    """An expert's log-probabilities on held-out windows, every other one for the prior.  [windows, t]"""
    (batch,) = corpus.validation(count=2 * WINDOWS, context=CONTEXT, batch_size=2 * WINDOWS)
    told = ensembles.score(model(batch.inputs), batch.targets)
    return told[0::2] if part == "valid" else told[1::2]


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def answers(experts: Sequence[nn.Module], texts: Sequence[Corpus]) -> dict[str, list[float]]:
    """Loss on each domain, by the way experts are weighed."""
    found: dict[str, list[float]] = {"uniform": [], "cached": [], "geometric": []}
    for text in texts:
        valid = torch.stack([scores(expert, text) for expert in experts])  # [d, windows, t]
        held_out = torch.stack([scores(expert, text, "prior") for expert in experts]).unbind(dim=1)
        priors = {"uniform": ensembles.uniform(len(experts)), "cached": ensembles.cached_prior(held_out, len(experts))}
        for name, prior in priors.items():
            mixed = [ensembles.mixture(window, prior) for window in valid.unbind(dim=1)]
            found[name].append(-float(torch.stack(mixed).mean()))
        found["geometric"].append(-float(ensembles.geometric(valid.flatten(1)).mean()))
    return found


def together(model: nn.Module, steps: int, texts: Sequence[Corpus], seed: int) -> tuple[nn.Module, int]:
    """One model, a member for each domain, gradients combined in every step; bytes sent by a member."""

    def member(link: Link) -> tuple[nn.Module, int]:
        mine = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(mine.parameters(), lr=1e-3)
        with thinwire.synchronize(mine, optimizer, thinwire.every_step(), link):
            for step in range(steps):
                batch = texts[link.rank].draw(mix(seed, link.rank, step), count=BATCH, context=CONTEXT)
                next_token_loss(mine(batch.inputs), batch.targets).backward()
                optimizer.step()
                optimizer.zero_grad()
        return mine, link.meter.total().sent_bytes

    return thinwire.run(len(texts), member)[0]


def one_seed(seed: int, texts: list[Corpus], seed_steps: int, budget_steps: int) -> dict[str, tuple[list[float], int]]:
    """Losses on each domain and bytes sent, by the way the budget was spent."""
    seeds = {layers: fresh(seed, layers) for layers in SIZES}
    for model in seeds.values():
        train(model, seed_steps, 2e-3, lambda step: texts[step % len(texts)], seed)
    start = seeds[LAYERS]
    hardness = [-float(scores(start, text).mean()) for text in texts]
    budget = float(budget_steps * TOKENS * size(start) * len(texts))

    def apart(layers: Sequence[int], weights: Sequence[float] | None) -> list[nn.Module]:
        experts = [copy.deepcopy(seeds[each]) for each in layers]
        sizes = [size(expert) for expert in experts]
        steps = ensembles.steps_within(budget, tokens=TOKENS, parameters=sizes, weights=weights)
        print(f"  layers {layers}: {sizes} parameters, {steps} steps", flush=True)
        for expert, count, text, domain in zip(experts, steps, texts, range(len(texts)), strict=True):
            train(expert, count, 1e-3, lambda step, text=text: text, mix(seed, 77, domain))  # type: ignore[misc]
        return experts

    order = sorted(range(len(texts)), key=lambda d: hardness[d])
    varied = [SIZES[order.index(d)] for d in range(len(texts))]
    dense, sent = together(start, budget_steps, texts, mix(seed, 99))
    found = {"seed model": (hardness, 0), "one model, every step": (answers([dense], texts)["uniform"], sent)}
    same = [LAYERS] * len(texts)
    for name, experts in (
        ("equal sizes and steps", apart(same, None)),
        ("varied steps", apart(same, hardness)),
        ("varied sizes", apart(varied, None)),
    ):
        found |= {f"{name}, {how} prior" if how != "geometric" else f"{name}, geometric mean": (losses, 0)
                  for how, losses in answers(experts, texts).items()}  # fmt: skip
        own = [-float(scores(expert, text).mean()) for expert, text in zip(experts, texts, strict=True)]
        found[f"{name}, the domain's own expert"] = (own, 0)
    return found


def table(rows: Sequence[dict[str, tuple[list[float], int]]]) -> str:
    lines = [f"| | {' | '.join(NAMES)} | mean | spread of it | sent by a member |", "|---|" + "---|" * (len(NAMES) + 3)]
    for name in rows[0]:
        losses = [[row[name][0][d] for row in rows] for d in range(len(NAMES))]
        means = [sum(each) / len(NAMES) for each in zip(*losses, strict=True)]
        told = " | ".join(f"{statistics.mean(each):.3f}" for each in losses)
        spread = f"{min(means):.3f} to {max(means):.3f}"
        sent = rows[0][name][1]
        lines.append(f"| {name} | {told} | {statistics.mean(means):.3f} | {spread} | {sent / 1e6:.1f} MB |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--seed-steps", type=int, default=200)
    parser.add_argument("--budget-steps", type=int, default=300)
    parser.add_argument("--out", default=str(Path(tempfile.gettempdir()) / "hdee.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    texts, start = domains(options.data), time.perf_counter()
    rows = []
    for seed in map(int, options.seeds.split(",")):
        print(f"seed {seed}", flush=True)
        rows.append(one_seed(seed, texts, options.seed_steps, options.budget_steps))
    sizes = ", ".join(
        f"{name} {len(text.train) + len(text.valid):,} bytes" for name, text in zip(NAMES, texts, strict=True)
    )
    words = (
        f"{len(rows)} seeds of `python benchmarks/hdee.py --seeds {options.seeds} --seed-steps {options.seed_steps} "
        f"--budget-steps {options.budget_steps}`{' with a text file given' if options.data else ''}: {sizes}. "
        f"Nats a byte. Python {platform.python_version()}, torch {torch.__version__}, one thread, "
        f"{time.perf_counter() - start:.0f} s.\n"
    )
    report = f"# Domain experts beside one model, at equal compute\n\n{words}\n{table(rows)}\n"
    Path(options.out).write_text(report)
    print(report)


if __name__ == "__main__":
    main()
