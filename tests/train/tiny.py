"""A task of a moment's work: the small network of tests/small.py, with dropout, so that members draw for themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import small
from thinwire.config import MethodOptions, Run, SimulatedLink
from thinwire.links.base import Link
from thinwire.links.local import run as simulate
from thinwire.links.network import Network
from thinwire.report.record import Event, Point, RunRecord
from thinwire.train.display import Silent
from thinwire.train.loop import train
from thinwire.train.optimizer import OptimizerOptions
from thinwire.train.tasks import Batch, evaluating
from thinwire.train.user import UserOptions


@dataclass
class TinyTask:
    """`fail` is called with (step, rank) before every batch."""

    width: int = 16
    fail: Callable[[int, int], None] = lambda step, rank: None

    def model(self) -> nn.Module:
        hidden = nn.Linear(small.WIDTH, self.width)
        return nn.Sequential(hidden, nn.Tanh(), nn.Dropout(0.1), nn.Linear(self.width, small.CLASSES))

    def batch(self, step: int, rank: int, world: int) -> Batch:
        self.fail(step, rank)
        x, y = small.batch(step, rank)
        return Batch(x, y, samples=len(x), tokens=0)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch.inputs).float(), batch.targets)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        with evaluating(model):
            x, y = small.batch(0, 1000, size=64)
            scores = model(x)
            return {
                "loss": float(F.cross_entropy(scores, y)),
                "accuracy": float((scores.argmax(1) == y).float().mean()),
            }


def make(*, width: int = 16) -> TinyTask:
    return TinyTask(width)


def tiny_run(out: Path, name: str = "diloco", options: dict[str, object] | None = None, **changes: object) -> Run:
    """20 steps with rounds every 4, evaluations every 5, checkpoints every 8."""
    defaults: dict[str, object] = {
        "steps": 20,
        "eval_every": 5,
        "checkpoint_every": 8,
        "out": str(out),
        "task": UserOptions("tiny:make"),
        "optimizer": OptimizerOptions(lr=1e-2),
        "method": MethodOptions(name, {"every": 4} if options is None else options),
        "link": SimulatedLink(),
    }
    return Run(**defaults | changes)  # type: ignore[arg-type]


@dataclass
class Watcher(Silent):
    """Keeps what is shown; Silent is a protocol's simplest implementation, and no more than that is taken from it."""

    events: list[Event] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    stopped_at: int | None = None

    def event(self, event: Event) -> None:
        self.events.append(event)

    def evaluated(self, point: Point) -> None:
        self.points.append(point)

    def stopped(self, step: int, folder: Path) -> None:
        self.stopped_at = step


def carry_out(
    run: Run,
    *,
    task: TinyTask | None = None,
    resume: bool = False,
    start: Path | None = None,
    stop_at_call: int | None = None,
    display: Watcher | None = None,
    network: Network | None = None,
) -> RunRecord | None:
    """The run on simulated members; member 1 asks to stop at its `stop_at_call`th roll call. Returns 0's record."""
    task = task or TinyTask()
    calls = 0

    def member(link: Link) -> RunRecord | None:
        def stops() -> bool:
            nonlocal calls
            calls += link.rank == 1
            return stop_at_call is not None and link.rank == 1 and calls >= stop_at_call

        shown = display if display is not None and link.rank == 0 else Silent()
        return train(run, task, link, display=shown, stops=stops, resume=resume, start=start)

    torch.manual_seed(123)  # whatever was drawn before must not matter
    return simulate(run.workers, member, network or Network(20e6, 20e6, 0.04, step_s=0.05))[0]
