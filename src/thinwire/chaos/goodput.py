"""What a run under faults came to, by its members' logs: useful work a second, the cost of faults, whether all agree.

    goodput = units committed / (seconds * usual rate)      usual rate: units / s of the rounds that no fault touched,
                                                            or of another run without faults

A round counts from the first moment that a member logged it. The members' clocks are one clock in the lab.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from thinwire.chaos.schedule import Fault
from thinwire.elastic.proof import prove
from thinwire.errors import ConfigError

Logs = Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Happened:
    """A fault as it was done: when it began and was undone, in unix seconds; None: by the end."""

    fault: Fault
    at: float
    undone_at: float | None = None


@dataclass(frozen=True)
class Cost:
    """What a fault cost.

    detected_s   until members met without somebody; None: nobody was missed
    recovered_s  until the first round after it was done; None: there was none
    downtime_s   of the time until then, what is more than a usual round takes
    lost_rounds  usual rounds in the downtime
    """

    fault: str
    at_s: float
    detected_s: float | None
    recovered_s: float | None
    downtime_s: float
    lost_rounds: float


@dataclass(frozen=True)
class Goodput:
    """The report.

    seconds      from the first round to the last one, or to the end of the watch if none came for long
    usual        units a second where nothing was wrong; 0: not known
    share        of what a run at the usual rate would have done
    void         rounds that were committed, lost with all who knew of them, and done again
    disagreeing  rounds after which members did not hold the same state
    wrong        sentences about units that were done twice, or not at all
    curve        step -> loss, by the members' training losses
    """

    rounds: int
    units: int
    seconds: float
    usual: float
    share: float
    usual_round_s: float
    void: int
    costs: tuple[Cost, ...]
    disagreeing: tuple[str, ...]
    wrong: tuple[str, ...]
    curve: tuple[tuple[int, float], ...]
    evaluated: tuple[tuple[int, float], ...]

    @property
    def fine(self) -> bool:
        """Whether all members agreed after every round, and each unit was counted at most once."""
        return not self.disagreeing and not self.wrong

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"fine": self.fine}


@dataclass(frozen=True)
class _Round:
    at: float
    step: int
    units: int
    loss: float | None


def measure(logs: Logs, happened: Sequence[Happened], *, until: float | None = None, usual: float = 0.0) -> Goodput:
    """The report on a run.

    logs      of all members, by name
    happened  the faults, in order of time
    until     when the watch ended, unix seconds; None: with the last round
    usual     units a second of a run without faults; 0: of this run's rounds outside of faults
    raises    ConfigError if no round was committed
    """
    proof = prove(logs)
    rounds = _rounds(logs)
    gaps = [(before, after) for before, after in pairwise(rounds) if after.at > before.at]
    quiet = [(before, after) for before, after in gaps if not _touched(before.at, after.at, happened, rounds)]
    usual_round_s = statistics.median([after.at - before.at for before, after in quiet or gaps] or [0.0])
    if not usual and quiet:
        usual = sum(after.units for _, after in quiet) / sum(after.at - before.at for before, after in quiet)
    last = rounds[-1].at
    end = last if until is None or until - last <= 2 * usual_round_s else until
    seconds, units = end - rounds[0].at, sum(each.units for each in rounds[1:])
    return Goodput(
        proof.rounds, sum(each.units for each in rounds), seconds, usual,
        units / (seconds * usual) if seconds > 0 and usual else 0.0, usual_round_s, proof.void,
        tuple(_cost(each, logs, rounds, usual_round_s, end) for each in happened),
        _disagreeing(logs), tuple(proof.wrong),
        tuple((each.step, each.loss) for each in rounds if each.loss is not None), _evaluated(logs),
    )  # fmt: skip


def rate(logs: Logs) -> float:
    """Units a second of a run, from its first round to its last one."""
    rounds = _rounds(logs)
    seconds = rounds[-1].at - rounds[0].at
    return sum(each.units for each in rounds[1:]) / seconds if seconds > 0 else 0.0


def _rounds(logs: Logs) -> list[_Round]:
    """In order of time, each once: a round is known by its link of the chain."""
    first: dict[str, Mapping[str, Any]] = {}
    for line in _lines(logs, "round"):
        known = first.get(line["chain"])
        if known is None or line["at"] < known["at"]:
            first[line["chain"]] = line
    if not first:
        raise ConfigError(
            "no member's log has a round in it",
            expected="a run that has committed one",
            mend="look into the hosts' logs for what kept it from one",
        )
    lines = sorted(first.values(), key=lambda line: (line["at"], line["commits"]))
    return [
        _Round(
            line["at"], line["step"], sum(count for runs in line["units"].values() for _, count in runs), line["loss"]
        )
        for line in lines
    ]


def _lines(logs: Logs, event: str) -> list[Mapping[str, Any]]:
    return [line for lines in logs.values() for line in lines if line["event"] == event]


def _touched(before: float, after: float, happened: Sequence[Happened], rounds: Sequence[_Round]) -> bool:
    """Whether a fault lasted into a time between two rounds, or came to an end in it, or in the round before."""
    for each in happened:
        ended = each.undone_at if each.undone_at is not None else each.at
        recovered = _first_after(ended, rounds)
        if each.at < after and (recovered is None or before < recovered):
            return True
    return False


def _first_after(at: float, rounds: Sequence[_Round]) -> float | None:
    return next((each.at for each in rounds if each.at > at), None)


def _cost(each: Happened, logs: Logs, rounds: Sequence[_Round], usual_round_s: float, end: float) -> Cost:
    """Counted until the next fault of its own effect is over: the longest pause of rounds that the fault lay in."""
    left = [line["at"] for line in _lines(logs, "met") if line["left"] and line["at"] >= each.at]
    horizon = (each.undone_at or each.at) + max(60.0, 3 * usual_round_s)
    detected = min((at for at in left if at <= horizon), default=None)
    after = _first_after(each.at, rounds)
    before = max((found.at for found in rounds if found.at <= each.at), default=rounds[0].at)
    if detected is not None and after is not None and after < detected:  # a round ended before it was felt
        before, after = max(found.at for found in rounds if found.at <= detected), _first_after(detected, rounds)
    pause = max(0.0, (end if after is None else after) - before - usual_round_s)
    return Cost(
        str(each.fault), each.at - rounds[0].at, None if detected is None else detected - each.at,
        None if after is None else after - each.at, pause, pause / usual_round_s if usual_round_s else 0.0,
    )  # fmt: skip


def _disagreeing(logs: Logs) -> tuple[str, ...]:
    """Rounds whose digest of the common state is not the same in all logs."""
    found: dict[str, dict[str, list[str]]] = {}
    number: dict[str, Any] = {}
    for name, lines in sorted(logs.items()):
        for line in lines:
            if line["event"] == "round":
                found.setdefault(line["chain"], {}).setdefault(line["digest"], []).append(name)
                number[line["chain"]] = line["commits"]
    return tuple(
        f"round {number[chain]}: " + " | ".join(", ".join(names) for names in by.values())
        for chain, by in found.items()
        if len(by) > 1
    )


def _evaluated(logs: Logs) -> tuple[tuple[int, float], ...]:
    lines = sorted(_lines(logs, "evaluated"), key=lambda line: (line["step"], line["at"]))
    return tuple({line["step"]: float(line["loss"]) for line in lines if line.get("loss") is not None}.items())


def table(found: Goodput, beside: Goodput | None = None) -> str:
    """For a reader."""
    lines = [
        f"{found.rounds} rounds, {found.units} units in {found.seconds:.0f} s; {found.usual_round_s:.2f} s a round.",
        f"Goodput: {100 * found.share:.1f} % of {found.usual:.2f} units a second, the rate "
        + ("of the run beside." if beside else "between faults."),
        f"Rounds lost with all who knew of them and done again: {found.void}.",
        "",
        f"{'fault':<42} {'detected':>9} {'recovered':>9} {'downtime':>9} {'rounds':>7}",
    ]
    for each in found.costs:
        times = (f"{value:.1f} s" if value is not None else "-" for value in (each.detected_s, each.recovered_s))
        lines.append(
            f"{each.fault:<42} {next(times):>9} {next(times):>9} {each.downtime_s:7.1f} s {each.lost_rounds:7.1f}"
        )
    lines.append("")
    lines += [f"DIVERGED  {each}" for each in found.disagreeing] or [
        "All members held the same state after every round."
    ]
    lines += [f"LEDGER    {each}" for each in found.wrong] or ["Each unit was counted at most once."]
    if beside is not None:
        lines += ["", f"{'step':>8} {'loss':>9} {'beside':>9}"]
        other = dict(beside.evaluated or beside.curve)
        pairs = [(step, loss, other[step]) for step, loss in found.evaluated or found.curve if step in other]
        chosen = pairs[:: max(1, len(pairs) // 10)]
        lines += [f"{step:>8} {loss:>9.4f} {beside_:>9.4f}" for step, loss, beside_ in chosen]
        if not pairs:
            lines.append("The two runs have no step in common at which a loss is known.")
    return "\n".join(lines) + "\n"
