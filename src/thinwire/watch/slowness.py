"""Who is slow: a sender, a receiver, a line between two, or the compute of a member.

    M_ij = median over the last 20 messages from i to j of log(seconds / byte), told by j
    z_ij = (M_ij - median M) / max(0.02, 1.4826 MAD of M, noise of a median)
    row i over 4: a slow sender;  column j over 4: a slow receiver;  a cell over 6 in none of these: a slow line

A row (column) is judged by the lower median of its cells, so that among three members one slow sender does not make
half a slow receiver; so are the median of M and its MAD, for one of four that is slow both ways. Of three members one
that is slow both ways is not told from a fast line between the others, and not found. What is found is slower than
usual by a fifth at least: a difference may be sure and not matter.

Seconds count from when the receiver was ready until the message was there. A sender that comes late because its compute
is slow looks like a slow sender: its own step time says which it is.

Source   C4, arXiv:2406.04594: the matrix and its rows, columns and cells. CUSUM: Page 1954.
Differs  the noise that members measure of their own medians is a floor of the scale: with three members the spread of
         six cells alone says little.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from thinwire.watch.findings import Finding, Kind
from thinwire.watch.words import Told

_SPREAD_TO_SD = 1.4826  # of a median absolute deviation, where values are normal

#: (from, to) -> median log(seconds / byte).
Matrix = Mapping[tuple[str, str], float]


@dataclass(frozen=True)
class Limits:
    """When slow is slow.

    node_z, link_z  robust z of a row or column, of a cell
    least_factor    times the usual, below which nothing is found however sure it is
    least_scale     of the logarithms: what members differ by, faults apart
    slack, alarm    k and h of the CUSUM, in standard deviations
    recent          words of a member whose median is compared with others'
    """

    node_z: float = 4.0
    link_z: float = 6.0
    least_factor: float = 1.2
    least_scale: float = 0.02
    slack: float = 0.5
    alarm: float = 5.0
    recent: int = 8


def matrix_of(told: Told) -> dict[tuple[str, str], float]:
    """All that members measured of each other; members that left are not in it."""
    return {
        (sender, receiver): pace
        for receiver, word in sorted(told.items())
        for sender, pace in sorted(word.paces.items())
        if sender in told and sender != receiver
    }


def slow_lines(matrix: Matrix, noise: float, limits: Limits) -> list[Finding]:
    """Senders, receivers and lines that are slow. Cells nobody measured are left out."""
    if len(matrix) < 3:  # of two cells both are as far from their median
        return []
    usual, scale = _usual(matrix.values(), [limits.least_scale, noise], statistics.median_low)
    least = math.log(limits.least_factor)
    found, explained = [], set()
    for end, kind in ((0, Kind.SLOW_SENDER), (1, Kind.SLOW_RECEIVER)):
        for name in sorted({cell[end] for cell in matrix}):
            cells = [cell for cell in matrix if cell[end] == name]
            over = statistics.median_low(matrix[cell] for cell in cells) - usual
            if over / scale > limits.node_z and over > least:
                found.append(_slow_node(kind, name, over, over / scale, len(cells)))
                explained.update(cells)
    for cell in sorted(matrix.keys() - explained):
        over = matrix[cell] - usual
        if over / scale > limits.link_z and over > least:
            told = {"factor": math.exp(over), "z": over / scale}
            found.append(Finding(Kind.SLOW_LINK, cell, f"takes {_times(over)} the usual time for a byte", told))
    return found


def _slow_node(kind: Kind, name: str, over: float, z: float, cells: int) -> Finding:
    does = "sends to" if kind is Kind.SLOW_SENDER else "receives from"
    told = {"factor": math.exp(over), "z": z, "peers": float(cells)}
    return Finding(kind, (name,), f"{does} its {cells} peers at {_times(over)} the usual time for a byte", told)


@dataclass(frozen=True)
class Series:
    """A member's seconds of something, one a word, the last one last."""

    name: str
    logs: Sequence[float] = field(default_factory=tuple)


