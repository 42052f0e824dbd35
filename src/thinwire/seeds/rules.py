"""What the scalars of a round become: optimisers in the space of scalars.

    n scalars g_i along directions z_i; d = n, or its root
    sgd        u = sum_i (g_i / d) z_i
    momentum   m <- beta m + u
    adam       m <- b1 m + (1 - b1) u;  v <- b2 v + (1 - b2) mean_i g_i^2
               u' = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + e)        t: rounds so far

and the weights move by -lr times u, m or u'. None of these vectors exists: m is a list of directions and scalars, those
of the last `window` rounds, each round's fading by beta from round to round.

v is one number for the whole model. E g_i^2 is the squared norm of the gradient, so sqrt(v) is its length, and
a step's entries are of the size of lr / sqrt(n) at most, whatever the loss is multiplied by: learning rates of Adam.

Error   momentum leaves out beta^window of each scalar's pull: 4 to 5 % with a window of 3 / (1 - beta). With all rounds
        in the window it is the ordinary one but for rounding.
Cost    momentum and adam replay `window` rounds in every round.
State   the window's directions and scalars: 16 bytes each.
Source  momentum and Adam (Kingma & Ba 2015, arXiv:1412.6980); moments as seeds and scalars, the window, and v for the
        whole model are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from thinwire.errors import ConfigError
from thinwire.expressions import Words, evaluate, options

#: (seed, scalar) of directions, in the order in which they are added up.
Scalars = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Memory:
    """What rules remember, none of it as long as the model.

    past    scalars of the window's rounds, oldest first, as far as they have faded
    second  v
    fades   b1^t and b2^t
    """

    past: tuple[Scalars, ...] = ()
    second: float = 0.0
    fades: tuple[float, float] = (1.0, 1.0)


class Rule(Protocol):
    """A round's scalars and what is remembered, to the directions of a step.

    All arithmetic is +, -, *, / and square roots of Python's floats, in the order given.
    """

    @property
    def spec(self) -> str:
        """The expression that makes it."""

    def step(self, memory: Memory, scalars: Scalars, divisor: float) -> tuple[Memory, Scalars]:
        """scalars: (seed, g), at least one; divisor: d above.  The step's scalars go without the learning rate."""


@dataclass(frozen=True)
class SGD:
    """See above."""

    @property
    def spec(self) -> str:
        return _spelled(self)

    def step(self, memory: Memory, scalars: Scalars, divisor: float) -> tuple[Memory, Scalars]:
        return memory, tuple((seed, g / divisor) for seed, g in scalars)


@dataclass(frozen=True)
class Momentum:
    """See above.

    beta    in (0, 1)
    window  rounds, this one included; None becomes 3 / (1 - beta)
    """

    beta: float = 0.9
    window: int | None = None

    def __post_init__(self) -> None:
        _check_number("momentum: beta", self.beta, 0, 1)
        object.__setattr__(self, "window", _window("momentum", self.window, self.beta))

    @property
    def spec(self) -> str:
        return _spelled(self)

    def step(self, memory: Memory, scalars: Scalars, divisor: float) -> tuple[Memory, Scalars]:
        past = _faded(memory.past, self.beta, self.window)
        past = (*past, tuple((seed, g / divisor) for seed, g in scalars))
        return Memory(past), tuple(pair for round_ in past for pair in round_)


@dataclass(frozen=True)
class Adam:
    """See above.

    beta1, beta2  b1, b2, in [0, 1)
    window        rounds, this one included; None becomes 3 / (1 - beta1)
    epsilon       e, above 0
    """

    beta1: float = 0.9
    beta2: float = 0.99
    window: int | None = None
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if getattr(self, name) != 0:
                _check_number(f"adam: {name}", getattr(self, name), 0, 1)
        _check_number("adam: epsilon", self.epsilon, 0, math.inf)
        object.__setattr__(self, "window", _window("adam", self.window, self.beta1))

    @property
    def spec(self) -> str:
        return _spelled(self)

    def step(self, memory: Memory, scalars: Scalars, divisor: float) -> tuple[Memory, Scalars]:
        squares = 0.0
        for _, g in scalars:
            squares += g * g
        second = self.beta2 * memory.second + (1 - self.beta2) * (squares / len(scalars))
        fades = (memory.fades[0] * self.beta1, memory.fades[1] * self.beta2)
        past = _faded(memory.past, self.beta1, self.window)
        past = (*past, tuple((seed, (1 - self.beta1) * (g / divisor)) for seed, g in scalars))
        size = (1 - fades[0]) * (math.sqrt(second / (1 - fades[1])) + self.epsilon)
        return Memory(past, second, fades), tuple((seed, c / size) for round_ in past for seed, c in round_)


def _faded(past: tuple[Scalars, ...], beta: float, window: int | None) -> tuple[Scalars, ...]:
    """What is left of past rounds when one more comes."""
    assert window is not None
    kept = window - 1
    return tuple(tuple((seed, beta * c) for seed, c in round_) for round_ in past[max(0, len(past) - kept) :])


#: Every rule by the name used in expressions.
RULES: Mapping[str, Callable[..., Rule]] = {"sgd": SGD, "momentum": Momentum, "adam": Adam}
_WORDS = Words("rule", RULES, "momentum(0.9)", "docs/seed-logs.md")


@lru_cache(maxsize=16)  # asked for in every round
def parse(expression: str) -> Rule:
    """A rule from an expression; its errors are ConfigErrors."""
    rule = evaluate(expression, _WORDS)
    if not isinstance(rule, SGD | Momentum | Adam):
        raise ConfigError(f"{expression!r} is no rule", expected=" or ".join(RULES), mend="momentum(0.9), say")
    return rule


def _spelled(rule: Rule) -> str:
    """With all options: logs are read when defaults may be others."""
    name = next(name for name, made in RULES.items() if made is type(rule))
    told = [f"{option}={getattr(rule, option)!r}" for option in options(type(rule))]
    return f"{name}({', '.join(told)})" if told else name


def _check_number(what: str, value: object, above: float, below: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < below:
        raise ConfigError(
            f"{what} = {value!r}",
            expected=f"a number between {above} and {below}" if below < math.inf else f"a number above {above}",
            mend="leave it out for the default; sgd has no momentum",
        )


def _window(what: str, window: object, beta: float) -> int:
    """Rounds that are remembered, this one included."""
    if window is None:
        return round(3 / (1 - beta)) if beta else 1
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ConfigError(
            f"{what}: window = {window!r}",
            expected="a whole number of rounds, at least one",
            mend="leave it out for 3 / (1 - beta) rounds",
        )
    return window
