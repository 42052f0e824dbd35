"""Members that flap, idle, or send what no gradient can be."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from thinwire.watch.findings import Finding, Kind
from thinwire.watch.words import Told


@dataclass(frozen=True)
class Bounds:
    """Where conduct becomes a finding.

    leaves     how often a member has to leave among the words kept to be flapping
    idle       successive words without a step, or without being counted
    too_large  times the running median of norms
    least      norms that the running median is of, at least
    """

    leaves: int = 3
    idle: int = 5
    too_large: float = 10.0
    least: int = 3


def flapping(past: Sequence[Told], bounds: Bounds) -> list[Finding]:
    """Members, here or away, that left several times; a member that left once and came back is none."""
    found = []
    for name in sorted({name for told in past for name in told}):
        here = [name in told for told in past]
        left = sum(before and not after for before, after in pairwise(here))
        if left >= bounds.leaves:
            told = {"left": float(left), "calls": float(len(past))}
            found.append(Finding(Kind.FLAPPING, (name,), f"left {left} times in {len(past)} calls", told))
    return found


def idle(past: Sequence[Told], bounds: Bounds) -> list[Finding]:
    """Members that are here and do nothing, or do it in vain."""
    found = []
    recent = past[-bounds.idle :]
    if len(recent) < bounds.idle:
        return []
    for name in sorted(recent[-1]):
        words = [told[name] for told in recent if name in told]
        if len(words) < bounds.idle:
            continue
        told = {"calls": float(bounds.idle)}
        if not any(word.steps for word in words):
            found.append(Finding(Kind.IDLE, (name,), f"made no step for {bounds.idle} calls", told))
        elif not any(word.counted for word in words):
            because = f"makes steps and was not counted in any round for {bounds.idle} calls"
            found.append(Finding(Kind.IDLE, (name,), because, told))
    return found


def damage(past: Sequence[Told], bounds: Bounds) -> list[Finding]:
    """Contributions that are not finite, or far larger than the running median and than the others' of this round.

    The others' count as well because norms of all may grow at once: when a learning rate does.
    """
    now = past[-1] if past else {}
    before = [word.norm for told in past[:-1] for word in told.values() if word.norm is not None]
    found = []
    for name, word in sorted(now.items()):
        if not word.finite:
            found.append(Finding(Kind.NOT_FINITE, (name,), "contributed values that are not finite", {}))
        elif word.norm is not None and len(before) >= bounds.least:
            others = [each.norm for other, each in now.items() if other != name and each.norm is not None]
            usual = max(statistics.median(before), statistics.median(others) if others else 0.0)
            if usual > 0 and word.norm > bounds.too_large * usual:
                told = {"norm": word.norm, "usual": usual}
                because = f"contributed a vector of norm {word.norm:.3g}, {word.norm / usual:.0f} times the usual"
                found.append(Finding(Kind.TOO_LARGE, (name,), because, told))
    return found
