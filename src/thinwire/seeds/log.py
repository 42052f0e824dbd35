"""The log is the model: a base, a recipe and what was closed in every round.

    base + log  ->  the weights that all members had, to the bit

The file is set down byte by byte in docs/seed-logs.md and held by tests/golden/seeds.v1.log. A digest in it finds any
change; a keyed digest beside it proves that somebody wrote it who has the key.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from thinwire.errors import ConfigError, PacketError
from thinwire.seeds import codes, columns
from thinwire.seeds.closed import Closed
from thinwire.seeds.digests import Spec, digest, spec
from thinwire.seeds.reading import Reader, signed, varint
from thinwire.seeds.recipe import Recipe, State
from thinwire.seeds.seal import seal, unseal
from thinwire.seeds.sums import Sums
from thinwire.seeds.updates import Update

__all__ = ["Closed", "Log", "updates"]


@dataclass(frozen=True)
class Log:
    """A fine-tune as a value.

    recipe   what members agreed on
    tensors  tuned tensors by name: dtype and shape
    base     digest of those before the first round
    rounds   closed rounds 0, 1, 2, ...
    checks   number of rounds -> digest of the tuned tensors after so many
    frozen   tensors that the model needs and that were not tuned; empty if nobody said
    rest     their digest; "" if there are none
    sums     of a pool of directions instead of rounds
    aliases  other names under which files keep a tuned tensor (tied weights) -> its name in `tensors`
    """

    recipe: Recipe
    tensors: Mapping[str, Spec]
    base: str
    rounds: tuple[Closed, ...] = ()
    checks: Mapping[int, str] = field(default_factory=dict)
    frozen: Mapping[str, Spec] = field(default_factory=dict)
    rest: str = ""
    aliases: Mapping[str, str] = field(default_factory=dict)
    sums: Sums | None = None

    def __post_init__(self) -> None:
        assert not (self.rounds and self.sums)

    @classmethod
    def of(
        cls, tuned: Iterable[tuple[str, Tensor]], recipe: Recipe, *, frozen: Iterable[tuple[str, Tensor]] = (),
        aliases: Mapping[str, str] | None = None,
    ) -> Log:  # fmt: skip
        """Of a model as it is before the first round: what is tuned, and what else belongs to it."""
        moves, stays = dict(tuned), dict(frozen)
        rest = digest(stays.items()) if stays else ""
        return cls(
            recipe, _specs(moves), digest(moves.items()), frozen=_specs(stays), rest=rest, aliases=dict(aliases or {})
        )

    # --- growing -----------------------------------------------------------------------------------------------------

    def append(self, closed: Closed) -> Log:
        """With one more round.

        raises  ConfigError if it is not the next one, or a member said more or less than the recipe asks for
        """
        if closed.number != len(self.rounds):
            raise ConfigError(
                f"round {closed.number} in a log of {len(self.rounds)} rounds",
                expected=f"round {len(self.rounds)}",
                mend="append rounds in order, each once; the first is 0",
            )
        self.recipe.check(closed)
        return replace(self, rounds=(*self.rounds, closed))

    def checked(self, digest: str) -> Log:
        """With the digest of the tuned tensors as they are now, after all rounds of the log."""
        return replace(self, checks={**self.checks, len(self.rounds): digest})

    # --- asking ------------------------------------------------------------------------------------------------------

    @property
    def result(self) -> str | None:
        """Digest of the tuned tensors after the last round, if it was noted."""
        return self.checks.get(len(self.rounds))

    def states(self) -> Iterator[tuple[State, Closed]]:
        """Every round and what was remembered before it."""
        state = self.recipe.start()
        for closed in self.rounds:
            yield state, closed
            state, _ = self.recipe.step(state, closed)

    @property
    def state(self) -> State:
        """What is remembered after the last round."""
        state = self.recipe.start()
        for closed in self.rounds:
            state, _ = self.recipe.step(state, closed)
        return state

    def check(self, tuned: Iterable[tuple[str, Tensor]], recipe: Recipe) -> None:
        """Whether a model can go on from this log: its tensors and recipe, not its weights.

        raises  ConfigError naming what differs
        """
        if recipe != self.recipe:
            mine, its = recipe.as_dict(), self.recipe.as_dict()
            name = next(name for name in mine if mine[name] != its[name])
            raise ConfigError(
                f"the log has {name}={its[name]!r}",
                expected=f"{name}={mine[name]!r}, as the run",
                mend="go on with the recipe of the log, or start anew from its weights",
            )
        check_specs(self.tensors, _specs(dict(tuned)), "the model")

    # --- bytes -------------------------------------------------------------------------------------------------------

    def to_bytes(self, key: bytes | None = None) -> bytes:
        """As a file; signed if there is a key.  key: of `seal.key_of`"""
        return seal(self.content(), key)

    @classmethod
    def from_bytes(cls, data: bytes, key: bytes | None = None) -> Log:
        """What `to_bytes` wrote.

        key     if given, the log must be signed with it
        raises  PacketError for anything that is no log of this format, whole and unchanged; ConfigError for another key
        """
        content = unseal(data, key)
        try:
            return _log(content)
        except ConfigError as error:
            raise PacketError(f"the log's {error.wrong}", expected=error.expected, mend=error.mend) from error

    def content(self) -> bytes:
        """What is squeezed: the header as JSON and the columns of rounds."""
        header: dict[str, Any] = {
            "recipe": self.recipe.as_dict(), "tensors": self.tensors, "base": self.base,
            "checks": dict(sorted(self.checks.items())), "frozen": self.frozen, "rest": self.rest,
            "aliases": self.aliases, "pool": self.sums and {"seed": self.sums.seed, "bits": self.sums.bits},
        }  # fmt: skip
        words = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        rows = columns.write(self.rounds, codes.parse(self.recipe.code).width)
        if self.sums:
            rows = varint(len(self.sums.values)) + b"".join(map(signed, self.sums.values))
        return varint(len(words)) + words + rows


def updates(log: Log) -> Iterator[Update]:
    """What every round does to the model; of a pool, the one step from the base."""
    state = log.recipe.start()
    for closed in log.rounds:
        state, update = log.recipe.step(state, closed)
        yield update
    if log.sums:
        yield log.sums.update()


def check_specs(due: Mapping[str, Spec], found: Mapping[str, Spec], whose: str) -> None:
    """Raises ConfigError naming the first tensor that is missing, or another one than is due."""
    for name, (dtype, shape) in due.items():
        if name not in found:
            wrong = f"{whose} has no tensor {name!r}"
        elif found[name] != (dtype, shape):
            wrong = f"{whose} has {name!r} as {found[name][0]} {list(found[name][1])}"
        else:
            continue
        raise ConfigError(
            wrong,
            expected=f"{name!r} as {dtype} {list(shape)}, as in the model that was tuned",
            mend="give the weights that the run started from, under the names that they had there",
        )


# --- reading ---------------------------------------------------------------------------------------------------------


def _log(content: bytes) -> Log:
    reader = Reader(content, what="the log's content")
    words = reader.take(reader.varint())
    try:
        header = json.loads(words.decode(), parse_constant=_no_constant)
        json.dumps(header, ensure_ascii=False).encode()  # no half of a surrogate pair is a name
    except (ValueError, RecursionError) as error:
        raise reader.wrong(f"does not begin with JSON: {error}") from error
    if not (isinstance(header, dict) and header.keys() == _FITS.keys()):
        raise reader.wrong(f"begins with a header that is not of {', '.join(_FITS)}")
    for name, fits in _FITS.items():
        if not fits(header[name]):
            raise reader.wrong(f"has a header whose {name} is {str(header[name])[:60]!r}")
    recipe = Recipe.from_dict(header["recipe"])
    pool, sums = header["pool"], None
    rounds: tuple[Closed, ...] = ()
    if pool is None:
        rounds = columns.read(reader, codes.parse(recipe.code).width, recipe.samples)
    else:
        sums = Sums(pool["seed"], tuple(reader.signed() for _ in range(reader.count())), pool["bits"])
    reader.end()
    checks = {int(number): told for number, told in header["checks"].items()}
    if any(number > len(rounds) for number in checks):
        raise reader.wrong(f"has a digest of round {max(checks)} and {len(rounds)} rounds")
    tensors, frozen = ({name: (dtype, tuple(shape)) for name, (dtype, shape) in header[part].items()}
                       for part in ("tensors", "frozen"))  # fmt: skip
    if not set(header["aliases"].values()) <= tensors.keys():
        raise reader.wrong("has a second name for a tensor that was not tuned")
    return Log(recipe, tensors, header["base"], rounds, checks, frozen, header["rest"], header["aliases"], sums)


def _no_constant(word: str) -> float:
    raise ValueError(f"{word} is no number")


def _is_digest(told: object) -> bool:
    return isinstance(told, str) and len(told) == 32 and set(told) <= set("0123456789abcdef")


def _is_specs(told: object) -> bool:
    return isinstance(told, dict) and all(
        isinstance(each, list) and len(each) == 2 and isinstance(each[0], str) and isinstance(each[1], list)
        and all(isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 1 << 63 for size in each[1])
        for each in told.values()
    )  # fmt: skip


def _is_checks(told: object) -> bool:
    return isinstance(told, dict) and all(
        re.fullmatch("0|[1-9][0-9]{0,18}", number) and _is_digest(each) for number, each in told.items()
    )


def _is_pool(told: object) -> bool:
    return (
        isinstance(told, dict)
        and told.keys() == {"seed", "bits"}
        and all(type(number) is int for number in told.values())
        and 0 <= told["seed"] < 1 << 64
        and 0 <= told["bits"] < 64
    )


_FITS: Mapping[str, Callable[[Any], bool]] = {
    "recipe": lambda told: isinstance(told, dict),
    "tensors": _is_specs,
    "base": _is_digest,
    "checks": _is_checks,
    "frozen": _is_specs,
    "rest": lambda told: told == "" or _is_digest(told),
    "pool": lambda told: told is None or _is_pool(told),
    "aliases": lambda told: isinstance(told, dict) and all(isinstance(name, str) for name in told.values()),
}


def _specs(tensors: Mapping[str, Tensor]) -> dict[str, Spec]:
    return {name: spec(tensor) for name, tensor in tensors.items()}
