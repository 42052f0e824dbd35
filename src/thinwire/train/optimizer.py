"""The inner optimizer of every member: any class of torch.optim, with warm-up and decay as functions of the step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from thinwire.errors import ConfigError
from thinwire.options import Options, about, check, of_function, unknown


@dataclass(frozen=True)
class OptimizerOptions:
    """How a member takes its local steps.

    options  keyword arguments of the class beyond the learning rate, e.g. {"weight_decay": 0.1}
    """

    name: str = "AdamW"
    lr: float = field(default=2e-3, metadata=about("learning rate at its highest", above=0))
    warmup_steps: int = field(
        default=0, metadata=about("local steps over which the learning rate rises in a line", at_least=0)
    )
    schedule: Literal["constant", "cosine"] = field(
        default="constant",
        metadata=about("after the warm-up: `constant`, or `cosine` down to 0 at the last step"),
    )
    clip_norm: float = field(
        default=1.0, metadata=about("longest gradient; a longer one is scaled down to it; 0 is off", at_least=0)
    )
    accumulate: int = field(default=1, metadata=about("batches whose mean gradient makes one local step", at_least=1))
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self)
        optimizer_class(self.name)

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of the parameters that require gradients.

        raises  ConfigError if the class refuses its options
        """
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        try:
            # Any: every class of torch.optim has its own signature, and options_of held the options to it.
            make: Any = optimizer_class(self.name)
            made: torch.optim.Optimizer = make(trained, lr=self.lr, **self.options)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ConfigError(
                f"torch.optim.{self.name} refuses lr={self.lr} with {dict(self.options)}: {error}",
                expected="options that the optimizer accepts, for the parameters of this model",
                mend=f"see help(torch.optim.{self.name})",
            ) from error
        return made

    def lr_at(self, step: int, *, steps: int) -> float:
        """Learning rate of local step `step`, counted from 0, of `steps`: a pure function, nothing to resume."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        done = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        return self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class of torch.optim with this name.

    raises  ConfigError if there is none that can step without a closure
    """
    known = _classes()
    if name not in known:
        raise unknown(f"torch.optim has no optimizer {name!r} to use here", name, known, what="one of")
    return known[name]


def options_of(name: str) -> Options:
    """What the class can be told beyond its parameters and learning rate."""
    return of_function(optimizer_class(name).__init__, skip=("self", "params", "lr"))


def _classes() -> dict[str, type[torch.optim.Optimizer]]:
    """Those of torch.optim whose step needs no closure; LBFGS evaluates the model several times a step."""
    found = {}
    for name, each in vars(torch.optim).items():
        if isinstance(each, type) and issubclass(each, torch.optim.Optimizer) and each is not torch.optim.Optimizer:
            closure = inspect.signature(each.step).parameters.get("closure")
            if closure is None or closure.default is not inspect.Parameter.empty:
                found[name] = each
    return found
