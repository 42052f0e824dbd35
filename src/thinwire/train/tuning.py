"""A tuner in the loop: what the loop asks of a synchronizer, answered for a model tuned by seeds and scalars."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from thinwire.links.base import Link
from thinwire.seeds.meetings import OverLink
from thinwire.seeds.recipe import Recipe
from thinwire.seeds.tuner import Tuner
from thinwire.synchronizer import Timing


class Tuned:
    """All members hold one model at every moment; a round is a step."""

    parts: int | None = None
    has_consensus = True
    skipped = 0

    def __init__(self, model: nn.Module, recipe: Recipe, link: Link) -> None:
        self._model = model
        self._tuner = Tuner(model, recipe, OverLink(link), clock=link.now)

    def __enter__(self) -> Tuned:
        self._tuner.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tuner.__exit__(kind, error, trace)

    @property
    def step(self) -> int:
        """Rounds so far."""
        return self._tuner.rounds

    common_step = committed = step

    @property
    def timing(self) -> Timing:
        """Nothing is hidden: a step waits for everybody's scalars."""
        spent = self._tuner.spent
        return Timing(wait_s=spent.wait_s, apply_s=spent.apply_s)

    def tune(self, loss: Callable[[], Tensor], lr: float) -> float:
        """One step; returns the mean loss that this member saw."""
        return self._tuner.step(loss, lr=lr).loss

    def finish(self) -> None:
        """Compare weights a last time; their digest goes into the log."""
        self._tuner.compare()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The model is the common one at any time."""
        yield

    def consensus(self) -> list[Tensor]:
        """The parameters."""
        return [p.detach() for p in self._model.parameters() if p.requires_grad]

    def state_dict(self, *, rescue: bool = False) -> dict[str, Any]:
        """The log: what a member remembers follows from it."""
        return self._tuner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a log; the model holds its weights."""
        self._tuner.load_state_dict(state)

    def write_base(self, path: Path) -> None:
        """The weights that the log starts from, which `thinwire import` asks for."""
        save_file({name: value.detach().cpu().clone() for name, value in self._model.state_dict().items()}, path)

    def write_log(self, path: Path) -> None:
        """The run as a log: with the base it is the model."""
        path.write_bytes(self._tuner.log.to_bytes())
