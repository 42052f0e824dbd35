"""What is kept of a run: enough to draw its report, to compare it with others, and to run it again.

A record is a value. `to_json` and `from_json` are each other's inverse; unknown keys, missing keys and values of
another type are refused with the place they stand at. Numbers that are not finite are written as the strings "nan",
"inf" and "-inf", so that the file is JSON in the strict sense.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from thinwire.errors import ConfigError

#: Version of the file; another one is refused.
FORMAT = 1
#: The six answers of a method, in the order of a round.
ANSWERS: Mapping[str, str] = {
    "schedule": "when?",
    "payload": "what?",
    "codec": "how?",
    "topology": "to whom?",
    "aggregator": "merged how?",
    "outer": "and then?",
}

_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True)
class Member:
    """One member's share of the work. Durations add up to its time on the run's clock, but for `hidden_s`.

    rank            who
    samples         examples trained on
    tokens          tokens trained on; 0 where the work has none
    sent_bytes      handed to the link
    received_bytes  taken from the link
    compute_s       forward, backward and optimizer
    encode_s        encoding and decoding
    wait_s          waiting for the link and for other members
    apply_s         combining, outer step and writing back
    hidden_s        communication that ran beside the compute: it cost no time, and is part of none of the above
    rounds          rounds it committed
    """

    rank: int
    samples: int
    tokens: int
    sent_bytes: int
    received_bytes: int
    compute_s: float
    encode_s: float
    wait_s: float
    apply_s: float
    hidden_s: float
    rounds: int


@dataclass(frozen=True)
class Point:
    """A moment of a run.

    step        local steps made by each member
    seconds     on the run's clock, from its start
    sent_bytes  by a member up to now: the mean over members, rounded
    train_loss  on the batches since the last point
    valid_loss  None where nothing was evaluated
    accuracy    in [0, 1]; None where nothing was evaluated or the task has none
    """

    step: int
    seconds: float
    sent_bytes: int
    train_loss: float
    valid_loss: float | None = None
    accuracy: float | None = None


@dataclass(frozen=True)
class Event:
    """Something worth telling: a skipped round, an update that was not finite, a long wait.

    kind  one or two words, the same for all events of its sort
    text  a sentence
    """

    step: int
    seconds: float
    kind: str
    text: str


@dataclass(frozen=True)
class RunRecord:
    """A run.

    label             what a person calls it
    method            the six answers (`ANSWERS`) -> how they were given
    config            the configuration, TOML
    versions          library -> version
    machine           processors, memory, accelerator, in words
    clock             whose seconds these are
    network           "20 Mbit/s up and down, 40 ms"
    seed              of weights, data and codecs
    parameters        entries of the model
    members           who took part
    curve             by ascending step
    bytes_by_purpose  purpose -> (sent, received), summed over members
    rounds_committed  rounds that ended in a new anchor
    rounds_skipped    rounds that left every member as it was
    events            by ascending step
    final             the last evaluation: name -> value
    digest            of the final weights, hexadecimal
    """

    label: str
    method: Mapping[str, str]
    config: str
    versions: Mapping[str, str]
    machine: str
    clock: Literal["simulated", "wall"]
    network: str
    seed: int
    parameters: int
    members: tuple[Member, ...]
    curve: tuple[Point, ...]
    bytes_by_purpose: Mapping[str, tuple[int, int]]
    rounds_committed: int
    rounds_skipped: int
    events: tuple[Event, ...] = ()
    final: Mapping[str, float] = field(default_factory=dict)
    digest: str = ""

    def __post_init__(self) -> None:
        surplus = [name for name in self.method if name not in ANSWERS]
        if surplus:
            raise ConfigError(
                f"run {self.label!r}: a method with the answers {', '.join(map(repr, surplus))}",
                expected=f"answers among {', '.join(ANSWERS)}",
                mend="put other settings into `config`",
            )
        if self.clock not in ("simulated", "wall"):
            raise ConfigError(
                f"run {self.label!r}: clock {self.clock!r}",
                expected="'simulated' or 'wall'",
                mend="say whose seconds the record holds: those of a simulated network, or real ones",
            )

    @property
    def seconds(self) -> float:
        """Duration, on the run's clock; 0 where nothing was recorded."""
        return self.curve[-1].seconds if self.curve else 0.0

    @property
    def steps(self) -> int:
        """Local steps made by each member."""
        return self.curve[-1].step if self.curve else 0

    @property
    def sent_bytes(self) -> int:
        """What a member sent: the mean over members, rounded."""
        return round(sum(member.sent_bytes for member in self.members) / max(1, len(self.members)))

    @property
    def exposed_s(self) -> float:
        """How long a member stood still for rounds, for the link or for its own coding: the mean over members."""
        return sum(member.wait_s + member.encode_s for member in self.members) / max(1, len(self.members))

    @property
    def hidden_s(self) -> float:
        """How long rounds of a member ran beside its compute: the mean over members."""
        return sum(member.hidden_s for member in self.members) / max(1, len(self.members))

    def to_json(self) -> str:
        """The record as JSON text, ended by a newline."""
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        return json.dumps(_strict(content), allow_nan=False, ensure_ascii=False, indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> RunRecord:
        """The record that `to_json` wrote.

        raises  ConfigError naming the place, for anything else
        """
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise _refused(f"no JSON (line {error.lineno}, column {error.colno}: {error.msg})", "JSON") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else None
            raise _refused(f"format {found!r}", f"format {FORMAT}")
        del content["format"]
        record = _read(RunRecord, content, "record")
        assert isinstance(record, RunRecord)
        return record


def _strict(value: object) -> object:
    """The same value without numbers that JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _read(hint: Any, value: object, where: str) -> object:
    """A JSON value as the type that a field's annotation asks for."""
    origin, arguments = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _read_dataclass(hint, value, where)
    if origin is types.UnionType:  # only "X | None" occurs
        return None if value is None else _read(arguments[0], value, where)
    if origin is Mapping and isinstance(value, dict):
        return {key: _read(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is tuple and isinstance(value, list):
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) == len(value):
            return tuple(_read(kind, value[i], f"{where}[{i}]") for i, kind in enumerate(kinds))
    if hint is float:
        if isinstance(value, str) and value in _NOT_FINITE:
            return _NOT_FINITE[value]
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    if hint in (int, str) and type(value) is hint:  # not isinstance: True is an int
        return value
    if origin is Literal and value in arguments:
        return value
    raise _refused(f"{where} is {_shown(value)}", _named(hint))


def _read_dataclass(kind: Any, value: object, where: str) -> object:
    if not isinstance(value, dict):
        raise _refused(f"{where} is {_shown(value)}", "an object")
    hints = get_type_hints(kind)
    unknown, missing = sorted(value.keys() - hints.keys()), sorted(hints.keys() - value.keys())
    if unknown or missing:
        told = [f"unknown key {name!r}" for name in unknown] + [f"no key {name!r}" for name in missing]
        raise _refused(f"{where} has {', '.join(told)}", f"the keys {', '.join(hints)}")
    return kind(**{name: _read(hint, value[name], f"{where}.{name}") for name, hint in hints.items()})


def _refused(wrong: str, expected: str) -> ConfigError:
    return ConfigError(
        f"run record: {wrong}",
        expected=expected,
        mend="read it with the version of thinwire that wrote it, or run again",
    )


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:39] + "…"


def _named(hint: Any) -> str:
    words = {float: "a number", int: "a whole number", str: "a string"}
    return words.get(hint, str(hint).replace("collections.abc.", ""))
