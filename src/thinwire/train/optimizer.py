"""The inner optimizer of every member, with warm-up and decay as functions of the step.

Any class of torch.optim, and those that take several for one model (thinwire.train.layerwise).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from thinwire.errors import ConfigError
from thinwire.options import Options, about, check, of_function, unknown
from thinwire.train.layerwise import LAYERWISE, SHARE, Optimizers


@dataclass(frozen=True)
class OptimizerOptions:
    """How a member takes its local steps.

    options  keyword arguments of the class or function beyond the learning rate, e.g. {"weight_decay": 0.1}
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
        _maker(self.name)

    def build(self, model: nn.Module) -> Optimizers:
        """The optimizers of the parameters that require gradients: one, or several over disjoint ones.

        raises  ConfigError if the class refuses its options
        """
        place = "thinwire.train.layerwise" if self.name in LAYERWISE else "torch.optim"
        # Any: every class of torch.optim has its own signature, and options_of held the options to it.
        make: Any = _maker(self.name)
        try:
            if self.name in LAYERWISE:
                made: Optimizers = make(model, lr=self.lr, **self.options)
            else:
                made = [make([p for p in model.parameters() if p.requires_grad], lr=self.lr, **self.options)]
        except (ValueError, TypeError, RuntimeError) as error:
            raise ConfigError(
                f"{place}.{make.__name__} refuses lr={self.lr} with {dict(self.options)}: {error}",
                expected="options that the optimizer accepts, for the parameters of this model",
                mend=f"see help({place}.{make.__name__})",
            ) from error
        return made

    def set_lr(self, optimizers: Optimizers, step: int, *, steps: int) -> None:
        """Set the learning rate of local step `step`; a group may have its own share of it."""
        rate = self.lr_at(step, steps=steps)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get(SHARE, 1.0)

    def lr_at(self, step: int, *, steps: int) -> float:
        """Learning rate of local step `step`, counted from 0, of `steps`: a pure function, nothing to resume."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        done = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        return self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def options_of(name: str) -> Options:
    """What an optimizer can be told beyond its parameters and learning rate."""
    maker: Any = _maker(name)
    return of_function(maker if name in LAYERWISE else maker.__init__, skip=("self", "params", "model", "lr"))


def _maker(name: str) -> Callable[..., Any]:
    """The function or the class of torch.optim with this name.

    raises  ConfigError if there is none that can step without a closure
    """
    known = {**_classes(), **LAYERWISE}
    if name not in known:
        raise unknown(f"torch.optim has no optimizer {name!r} to use here", name, known, what="one of")
    return known[name]


def _classes() -> dict[str, Callable[..., Any]]:
    """Those of torch.optim whose step needs no closure; LBFGS evaluates the model several times a step."""
    found: dict[str, Callable[..., Any]] = {}
    for name, each in vars(torch.optim).items():
        if isinstance(each, type) and issubclass(each, torch.optim.Optimizer) and each is not torch.optim.Optimizer:
            closure = inspect.signature(each.step).parameters.get("closure")
            if closure is None or closure.default is not inspect.Parameter.empty:
                found[name] = each
    return found
