"""From what all members told to what is wrong: one pure function."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from thinwire.watch.conduct import Bounds, damage, flapping, idle
from thinwire.watch.findings import Finding, Kind
from thinwire.watch.slowness import Limits, matrix_of, series, slow_beside_peers, slow_lines, slowed_down
from thinwire.watch.words import Told


@dataclass(frozen=True)
class Settings:
    """What is found when.

    window  calls whose words are kept, and findings follow from
    """

    limits: Limits = field(default_factory=Limits)
    bounds: Bounds = field(default_factory=Bounds)
    window: int = 64


def judge(past: Sequence[Told], settings: Settings) -> list[Finding]:
    """What is wrong after the last of these calls.

    past  what all told at the last calls, oldest first; only `window` of them are looked at
    """
    past = past[-settings.window :]
    if not past:
        return []
    limits, bounds = settings.limits, settings.bounds
    steps = series(past, "step_s")
    noise = statistics.median(word.noise for word in past[-1].values()) if past[-1] else 0.0
    slow = slow_beside_peers(steps, Kind.SLOW_COMPUTE, "a local step", limits)
    slow += [found for each in steps if (found := slowed_down(each, limits)) is not None]
    late = {name for each in slow for name in each.who}
    return [
        *(found for found in slow_lines(matrix_of(past[-1]), noise, limits) if not _explained(found, late)),
        *slow,
        *slow_beside_peers(series(past, "encode_s"), Kind.SLOW_ENCODING, "encoding a packet", limits),
        *flapping(past, bounds),
        *idle(past, bounds),
        *damage(past, bounds),
    ]


def _explained(found: Finding, late: set[str]) -> bool:
    """A member whose compute is slow comes late to every exchange, and looks like a slow sender: say one thing."""
    return found.kind is Kind.SLOW_SENDER and found.who[0] in late


def since(found: Iterable[Finding], before: Iterable[Finding], call: int) -> tuple[Finding, ...]:
    """The findings of a call with the call at which each began, given those of the call before."""
    began = {each.key: each.since for each in before}
    return tuple(replace(each, since=began.get(each.key, call)) for each in found)
