"""The task contract: a model, its data and its loss, with no memory of its own.

A task is built once from its options and a seed. After that everything is a function of its arguments: the same step,
rank and number of members give the same batch, today or after a resume, and different members draw different samples.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor, nn

from thinwire.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Batch:
    """What one member sees in one local step.

    inputs   [samples, ...], as the task's own loss wants them
    targets  [samples, ...]
    samples  how many: the weight of this member's contribution
    tokens   how many positions carry loss, for tokens/s; 0 where data has no tokens
    """

    inputs: Tensor
    targets: Tensor
    samples: int
    tokens: int

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(self.inputs.to(device), self.targets.to(device), self.samples, self.tokens)


class Task(Protocol):
    """What is trained."""

    def model(self) -> nn.Module:
        """A fresh model in train mode, drawn from torch's global generator: the caller seeds it first."""

    def batch(self, step: int, rank: int, world: int) -> Batch:
        """Member `rank` of `world`'s samples at local step `step`, on the CPU; a pure function."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Scalar: the mean over the batch. `model` and `batch` are on one device."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """`{"loss": ...}` on held-out data, perhaps with "accuracy"; leaves the model as it was."""


class TaskOptions(Protocol):
    """A frozen dataclass of a task's options; its fields are what a configuration file may say."""

    def build(self, *, seed: int) -> Task:
        """Read the data. Everything random in the task follows from the seed."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Eval mode without gradients; on leaving, every submodule gets its own mode back.

    yields  the device the model is on
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        for module, mode in modes:
            module.training = mode  # not train(mode): that would reach into the children


def import_extra(module: str, *, extra: str, purpose: str) -> ModuleType:
    """A library not everybody needs.

    raises  ConfigError naming the extra, if it is not installed
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{purpose} needs {module}, which cannot be imported: {error}",
            expected=f"thinwire installed with its extra {extra!r}",
            mend=f"pip install 'thinwire[{extra}]'",
        ) from error
