"""Training with every codec at equal tokens, in every step and in DiLoCo: loss against the bytes that crossed.

    python benchmarks/codec_training.py [DATA.txt] [--only EXPRESSION ...] [--seeds 3] [--steps 120] [--again]

A byte-level GPT of 36 thousand parameters (2 layers, width 32, context 32) on four members of the local link: batch 8 a
member, AdamW 4e-3, 120 steps; DiLoCo has a round every 6 steps, outer learning rate 0.7 and momentum 0.6, which suits
twenty rounds: at the usual 0.9 full precision ended 0.1 nats higher, and int4 another 0.1 to 0.3, in a trial of two
seeds. Codecs that want error feedback have it, as everywhere; ef21w has a weighted mean. dgc, gmf and
frozen_adam hold the optimizer's moments themselves and have SGD behind them, in every step only; dgc(fp32,
masking=False) is SGD with momentum, which the first two are to be compared with. Loss is of the consensus model on 256
held-out windows; bytes are what the link's meter counted a member to send, handshake and evaluation left out. Tokens
are equal, so what differs is the codec.

Left out are what cannot change the loss (lossless stages: their rates are in results/codecs.md), what is made for
caches, and second variants of a codec; --only runs any of them.

A run that is done is a line of results/codec_training.jsonl and is not done again unless --again says so; from all
lines with the present settings results/codec_training.md and .png are drawn, with their number of steps in the name if
it is another. About 6 seconds a run on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from expressions import expressions
from matplotlib.figure import Figure
from torch import Tensor, nn

import thinwire
from thinwire.aggregators import Mean, WeightedMean
from thinwire.codecs import Feedback, parse
from thinwire.errors import ConfigError, ThinwireError
from thinwire.links.base import Link
from thinwire.method import Method
from thinwire.randomness import mix
from thinwire.train.corpus import REFERENCE, Corpus, byte_tokens, documents, split
from thinwire.train.gpt import GPT, next_token_loss

RESULTS = Path(__file__).with_name("results")
MEMBERS, STEPS, EVERY, BATCH, CONTEXT, LR, WARMUP, MOMENTUM = 4, 120, 6, 8, 32, 4e-3, 10, 0.6
METHODS = {"ddp": thinwire.every_step(), "diloco": thinwire.diloco(every=EVERY, momentum=MOMENTUM)}
#: What is a part of the optimizer itself has plain SGD behind it, at this learning rate, and only in every step.
SGD_LR = {"frozen_adam": LR, "dgc": 0.3, "gmf": 0.3}
_LEFT_OUT = {
    "fp16", "int8(rounding='stochastic')", "int6", "int4(grid='zero')", "int2(grid='minmax')",
    "e3m0(rounding='stochastic')", "e4m0", "topk(1/100, block=4096)", "topk(1/64) | int4 | zstd",
    "fp8(format='e5m2')", "qsgd(levels=16, norm='max', code='elias')", "terngrad", "rows(1/8, sampled=True)", "pq",
    "cst(128)", "anchor_delta(128) | rans", "zstd", "rans", "bf16 | zstd", "int8 | zstd", "int4 | rans",
}  # fmt: skip
_HEADINGS = {"ddp": "every step", "diloco": f"DiLoCo, every {EVERY}"}

Run = dict[str, Any]


def settings(data: str, steps: int) -> str:
    """What a run must share with others to stand in one table."""
    return (
        f"{Path(data).name}, {MEMBERS} members, {steps} steps, DiLoCo every {EVERY} with momentum {MOMENTUM:g}, "
        f"batch {BATCH}, context {CONTEXT}, AdamW {LR:g}, GPT 2 x 32"
    )


def run(corpus: Corpus, method: Method, seed: int, steps: int, sgd_lr: float | None = None) -> Run:
    """Train once, with AdamW unless there is a rate for SGD: loss, and bytes sent by the mean member."""
    lr = sgd_lr or LR

    def member(link: Link) -> tuple[float, int]:
        torch.manual_seed(seed)
        model = GPT(vocab=256, context=CONTEXT, layers=2, heads=2, width=32)
        optimizer = (torch.optim.SGD if sgd_lr else torch.optim.AdamW)(model.parameters(), lr=lr)
        with thinwire.synchronize(model, optimizer, method, link, seed=seed) as sync:
            before = link.meter.total().sent_bytes  # members have met by now
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / WARMUP)
                batch = corpus.draw(mix(seed, step, link.rank), count=BATCH, context=CONTEXT)
                next_token_loss(model(batch.inputs), batch.targets).backward()
                optimizer.step()
                optimizer.zero_grad()
            sync.finish()
            sent = link.meter.total().sent_bytes - before
            with sync.evaluating():
                loss = _validation(corpus, model) if link.rank == 0 else 0.0
        return loss, sent

    results = thinwire.run(MEMBERS, member)
    return {"loss": results[0][0], "sent_bytes": round(statistics.mean(sent for _, sent in results))}


@torch.no_grad()
def _validation(corpus: Corpus, model: nn.Module) -> float:
    losses: list[Tensor] = [
        next_token_loss(model(batch.inputs), batch.targets)
        for batch in corpus.validation(count=256, context=CONTEXT, batch_size=64)
    ]
    return float(torch.stack(losses).mean())


def one(corpus: Corpus, data: str, name: str, expression: str, seed: int, steps: int) -> Run:
    """A line of the file; a run that fails says why."""
    line: Run = {"settings": settings(data, steps), "method": name, "codec": expression, "seed": seed}
    start = time.perf_counter()
    try:
        sgd_lr = SGD_LR.get(expression.split("(")[0])
        if sgd_lr and name != "ddp":
            raise ConfigError("stands for the optimizer's momentum", expected="gradients", mend="run it with ddp")
        how = parse(expression)
        rule = WeightedMean() if isinstance(how, Feedback) and how.weighs else Mean()
        line |= run(corpus, METHODS[name].but(codec=how, aggregator=rule), seed, steps, sgd_lr)
    except ThinwireError as error:
        line |= {"failed": str(error).splitlines()[0]}
    line |= {"seconds": round(time.perf_counter() - start, 1)}
    return line


# --- the report -------------------------------------------------------------------------------------------------------


_SHORT = (
    " In so few steps the loss comes down to about 3.1 nats, the plateau of who knows how often each byte comes and no "
    "more; noise helps off it, so that a noisy codec below fp32 says nothing of longer runs. Some codecs were run for "
    "longer: codec_training_360.md."
)


def markdown(lines: Sequence[Run], data: str, steps: int) -> str:
    """A table of both methods."""
    parts = [
        "Written by `python benchmarks/codec_training.py`, which says what is trained.",
        f"{settings(data, steps)}. thinwire {thinwire.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}; equal on every machine but for the rounding of its matrix products.",
        "",
        "Loss is the mean over the seeds (lowest to highest); bytes are relative to fp32 with the same method."
        + (_SHORT if steps == STEPS else ""),
        "",
        f"![loss against bytes]({_name(steps)}.png)",
    ]
    for name, heading in _HEADINGS.items():
        parts += [
            f"\n## {heading[0].upper() + heading[1:]}\n",
            "| | codec | validation loss | kB sent a member | fewer bytes than fp32 | seeds |",
            "|---|---|---|---|---|---|",
        ]
        whole = [line["sent_bytes"] for line in lines if _is(line, name, "fp32")]
        for number, (expression, runs) in enumerate(_by_codec(lines, name).items(), 1):
            parts.append(f"| {number} | `{_cell(expression)}` | {_result(runs, whole)} |")
    return "\n".join(parts) + "\n"


def _name(steps: int) -> str:
    return "codec_training" if steps == STEPS else f"codec_training_{steps}"


def _result(runs: Sequence[Run], whole: Sequence[int]) -> str:
    """Loss, bytes and number of seeds; `whole` is what fp32 sent, where it was run."""
    done = [line for line in runs if "loss" in line]
    failed = [line["failed"] for line in runs if "failed" in line]
    if not done:
        return f"{_cell(failed[0])} | | | {len(runs)}"
    losses = [line["loss"] for line in done]
    sent = statistics.mean(line["sent_bytes"] for line in done)
    fewer = f"{statistics.mean(whole) / sent:.1f}" if whole else ""
    told = f"{statistics.mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})"
    if failed:
        told += f"; {len(failed)} failed: {_cell(failed[0])}"
    return f"{told} | {sent / 1e3:.1f} | {fewer} | {len(runs)}"


def picture(lines: Sequence[Run], file: Path) -> None:
    """Loss against bytes, one point a codec, numbered as in the table; a line along those that nothing beats."""
    figure = Figure(figsize=(11, 5), dpi=130, layout="constrained")
    for axes, (name, heading) in zip(figure.subplots(1, 2), _HEADINGS.items(), strict=True):
        points = []
        for number, (expression, runs) in enumerate(_by_codec(lines, name).items(), 1):
            losses = [line["loss"] for line in runs if "loss" in line and math.isfinite(line["loss"])]
            if not losses:
                continue
            sent = statistics.mean(line["sent_bytes"] for line in runs if "loss" in line) / 1e3
            loss = statistics.mean(losses)
            points.append((sent, loss, expression))
            axes.plot([sent, sent], [min(losses), max(losses)], color="#4c566a", linewidth=1, alpha=0.5)
            axes.plot(sent, loss, "o", color="#0b7285", markersize=4)
            axes.annotate(str(number), (sent, loss), xytext=(4, 3), textcoords="offset points", fontsize=7)
        front = _front(points)
        axes.plot([x for x, _, _ in front], [y for _, y, _ in front], color="#d08700", linewidth=1, zorder=0)
        axes.set(xscale="log", xlabel="kB sent by each member", ylabel="validation loss (nats/byte)", title=heading)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(file)


def _front(points: Iterable[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Those that no other point beats in both, by ascending bytes."""
    front: list[tuple[float, float, str]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def _by_codec(lines: Iterable[Run], method: str) -> Mapping[str, list[Run]]:
    """In the order of expressions.py."""
    found: dict[str, list[Run]] = {expression: [] for expression in expressions()}
    for line in lines:
        if line["method"] == method and line["codec"] in found:
            found[line["codec"]].append(line)
    return {expression: runs for expression, runs in found.items() if runs}


def _is(line: Run, method: str, codec: str) -> bool:
    return line["method"] == method and line["codec"] == codec and "loss" in line


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _key(line: Run) -> tuple[str, ...]:
    return tuple(str(line[part]) for part in ("settings", "method", "codec", "seed"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default=REFERENCE)
    parser.add_argument("--only", action="append", metavar="EXPRESSION")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.results.mkdir(parents=True, exist_ok=True)
    file = args.results / "codec_training.jsonl"
    old = [json.loads(text) for text in file.read_text().splitlines()] if file.exists() else []
    runs = {_key(line): line for line in old}
    corpus = split(byte_tokens(documents(args.data)), context=CONTEXT, data=args.data)
    for expression in args.only or [each for each in expressions() if each not in _LEFT_OUT]:
        for name in METHODS:
            for seed in range(args.seeds):
                told = settings(args.data, args.steps)
                wanted = {"settings": told, "method": name, "codec": expression, "seed": seed}
                if _key(wanted) in runs and not args.again:
                    continue
                line = one(corpus, args.data, name, expression, seed, args.steps)
                runs[_key(wanted)] = line
                file.write_text("".join(json.dumps(each) + "\n" for each in runs.values()))
                print(name, expression, seed, line.get("loss", line.get("failed")), line["seconds"], "s", flush=True)
    here = [line for line in runs.values() if line["settings"] == settings(args.data, args.steps)]
    (args.results / f"{_name(args.steps)}.md").write_text(markdown(here, args.data, args.steps))
    picture(here, args.results / f"{_name(args.steps)}.png")


if __name__ == "__main__":
    main()
