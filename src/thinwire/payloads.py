"""What? The vector a member sends for a fragment.

Three kinds, which the outer step must match: a `gradient` is combined before the optimizer's step and replaces the
member's own; a `delta` is what local steps did to the anchor; `parameters` are the weights themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from thinwire.errors import ConfigError

Kind = Literal["gradient", "delta", "parameters"]


class Payload(Protocol):
    """What is worth sending."""

    @property
    def kind(self) -> Kind:
        """What the vector is."""

    @property
    def fragments(self) -> int:
        """In how many parts the model is sent."""

    @property
    def in_steps(self) -> bool:
        """Whether gradients are multiplied by the learning rate on their way out, and divided on their way in."""

    def select(self, live: Tensor, anchor: Tensor) -> Tensor:
        """The vector to send.

        live    [n] the fragment's gradients (kind gradient) or parameters
        anchor  [n] the model all members agree on, as rounded to the parameters' own dtype; empty for gradients
        """


@dataclass(frozen=True)
class Gradient:
    """The gradient of the step about to be taken; absent gradients count as zero."""

    kind: Kind = field(default="gradient", init=False, repr=False)
    fragments: int = field(default=1, init=False, repr=False)
    in_steps: bool = field(default=False, init=False, repr=False)

    def select(self, live: Tensor, anchor: Tensor) -> Tensor:
        return live


@dataclass(frozen=True)
class GradientStep:
    """The gradient times the learning rate: what plain SGD is about to do, in units of parameters.

    Error feedback on `Gradient()` remembers gradients. When the learning rate falls to a tenth, what an old one still
    moves falls with it, though it was owed at the old rate; here it moves as much as it would have. What was combined
    is divided by the learning rate again, for the optimizer to multiply.

    For optimizers whose steps are in proportion to gradient and learning rate: SGD, with momentum too. A step at a
    learning rate of zero moves nothing, whatever was sent for it: begin a warm-up above zero.
    Source: p = e + gamma g in Karimireddy et al. 2019, arXiv:1901.09847, Alg. 2.
    """

    kind: Kind = field(default="gradient", init=False, repr=False)
    fragments: int = field(default=1, init=False, repr=False)
    in_steps: bool = field(default=True, init=False, repr=False)

    def select(self, live: Tensor, anchor: Tensor) -> Tensor:
        return live


@dataclass(frozen=True)
class Delta:
    """Anchor minus parameters: the pseudo-gradient, positive along descent (arXiv:2311.08105, Alg. 1)."""

    fragments: int = 1
    kind: Kind = field(default="delta", init=False, repr=False)
    in_steps: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        _check(self.fragments)

    def select(self, live: Tensor, anchor: Tensor) -> Tensor:
        return anchor - live


@dataclass(frozen=True)
class Parameters:
    """The parameters themselves, for plain averaging (arXiv:1602.05629).

    stretch  how far from the anchor: 1 sends them as they are, 2 twice as far from the anchor as they are
    """

    fragments: int = 1
    stretch: float = 1.0
    kind: Kind = field(default="parameters", init=False, repr=False)
    in_steps: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        _check(self.fragments)
        if not 0 < self.stretch < math.inf:
            raise ConfigError(
                f"parameters stretched by {self.stretch}", expected="a number above 0", mend="1 sends them as they are"
            )

    def select(self, live: Tensor, anchor: Tensor) -> Tensor:
        return live if self.stretch == 1 else anchor + self.stretch * (live - anchor)


def _check(fragments: int) -> None:
    if fragments < 1:
        raise ConfigError(f"{fragments} fragments", expected="at least one", mend="fragments=1 sends the whole model")
