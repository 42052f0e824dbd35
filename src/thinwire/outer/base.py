"""The contract of outer steps, and the plain ones: those of torch.optim, and what goes around them.

The optimizers are torch.optim's, run on the anchor with the combined delta as its gradient. Their state goes in and
comes out as a value; nothing that was given is changed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from thinwire.errors import ConfigError
from thinwire.payloads import Kind

#: What an outer step remembers of a fragment; an optimizer's is by torch.optim's own names.
Memory = Mapping[str, Tensor]


@dataclass(frozen=True)
class Now:
    """What all members know alike of the moment of an outer step.

    round  rounds of the fragment that took effect before this one
    lr     the inner learning rate, of the optimizer's first group
    scale  what the outer learning rate is to be multiplied by
    """

    round: int = 0
    lr: float = 1.0
    scale: float = 1.0


@dataclass(frozen=True)
class Mine:
    """A member's own side of a round that ends; every vector is [n].

    live     its parameters now, `overlap` local steps after the round began
    sent     its parameters when the round began
    update   what the round combined to; None if no round ends here, or without effect
    counted  what the round counted as this member's, as others read it; None if nothing, or if nobody asked (`recalls`)
    fresh    what it sends in the round that begins now, where rounds follow each other without a pause; else empty
    members  that took part in the round, or would have
    """

    live: Tensor
    sent: Tensor
    update: Tensor | None = None
    counted: Tensor | None = None
    fresh: Tensor = field(default_factory=lambda: torch.zeros(0))
    members: int = 1


class Outer(ABC):
    """The outer step: a rule for the anchor, which all members take alike, and one for a member's live parameters."""

    @property
    def accepts(self) -> Kind:
        """The kind of payload it can be fed with."""
        return "delta"

    @property
    def recalls(self) -> bool:
        """Whether `merge` asks for what was counted as the member's own."""
        return False

    @property
    def mixes(self) -> bool:
        """Whether `merge` keeps something of the local steps made while the round was under way."""
        return False

    @property
    def anticipates(self) -> bool:
        """Whether `merge` takes in what the round that begins then is yet to bring."""
        return False

    @property
    def restarts(self) -> bool:
        """Whether inner optimizers forget what they know of a fragment's parameters when a round has changed them."""
        return False

    @property
    def linear(self) -> bool:
        """Whether two updates together move the anchor as they do one by one, but for what is clipped."""
        return False

    @property
    def apart(self) -> bool:
        """Whether members' models stay apart, so that the one to evaluate and ship is their mean, not the anchor."""
        return False

    def check_names(self, names: tuple[str, ...]) -> None:  # noqa: B027 (most have nothing to say)
        """Refuse a model whose parameters have these names, if names mean something and these are not meant."""

    def fit(self, names: tuple[str, ...], sizes: tuple[int, ...]) -> Outer:
        """The step for vectors that hold these parameters, of so many elements; itself, unless names mean something."""
        return self

    @abstractmethod
    def step(self, anchor: Tensor, update: Tensor, memory: Memory, now: Now) -> tuple[Tensor, Memory]:
        """The next anchor, all [n], and what to remember. The same on all members, to the bit."""

    def merge(self, mine: Mine, anchor: Tensor, own: Memory, now: Now) -> tuple[Tensor, Memory]:
        """The next live parameters, and what this member remembers for itself.

        anchor  [n] the anchor that the round gave
        own     what this member alone remembers; empty at first, after joining and after `Synchronizer.finish`
        """
        return anchor, own


@dataclass(frozen=True)
class NoStep(Outer):
    """Nothing: the combined gradient replaces the member's own, and its optimizer goes on."""

    @property
    def accepts(self) -> Kind:
        return "gradient"

    def step(self, anchor: Tensor, update: Tensor, memory: Memory, now: Now) -> tuple[Tensor, Memory]:
        return anchor, memory

    def merge(self, mine: Mine, anchor: Tensor, own: Memory, now: Now) -> tuple[Tensor, Memory]:
        return mine.live, own


@dataclass(frozen=True)
class Average(Outer):
    """The combined parameters are the next anchor."""

    @property
    def accepts(self) -> Kind:
        return "parameters"

    def step(self, anchor: Tensor, update: Tensor, memory: Memory, now: Now) -> tuple[Tensor, Memory]:
        return update, memory


@dataclass(frozen=True)
class SGD(Outer):
    """Gradient descent on the anchor; lr=1 without momentum is plain averaging of what members did.

    b <- mu b + D;   a <- a - lr (D + mu b) if nesterov else a - lr b        (b = D at the first step)
    """

    lr: float = 1.0
    momentum: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        check(self.lr, self.momentum)
        if self.nesterov and self.momentum == 0:
            raise ConfigError(
                "Nesterov's step without momentum",
                expected="momentum above 0",
                mend="set momentum=0.9, or nesterov off",
            )

    @property
    def linear(self) -> bool:
        return True

    def step(self, anchor: Tensor, update: Tensor, memory: Memory, now: Now) -> tuple[Tensor, Memory]:
        def make(weights: list[Tensor]) -> torch.optim.Optimizer:
            # foreach=False, here and below: torch's batched variant, its default on GPUs, overwrites the gradient.
            return torch.optim.SGD(
                weights, lr=self.lr * now.scale, momentum=self.momentum, nesterov=self.nesterov, foreach=False
            )

        return optimize(make, anchor, update, memory)


