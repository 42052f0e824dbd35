"""The outer step and the inner learning rate, tuned at equal tokens on a seed that no result uses: no links, no clock.

    python benchmarks/peers/tune.py DATA.txt [--only PART] [--out FILE.jsonl]

Members run in one process on the local link; the work is run.py's. torchft's DiLoCo and thinwire's are one algorithm,
as are all three averages of models (torchft, Accelerate, thinwire's local_sgd), so one curve tunes both: what differs
is the time that a round takes, which run.py measures. A line a trial: losses of the mean of members' models at some
steps (after a round that is the model they agree on), and the bytes that a member sent.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from member import flat, text_task
from run import HOSTS, WORK
from torch import Tensor

import thinwire
from thinwire.config import MethodOptions
from thinwire.links.base import Link
from thinwire.train.corpus import REFERENCE

SEED = 100
_AT = 20  # steps between evaluations
FAST = "topk(1/64) | int4"
#: Steps, inner learning rate, method, its options.
TRIALS = (
    *((92, lr, "ddp", {}) for lr in (4e-3, 2e-3, 1e-3, 7e-4, 5e-4)),
    (140, 1e-3, "local_sgd", {"every": 10}),
    *((200, 1e-3, "local_sgd", {"every": every}) for every in (20, 50)),
    *((140, 1e-3, "diloco", {"every": 10, "outer_lr": lr, "momentum": mu}) for lr, mu in ((0.7, 0.9), (1.0, 0.5))),
    (140, 1e-3, "diloco", {"every": 5, "outer_lr": 1.0, "momentum": 0.5, "codec": FAST}),
    (100, 1e-3, "diloco", {"every": 5, "outer_lr": 1.0, "momentum": 0.3, "codec": FAST}),
    (100, 1e-3, "diloco", {"every": 10, "outer_lr": 1.0, "momentum": 0.5, "codec": FAST}),
    (100, 1e-3, "streaming",
     {"every": 10, "fragments": 2, "overlap": 3, "outer_lr": 1.0, "momentum": 0.5, "codec": "int4"}),
)  # fmt: skip


def trial(data: str, steps: int, lr: float, name: str, options: dict[str, object]) -> dict[str, object]:
    """Train once."""
    task = text_task({**WORK, "data": data, "seed": SEED})
    method = MethodOptions(name, options).build()
    kept: dict[int, list[Tensor]] = {}

    def member(link: Link) -> int:
        torch.manual_seed(SEED)
        model = task.model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        with thinwire.synchronize(model, optimizer, method, link, seed=SEED) as sync:
            before = link.meter.total().sent_bytes
            for step in range(steps):
                task.loss(model, task.batch(step, link.rank, HOSTS)).backward()
                sync.clip_grad_norm_(WORK["clip_norm"])
                optimizer.step()
                optimizer.zero_grad()
                if (step + 1) % _AT == 0:
                    kept.setdefault(step + 1, []).append(flat(model))
            return link.meter.total().sent_bytes - before

    start = time.perf_counter()
    sent = thinwire.run(HOSTS, member)[0]
    model, losses = task.model(), {}
    for step, weights in kept.items():
        torch.nn.utils.vector_to_parameters(torch.stack(weights).mean(dim=0), model.parameters())
        losses[step] = round(task.evaluate(model)["loss"], 3)
    took = round(time.perf_counter() - start)
    return {"lr": lr, "method": name, "options": options, "losses": losses, "sent_bytes": sent, "took_s": took}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default=REFERENCE)
    parser.add_argument("--only", default="", help="trials whose method and options contain this")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "peers_tuning.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for steps, lr, name, options in TRIALS:
        if args.only in f"{name} {options}":
            line = json.dumps(trial(args.data, steps, lr, name, options))
            print(line, flush=True)
            with args.out.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
