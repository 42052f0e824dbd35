"""And then? What the combined vector does to the anchor, and how the live parameters take the new anchor in.

The optimizers are torch.optim's, run on the anchor with the combined delta as its gradient. Their state goes in and
comes out as a value; nothing that was given is changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from thinwire.errors import ConfigError
from thinwire.payloads import Kind

#: What an outer optimizer remembers of a fragment, by torch.optim's own names.
Memory = Mapping[str, Tensor]


class Outer(Protocol):
    """The outer step."""

    @property
    def accepts(self) -> Kind:
        """The kind of payload it can be fed with."""

    def step(self, anchor: Tensor, update: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """The next anchor, all [n], and what to remember."""

    def merge(self, live: Tensor, anchor: Tensor, sent: Tensor) -> Tensor:
        """The next live parameters.

        live    [n] parameters now, `overlap` local steps after the round began
        anchor  [n] the anchor that the round gave
        sent    [n] parameters when the round began
        """


@dataclass(frozen=True)
class NoStep:
    """Nothing: the combined gradient replaces the member's own, and its optimizer goes on."""

    accepts: Kind = field(default="gradient", init=False, repr=False)

    def step(self, anchor: Tensor, update: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        return anchor, memory

    def merge(self, live: Tensor, anchor: Tensor, sent: Tensor) -> Tensor:
        return live


@dataclass(frozen=True)
class Average:
    """The combined parameters are the next anchor."""

    accepts: Kind = field(default="parameters", init=False, repr=False)

    def step(self, anchor: Tensor, update: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        return update, memory

    def merge(self, live: Tensor, anchor: Tensor, sent: Tensor) -> Tensor:
        return anchor


@dataclass(frozen=True)
class SGD:
    """Gradient descent on the anchor; lr=1 without momentum is plain averaging of what members did.

    b <- mu b + D;   a <- a - lr (D + mu b) if nesterov else a - lr b        (b = D at the first step)
    """

    lr: float = 1.0
    momentum: float = 0.0
    nesterov: bool = False
    accepts: Kind = field(default="delta", init=False, repr=False)

    def __post_init__(self) -> None:
        _check(self.lr, self.momentum)
        if self.nesterov and self.momentum == 0:
            raise ConfigError(
                "Nesterov's step without momentum",
                expected="momentum above 0",
                mend="set momentum=0.9, or nesterov off",
            )

    def step(self, anchor: Tensor, update: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        def make(weights: list[Tensor]) -> torch.optim.Optimizer:
            # foreach=False, here and below: torch's batched variant, its default on GPUs, overwrites the gradient.
            return torch.optim.SGD(weights, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, foreach=False)

        return _step(make, anchor, update, memory)

    def merge(self, live: Tensor, anchor: Tensor, sent: Tensor) -> Tensor:
        return anchor


def Nesterov(lr: float = 0.7, momentum: float = 0.9) -> SGD:  # noqa: N802 (reads as the part it makes)
    """SGD with Nesterov momentum, DiLoCo's outer step (arXiv:2311.08105); momentum=0 is plain SGD."""
    return SGD(lr, momentum, nesterov=momentum > 0)


@dataclass(frozen=True)
class Adam:
    """Adam on the anchor (FedAdam, Reddi et al. 2021, arXiv:2003.00295, Alg. 2).

    Differs: torch's Adam corrects the bias of the first steps and starts v at 0; the paper does neither.
    """

    lr: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-3
    accepts: Kind = field(default="delta", init=False, repr=False)

    def __post_init__(self) -> None:
        for beta in self.betas:
            _check(self.lr, beta)
        if not self.eps > 0:
            raise ConfigError(f"outer eps={self.eps}", expected="a number above 0", mend="1e-3 is the paper's value")

    def step(self, anchor: Tensor, update: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        def make(weights: list[Tensor]) -> torch.optim.Optimizer:
            return torch.optim.Adam(weights, lr=self.lr, betas=self.betas, eps=self.eps, foreach=False)

        return _step(make, anchor, update, memory)

    def merge(self, live: Tensor, anchor: Tensor, sent: Tensor) -> Tensor:
        return anchor


@dataclass(frozen=True)
class Mix:
    """Keep a share of the local steps made while the round was under way (Streaming DiLoCo's mixing factor).

    theta <- keep theta + (1 - keep) a      keep is alpha in arXiv:2501.18512; 0 takes the anchor, 1 ignores it
    """

    outer: Outer
    keep: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.keep <= 1:
            raise ConfigError(f"keep={self.keep}", expected="a share in [0, 1]", mend="0.5 is the paper's value")

    @property
    def accepts(self) -> Kind:
        return self.outer.accepts

    def step(self, anchor: Tensor, update: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        return self.outer.step(anchor, update, memory)

    def merge(self, live: Tensor, anchor: Tensor, sent: Tensor) -> Tensor:
        # lerp is exact at both ends: keep=0 gives the anchor, keep=1 the live parameters, to the bit.
        return torch.lerp(self.outer.merge(live, anchor, sent), live, self.keep)


@dataclass(frozen=True)
class Rebase:
    """Put the local steps made while the round was under way on top of the new anchor: theta <- a + (theta - sent).

    Ours, not a paper's: it keeps all local progress, where `Mix` keeps a share of the local model.
    """

    outer: Outer

    @property
    def accepts(self) -> Kind:
        return self.outer.accepts

    def step(self, anchor: Tensor, update: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        return self.outer.step(anchor, update, memory)

    def merge(self, live: Tensor, anchor: Tensor, sent: Tensor) -> Tensor:
        return self.outer.merge(live, anchor, sent) + (live - sent)


def _step(
    make: Callable[[list[Tensor]], torch.optim.Optimizer], anchor: Tensor, update: Tensor, memory: Memory
) -> tuple[Tensor, Memory]:
    """One step of a torch optimizer as a pure function."""
    weights = anchor.clone()
    weights.grad = update
    optimizer = make([weights])
    state: dict[str, Any] = {name: value.clone() for name, value in memory.items()}
    if state:
        optimizer.state[weights] = state
    optimizer.step()
    after = {name: value for name, value in optimizer.state[weights].items() if isinstance(value, Tensor)}
    return weights, after


def _check(lr: float, momentum: float) -> None:
    if not 0 < lr < math.inf:
        raise ConfigError(f"outer lr={lr}", expected="a number above 0", mend="0.7 for DiLoCo, 1.0 to average")
    if not 0 <= momentum < 1:
        raise ConfigError(f"outer momentum={momentum}", expected="a number in [0, 1)", mend="0.9 for DiLoCo")
