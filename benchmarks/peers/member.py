"""What every contender's member script shares: the work, the clock, and the record of it.

    work = Member(Path(sys.argv[1]))        # a folder with work.json, shared by the members of this machine
    work.begin(model)                       # all have set up; the clock starts
    for step in work.steps():               # never ends: the runner ends the processes when time is up
        ...
        work.stepped()

Nothing here sends a byte over the lab's links: members of one machine meet in the folder. After every step a member
notes the time and the bytes at its host's interface. At some steps member 0 leaves the model that it could hand over
without another byte: the last one that all members agreed on. The runner evaluates those after the run.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thinwire.train.text import TextOptions, TextTask

_INTERFACE = Path("/sys/class/net/eth0/statistics")
_POLL_S = 0.005


def is_marked(step: int, every: int) -> bool:
    """Whether the model is kept at this step: a few times early, then regularly."""
    return step == 5 or step % every == 0


def text_task(work: dict[str, Any]) -> TextTask:
    """The task of a run; the runner evaluates with it too."""
    options = TextOptions(
        data=work["data"], size=work["size"], context=work["context"], batch_size=work["batch_size"],
        validation_windows=work["validation_windows"],
    )  # fmt: skip
    return options.build(seed=work["seed"])


@torch.no_grad()
def flat(model: nn.Module) -> Tensor:
    """A copy of the parameters, [n]."""
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


class Member:
    """One host's member of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work: dict[str, Any] = json.loads((folder / "work.json").read_text())
        self.options: dict[str, Any] = self.work["options"]
        self.seed: int = self.work["seed"]
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.task = text_task(self.work)
        self.step = 0
        self.after_step: Callable[[int], None] = lambda step: None
        torch.set_num_threads(1)
        torch.manual_seed(self.seed)  # all members begin with equal weights

    def model(self) -> nn.Module:
        """The GPT, the same on every member."""
        torch.manual_seed(self.seed)
        return self.task.model()

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        """The inner optimizer of all contenders."""
        return torch.optim.AdamW(parameters, lr=self.work["lr"])

    def loss(self, model: nn.Module) -> Tensor:
        """Of this member's batch of the step under way."""
        return self.task.loss(model, self.task.batch(self.step, self.rank, self.world))

    def clip(self, model: nn.Module) -> None:
        """The gradient as the optimizer will use it."""
        torch.nn.utils.clip_grad_norm_(model.parameters(), self.work["clip_norm"])

    def meet(self, name: str) -> None:
        """Wait in the shared folder until every member is here."""
        (self.folder / f"{name}-{self.rank}").touch()
        while not all((self.folder / f"{name}-{rank}").exists() for rank in range(self.world)):
            time.sleep(_POLL_S)

    def begin(self, consensus: Callable[[], Tensor]) -> None:
        """Start the clock, once all members have set up.

        consensus  the model all members agreed on last, float32 [n] in the order of the model's parameters
        """
        self._consensus = consensus
        self._notes = (self.folder / f"steps-{self.rank}.jsonl").open("w", buffering=1)
        self.meet("ready")
        self._note()
        self._due = time.monotonic() + self.work["pace_s"]

    def last_equal(self, model: nn.Module, every: int, *, late: int = 0) -> Callable[[], Tensor]:
        """The consensus where all members' models are set equal after steps every + late, 2 every + late, ..."""
        agreed = [flat(model)]

        def look(step: int) -> None:
            if step > late and (step - late) % every == 0:
                agreed[0] = flat(model)

        self.after_step = look
        return lambda: agreed[0]

    def steps(self) -> Iterator[int]:
        """For ever."""
        return itertools.count()

    def stepped(self) -> None:
        """After a local step and whatever communication it brought."""
        self.step += 1
        self.after_step(self.step)
        self._note()
        if self.rank == 0 and is_marked(self.step, self.work["keep_every"]):
            self._keep()
        time.sleep(max(0.0, self._due - time.monotonic()))
        self._due = time.monotonic() + self.work["pace_s"]

    def _note(self) -> None:
        sent, received = ((_INTERFACE / f"{way}_bytes").read_text() for way in ("tx", "rx"))
        print(json.dumps([self.step, time.monotonic(), int(sent), int(received)]), file=self._notes)

    @torch.no_grad()
    def _keep(self) -> None:
        draft = self.folder / "draft"
        draft.write_bytes(self._consensus().numpy().tobytes())
        draft.rename(self.folder / f"weights-{self.step}")
