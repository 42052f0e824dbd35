"""What members agree on before the first round, and what they make of every closed round by it.

    g_i   scalars of the round, members in ascending order, each one's samples in theirs; without those that abstain
    m, E  the scale (scale.py), from |g_i|
    drop the floor(trim n) largest |g_i|;  |g_i| <= clip m;  n: how many are left
    u     of the rule (rules.py), divided by n or its root
    w <- (1 - lr decay) w - lr u          decay: of matrices alone (directions.py)

A round in which nobody counts changes nothing. All of it is a pure function of the recipe and the closed rounds.

Error   one member's scalar moves no entry of the model by more than lr clip m / n in a round (sgd). trim shortens
        honest steps as well: at 0.25, of normal scalars, they go 0.37 times as far along the gradient.
Differs the paper's code divides by the root of the number of scalars (divide="root"): then a step's length, not its way
        along the gradient, is the same for groups of any size. The mean is the gradient's estimate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from torch import Tensor

from thinwire.errors import ConfigError
from thinwire.randomness import mix
from thinwire.seeds import codes, noise, rules
from thinwire.seeds.closed import Closed
from thinwire.seeds.codes import HIGHEST, LOWEST, float32
from thinwire.seeds.rules import Memory, Scalars
from thinwire.seeds.scale import Scale
from thinwire.seeds.updates import Update

_DIRECTION, _ROUNDING = 0x73656564, 0x636F6465  # purposes of a key: "seed", "code"


def seed_of(seed: int, number: int, member: int, sample: int) -> int:
    """The 64-bit seed of a direction: nobody has to send it.

    seed  of the recipe; number: of the round
    """
    return mix(seed, _DIRECTION, number, member, sample)


@dataclass(frozen=True)
class State:
    """What is remembered from round to round: it follows from the closed rounds, and is alike on all members."""

    scale: Scale
    memory: Memory = field(default_factory=Memory)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """See above. Parts are expressions, kept in one spelling: recipes that mean the same are equal.

    seed      of all directions, 64 bits
    samples   directions, so scalars, of a member in a round
    eps       how far losses are computed from the weights
    noise     what directions are made of
    rule      what scalars become: sgd, momentum(0.9), adam
    code      how a scalar is written: byte, half, whole
    clip      |g| that counts, at most, in units of the agreed scale; None: as far as the code reaches
    trim      share of a round's scalars that are left out, the largest, in [0, 0.5)
    divide    by the "count" of scalars or its "root"
    decay     weight decay, decoupled: a step takes lr times it off matrices
    rounding  of half-precision weights: "stochastic" or "nearest"
    exponent  E of the first round: 12 puts the byte between 0.07 and 4096
    least     what E may not fall below; raise it (and set clip to None) where most scalars are 0, as with accuracies
    """

    seed: int = 0
    samples: int = 1
    eps: float = 1e-3
    noise: str = "rademacher"
    rule: str = "sgd"
    code: str = "byte"
    clip: float | None = 6.0
    trim: float = 0.0
    divide: Literal["count", "root"] = "count"
    decay: float = 0.0
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    exponent: int = 12
    least: int = -20

    def __post_init__(self) -> None:
        for name, (fits, expected) in _BOUNDS.items():
            value = getattr(self, name)
            if not fits(value):
                default = type(self).__dataclass_fields__[name].default
                raise ConfigError(f"recipe: {name}={value!r}", expected=expected, mend=f"{name}={default!r}, say")
        for name, parts in (("noise", noise), ("rule", rules), ("code", codes)):
            object.__setattr__(self, name, parts.parse(getattr(self, name)).spec)

    # --- rounds ------------------------------------------------------------------------------------------------------

    @property
    def width(self) -> int:
        """Bytes that a member says in a round."""
        return self.samples * codes.parse(self.code).width

    def start(self) -> State:
        """Before the first round."""
        return State(Scale(self.exponent))

    def encode(self, scalars: Sequence[float], state: State, number: int, member: int) -> Tensor:
        """A member's scalars of round `number`, one a sample.  uint8 [width]"""
        assert len(scalars) == self.samples
        key = mix(self.seed, _ROUNDING, number, member)
        return codes.parse(self.code).encode(scalars, state.scale.exponent, key)

    def check(self, closed: Closed) -> None:
        """Raises ConfigError for a member that said more or less than the recipe asks for."""
        for member, told in closed.codes.items():
            if len(told) != self.width:
                raise ConfigError(
                    f"member {member} said {len(told)} bytes in round {closed.number}",
                    expected=f"{self.width} bytes: samples={self.samples} in code={self.code}",
                    mend="start all members with the same recipe",
                )

    def decode(self, state: State, closed: Closed) -> dict[int, list[float]]:
        """Everybody's scalars of a round, before any bound; NaN for those that abstain."""
        self.check(closed)
        code = codes.parse(self.code)
        return {member: code.decode(told, state.scale.exponent) for member, told in closed.codes.items()}

    def step(self, state: State, closed: Closed) -> tuple[State, Update]:
        """What a closed round does to the model, and what is remembered then.

        raises  ConfigError for a member that said more or less than the recipe asks for
        """
        found = self._found(self.decode(state, closed), closed.number)
        if not found:
            return state, Update((), (), round=closed.number)
        scale, median = state.scale.after([abs(g) for _, g in found], self.least)
        kept = self._bounded(found, median)
        memory, way = rules.parse(self.rule).step(
            state.memory, kept, math.sqrt(len(kept)) if self.divide == "root" else len(kept)
        )
        keep = max(0.0, float32(1.0 - closed.lr * self.decay))
        scalars = tuple(float32(closed.lr * c) for _, c in way)
        return State(scale, memory), Update(tuple(seed for seed, _ in way), scalars, keep, closed.number)

    def _found(self, told: Mapping[int, Sequence[float]], number: int) -> Scalars:
        """(seed, g) of all that count, in order."""
        return tuple(
            (seed_of(self.seed, number, member, sample), g)
            for member, scalars in told.items()
            for sample, g in enumerate(scalars)
            if not math.isnan(g)
        )

    def _bounded(self, found: Scalars, median: float) -> Scalars:
        """What is left after trim and clip."""
        by_size = sorted(range(len(found)), key=lambda place: (abs(found[place][1]), place))
        kept = sorted(by_size[: len(found) - math.floor(self.trim * len(found))])
        most = math.inf if self.clip is None else self.clip * median
        return tuple((seed, max(-most, min(most, g))) for seed, g in (found[place] for place in kept))

    def answers(self) -> dict[str, str]:
        """The six answers about a round, in words."""
        bounds = [f"clipped at {self.clip:g} medians"] if self.clip is not None else []
        bounds += [f"without the {self.trim:.0%} that are largest"] if self.trim else []
        return {
            "schedule": "every step",
            "payload": f"slopes along {self.samples} seeded directions ({self.noise}), eps {self.eps:g}",
            "codec": self.code,
            "topology": "everyone",
            "aggregator": ", ".join([f"sum by {self.divide}", *bounds]),
            "outer": self.rule,
        }

    # --- as plain values ---------------------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        """Numbers and strings by name, all of them, as JSON can hold them."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Recipe:
        """What `as_dict` gave; what is not there has its default.

        raises  ConfigError for a name or a value that no recipe has
        """
        known = [each.name for each in fields(cls)]
        for name in told:
            if name not in known:
                raise ConfigError(
                    f"a recipe with {name!r}",
                    expected=f"only {', '.join(known)}",
                    mend="it may be of a newer thinwire: install the version that wrote it",
                )
        return cls(**told)