def series(past: Sequence[Told], what: str) -> list[Series]:
    """`step_s` or `encode_s` of all who told it in the last word, from their words so far."""
    now = past[-1] if past else {}
    found = []
    for name in sorted(now):
        seconds = [getattr(told[name], what) for told in past if name in told]
        if seconds and seconds[-1]:
            found.append(Series(name, [math.log(each) for each in seconds if each]))
    return found


def slow_beside_peers(all_series: Sequence[Series], kind: Kind, what: str, limits: Limits) -> list[Finding]:
    """Members whose recent median is far over the others'. Of two members nobody can say which is the slow one.

    Who told less than half of `recent` is not judged yet: how far its words are from each other is not known.
    """
    recent = {each.name: each.logs[-limits.recent :] for each in all_series if len(each.logs) >= limits.recent // 2}
    if len(recent) < 3:
        return []
    medians = {name: statistics.median(logs) for name, logs in recent.items()}
    usual, scale = _usual(medians.values(), [limits.least_scale, _noise(recent.values())])
    found = []
    for name, median in medians.items():
        over = median - usual
        if over / scale > limits.node_z and over > math.log(limits.least_factor):
            told = {"factor": math.exp(over), "z": over / scale, "seconds": math.exp(median)}
            because = f"takes {math.exp(median):.3g} s for {what}, {_times(over)} the usual"
            found.append(Finding(kind, (name,), because, told))
    return found


def slowed_down(each: Series, limits: Limits) -> Finding | None:
    """Whether a member became slower than it was: a CUSUM of the newer half of its words, on the older half.

    S = max(0, S + (log t - median) / scale - k), found where S > h now and the median since S left 0 is over the
    older one by `least_factor`, and by 4 standard deviations of the difference of two such medians: in much noise a
    CUSUM of few words rises by chance
    """
    half = len(each.logs) // 2
    before, after = each.logs[:half], each.logs[half:]
    if half < 8:  # too few to know what was usual
        return None
    usual, scale = _usual(before, [limits.least_scale])
    total, since = 0.0, 0
    for place, log in enumerate(after):
        total = max(0.0, total + (log - usual) / scale - limits.slack)
        since = place + 1 if total == 0 else since
    if total <= limits.alarm:
        return None
    over = statistics.median_low(after[since:]) - usual
    noise = math.sqrt(math.pi / 2) * scale * math.sqrt(1 / len(after[since:]) + 1 / half)
    if over <= max(math.log(limits.least_factor), limits.node_z * noise):
        return None
    told = {"factor": math.exp(over), "cusum": total, "seconds": math.exp(usual + over), "words": float(half)}
    because = f"takes {math.exp(usual + over):.3g} s for a local step, {_times(over)} its own usual"
    return Finding(Kind.SLOWED_DOWN, (each.name,), because, told)


def _usual(
    values: Iterable[float], floors: Iterable[float], median: Callable[[Iterable[float]], float] = statistics.median
) -> tuple[float, float]:
    """Median, and a robust scale that is not under any of the floors."""
    known = list(values)
    middle = median(known)
    spread = median(abs(value - middle) for value in known)
    return middle, max(_SPREAD_TO_SD * spread, *floors)


def _noise(recent: Iterable[Sequence[float]]) -> float:
    """Standard deviation of these members' medians, from how far their single values are from them."""
    many = [logs for logs in recent if len(logs) > 1]
    if not many:
        return 0.0
    apart = [abs(log - statistics.median(logs)) for logs in many for log in logs]
    count = statistics.median(len(logs) for logs in many)
    return math.sqrt(math.pi / 2) * _SPREAD_TO_SD * statistics.median(apart) / math.sqrt(count)


def _times(over: float) -> str:
    return f"{math.exp(over):.1f} times"
