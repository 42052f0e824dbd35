"""Proof from the members' logs that every sample was counted once, whatever came and went.

Each `round` line says which units became done, and how the chain went on: chain = digest(chain before, units). From the
last round any member saw, the chain leads back to the first one, link by link; each link is computed again, so what is
on it is what the members committed. Rounds beside it were committed and lost, with all who knew of them: a run that
went on from a checkpoint did them again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from thinwire.elastic.ledger import Runs, each, gaps, link_of, size, united
from thinwire.errors import ConfigError, StateMismatch


@dataclass(frozen=True)
class Proof:
    """What logs say of a run's units.

    rounds   committed rounds on the chain
    void     rounds beside it, which were done again
    by       units of finished epochs by member
    beyond   units done of the epoch under way
    wrong    sentences; none: every unit of every finished epoch was done exactly once
    """

    rounds: int
    void: int
    epochs: int
    units_per_epoch: int
    by: Mapping[str, int]
    beyond: int
    wrong: Sequence[str] = field(default_factory=tuple)


def prove(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Proof:
    """Read the logs of all members, by name.

    raises  ConfigError if no member has logged a round
    """
    lines: dict[str, Mapping[str, Any]] = {}
    wrong: list[str] = []
    for name in sorted(logs):
        for line in logs[name]:
            if line["event"] != "round":
                continue
            known = lines.setdefault(line["chain"], line)
            if known["units"] != line["units"]:
                wrong.append(f"round {line['commits']}: {name} has other units in it than another member")
    if not lines:
        raise ConfigError(
            "no member's log has a round in it",
            expected="a run that has committed one",
            mend="wait for its first round, or look into the logs for what kept it from one",
        )
    last = max(lines.values(), key=lambda line: (line["commits"], line["at"]))
    path, more = _back(last, lines)
    wrong += more
    done, more = _add_up(path)
    wrong += more
    epochs, length = last["epochs"], last["units_per_epoch"]
    end = epochs * length
    whole = sorted(run for runs in done.values() for run in runs)
    try:
        missing = list(gaps(united(tuple(whole)), end))
    except StateMismatch:  # said already
        missing = []
    wrong += [f"{_named(first, count)} of epoch {first // length} in no round" for first, count in missing]
    by = {name: size(_below(runs, end)) for name, runs in done.items()}
    beyond = size(whole) - sum(by.values())
    return Proof(len(path), len(lines) - len(path), epochs, length, by, beyond, tuple(wrong))


def _back(last: Mapping[str, Any], lines: Mapping[str, Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[str]]:
    """The rounds from the first to the last one, and what is wrong with the chain."""
    path, wrong = [last], []
    while path[-1]["before"]:
        line = path[-1]
        if line["before"] not in lines:
            wrong.append(f"round {line['commits'] - 1} and those before it are in no log: whose log is not here?")
            break
        path.append(lines[line["before"]])
    for line in path:
        if link_of(line["before"], _units(line)) != line["chain"]:
            wrong.append(f"round {line['commits']}: its units are not those that the members committed")
    return path[::-1], wrong


def _add_up(path: Sequence[Mapping[str, Any]]) -> tuple[dict[str, list[tuple[int, int]]], list[str]]:
    """Runs of units by member, and units done twice."""
    done: dict[str, list[tuple[int, int]]] = {}
    seen: dict[int, str] = {}
    wrong = []
    for line in path:
        for name, runs in _units(line).items():
            done.setdefault(name, []).extend(runs)
            for unit in each(runs):
                if unit in seen:
                    wrong.append(f"unit {unit} twice: by {seen[unit]}, and by {name} in round {line['commits']}")
                seen[unit] = name
    return done, wrong


def _units(line: Mapping[str, Any]) -> dict[str, Runs]:
    return {name: tuple((first, count) for first, count in runs) for name, runs in line["units"].items()}


def _below(runs: Sequence[tuple[int, int]], end: int) -> list[tuple[int, int]]:
    return [(first, min(count, end - first)) for first, count in runs if first < end]


def _named(first: int, count: int) -> str:
    return f"unit {first}" if count == 1 else f"units {first} to {first + count - 1}"