@dataclass(frozen=True)
class Patch(Outer):
    """The mean of what was sent, where something was sent; everything else stays each member's own.

    a <- a - D;   theta <- a + (theta - sent) where D or the member's own part is not 0, else theta

    Source: SPARTA (thinwire.methods.sparta).
    """

    @property
    def recalls(self) -> bool:
        return True

    @property
    def mixes(self) -> bool:
        return True

    @property
    def apart(self) -> bool:
        return True

    def step(self, anchor: Tensor, update: Tensor, memory: Memory, now: Now) -> tuple[Tensor, Memory]:
        return anchor - update, memory

    def merge(self, mine: Mine, anchor: Tensor, own: Memory, now: Now) -> tuple[Tensor, Memory]:
        assert mine.update is not None
        touched = mine.update != 0
        if mine.counted is not None:
            touched |= mine.counted != 0  # where both are 0, the member's parameter is the anchor already
        return torch.where(touched, anchor + (mine.live - mine.sent), mine.live), own


def Nesterov(lr: float = 0.7, momentum: float = 0.9) -> SGD:  # noqa: N802 (reads as the part it makes)
    """SGD with Nesterov momentum, DiLoCo's outer step (arXiv:2311.08105); momentum=0 is plain SGD."""
    return SGD(lr, momentum, nesterov=momentum > 0)


@dataclass(frozen=True)
class Adam(Outer):
    """Adam on the anchor (FedAdam, Reddi et al. 2021, arXiv:2003.00295, Alg. 2).

    Differs: torch's Adam corrects the bias of the first steps and starts v at 0; the paper does neither.
    """

    lr: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-3

    def __post_init__(self) -> None:
        for beta in self.betas:
            check(self.lr, beta)
        if not self.eps > 0:
            raise ConfigError(f"outer eps={self.eps}", expected="a number above 0", mend="1e-3 is the paper's value")

    def step(self, anchor: Tensor, update: Tensor, memory: Memory, now: Now) -> tuple[Tensor, Memory]:
        def make(weights: list[Tensor]) -> torch.optim.Optimizer:
            return torch.optim.Adam(weights, lr=self.lr * now.scale, betas=self.betas, eps=self.eps, foreach=False)

        return optimize(make, anchor, update, memory)


@dataclass(frozen=True)
class Around(Outer):
    """What wrappers have in common: they are the outer step that they go around, but for what they change."""

    outer: Outer

    @property
    def accepts(self) -> Kind:
        return self.outer.accepts

    @property
    def recalls(self) -> bool:
        return self.outer.recalls

    @property
    def mixes(self) -> bool:
        return self.outer.mixes

    @property
    def anticipates(self) -> bool:
        return self.outer.anticipates

    @property
    def restarts(self) -> bool:
        return self.outer.restarts

    @property
    def linear(self) -> bool:
        return self.outer.linear

    @property
    def apart(self) -> bool:
        return self.outer.apart

    def check_names(self, names: tuple[str, ...]) -> None:
        self.outer.check_names(names)

    def fit(self, names: tuple[str, ...], sizes: tuple[int, ...]) -> Outer:
        return replace(self, outer=self.outer.fit(names, sizes))

    def step(self, anchor: Tensor, update: Tensor, memory: Memory, now: Now) -> tuple[Tensor, Memory]:
        return self.outer.step(anchor, update, memory, now)

    def merge(self, mine: Mine, anchor: Tensor, own: Memory, now: Now) -> tuple[Tensor, Memory]:
        return self.outer.merge(mine, anchor, own, now)


@dataclass(frozen=True)
class Mix(Around):
    """Keep a share of the local steps made while the round was under way (Streaming DiLoCo's mixing factor).

    theta <- keep theta + (1 - keep) a      keep is alpha in arXiv:2501.18512; 0 takes the anchor, 1 ignores it
    """

    keep: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.keep <= 1:
            raise ConfigError(f"keep={self.keep}", expected="a share in [0, 1]", mend="0.5 is the paper's value")

    @property
    def mixes(self) -> bool:
        return self.keep > 0 or self.outer.mixes

    def merge(self, mine: Mine, anchor: Tensor, own: Memory, now: Now) -> tuple[Tensor, Memory]:
        merged, own = self.outer.merge(mine, anchor, own, now)
        # lerp is exact at both ends: keep=0 gives the anchor, keep=1 the live parameters, to the bit.
        return torch.lerp(merged, mine.live, self.keep), own


@dataclass(frozen=True)
class Rebase(Around):
    """Put the local steps made while the round was under way on top of the new anchor: theta <- a + (theta - sent).

    Ours, not a paper's: it keeps all local progress, where `Mix` keeps a share of the local model.
    """

    @property
    def mixes(self) -> bool:
        return True

    def merge(self, mine: Mine, anchor: Tensor, own: Memory, now: Now) -> tuple[Tensor, Memory]:
        merged, own = self.outer.merge(mine, anchor, own, now)
        return merged + (mine.live - mine.sent), own


def optimize(
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


def check(lr: float, momentum: float) -> None:
    """A learning rate and a momentum that can be meant."""
    if not 0 < lr < math.inf:
        raise ConfigError(f"outer lr={lr}", expected="a number above 0", mend="0.7 for DiLoCo, 1.0 to average")
    if not 0 <= momentum < 1:
        raise ConfigError(f"outer momentum={momentum}", expected="a number in [0, 1)", mend="0.9 for DiLoCo")