def _number(value: object, kind: type | tuple[type, ...] = (int, float)) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


#: What each number of a recipe may be, and how that is said.
_BOUNDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (lambda x: _number(x, int) and 0 <= x < 1 << 64, "a whole number of at most 64 bits, not negative"),
    "samples": (lambda x: _number(x, int) and 1 <= x <= 1 << 16, "a whole number from 1 to 65536"),
    "eps": (lambda x: _number(x) and 0 < x < math.inf, "a number above 0"),
    "noise": (lambda x: isinstance(x, str), "an expression"),
    "rule": (lambda x: isinstance(x, str), "an expression"),
    "code": (lambda x: isinstance(x, str), "an expression"),
    "clip": (lambda x: x is None or (_number(x) and 0 < x < math.inf), "a number above 0, or None"),
    "trim": (lambda x: _number(x) and 0 <= x < 0.5, "a share in [0, 0.5)"),
    "divide": (lambda x: x in ("count", "root"), "'count' or 'root'"),
    "decay": (lambda x: _number(x) and 0 <= x < math.inf, "a number of at least 0"),
    "rounding": (lambda x: x in ("stochastic", "nearest"), "'stochastic' or 'nearest'"),
    "exponent": (lambda x: _number(x, int) and LOWEST <= x <= HIGHEST, f"a whole number from {LOWEST} to {HIGHEST}"),
    "least": (lambda x: _number(x, int) and LOWEST <= x <= HIGHEST, f"a whole number from {LOWEST} to {HIGHEST}"),
}
