"""What the plots show: losses over time and over bytes, and where the time went. How they become SVG: svg.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from thinwire.report import svg
from thinwire.report.compare import common_loss, final_loss
from thinwire.report.markup import Html
from thinwire.report.record import Member, Point, RunRecord
from thinwire.report.words import one_line, seconds_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Where a member's time goes, in the order of the bars: (words, attribute of Member).
PARTS = (("compute", "compute_s"), ("encode", "encode_s"), ("wait", "wait_s"), ("apply", "apply_s"))

_MARKS = "os^Dv*"
_GLYPHS = ("●■▲◆▼★", "○□△◇▽☆")  # the same marks as letters; hollow ones for the second half
_MOST_POINTS = 500  # of one curve: more would not be seen, and would be most of the page's bytes
_MOST_BARS = 16
_LOG_FROM = 20  # runs whose bytes or durations differ by this factor cannot share a linear axis


@dataclass(frozen=True)
class Curve:
    """One line of a plot: x ascending, y with gaps where not finite. `index` picks its looks."""

    index: int
    x: tuple[float, ...]
    y: tuple[float, ...]
    faint: bool = False


def _as_drawn(curves: Sequence[Curve]) -> tuple[float | None, float | None]:
    return None, None


@dataclass(frozen=True)
class Upward:
    """The vertical axis: its words, a level to draw across, and the limits to show of some curves (None: all)."""

    label: str
    level: float | None = None
    limits: Callable[[Sequence[Curve]], tuple[float | None, float | None]] = _as_drawn


def glyph(index: int) -> str:
    """The mark of curve `index`, for a legend in words."""
    return _GLYPHS[index // svg.CURVES % 2][index % svg.CURVES]


def loss_against_time(records: Sequence[RunRecord]) -> Html | None:
    """Losses over seconds on the runs' clock, logarithmic where they differ widely; None if no loss is finite."""
    return _against_time("loss-time", _loss_curves(records, lambda point: point.seconds), _losses(records))


def loss_against_bytes(records: Sequence[RunRecord]) -> Html | None:
    """Losses over what a member sent; a logarithmic axis where the runs differ widely. None if nothing was sent."""
    curves = [curve for curve in _loss_curves(records, lambda point: point.sent_bytes) if curve.x[-1] > 0]
    log = _wide(curves)
    scale, unit = (1e6, "MB") if log else _bytes_unit(max((curve.x[-1] for curve in curves), default=0.0))
    return _plot("loss-bytes", _scaled(curves, scale), f"sent by a member ({unit})", _losses(records), log=log)


def accuracy_against_time(records: Sequence[RunRecord]) -> Html | None:
    """Accuracies over seconds on the runs' clock; None if there are none."""
    curves = _curves(records, lambda point: point.seconds, lambda point: point.accuracy)
    percent = [Curve(curve.index, curve.x, tuple(100 * y for y in curve.y)) for curve in curves]
    return _against_time("accuracy-time", percent, Upward("accuracy (%)"))


def time_bars(records: Sequence[RunRecord]) -> Html | None:
    """Where the time went: a bar for each member of one run, or for the mean member of each of several.

    Communication hidden behind the compute is a thin bar underneath, for it cost no time. None if no time was recorded.
    """
    bars = _bars(records)
    lengths = [length for _, parts, hidden in bars for length in (sum(parts), hidden) if math.isfinite(length)]
    longest = max(lengths, default=0.0)
    if longest <= 0:
        return None
    scale, unit = _time_unit(longest)
    names = {f"(bar {i})": f"{one_line(name, limit=40)}: {seconds_text(sum(p))}" for i, (name, p, _) in enumerate(bars)}

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for i, (_, parts, hidden) in enumerate(bars):
            start = 0.0
            for colour, seconds in zip(svg.PART, parts, strict=False):
                axes.barh(i, seconds / scale, left=start / scale, height=0.34, color=colour)
                start += seconds
            axes.barh(i + 0.25, hidden / scale, height=0.1, color=svg.PART[-1])
            axes.text(0, i - 0.25, f"(bar {i})", va="bottom", fontsize=12)
        axes.set_ylim(len(bars) - 0.5, -0.65)
        axes.set_xlim(0, longest / scale * 1.02)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(f"time ({unit})")

    return svg.drawn("time-bars", 60 + 50 * len(bars), draw, label="where the time went", words=names)


def _bars(records: Sequence[RunRecord]) -> list[tuple[str, list[float], float]]:
    """(name, seconds of each part, hidden seconds)"""
    if len(records) > 1:
        return [(record.label, *_mean_times(record.members)) for record in records]
    members = [member for record in records for member in record.members]
    if len(members) > _MOST_BARS:
        return [(f"mean of {len(members)} members", *_mean_times(members))]
    return [(f"member {member.rank}", *_mean_times([member])) for member in members]


def _mean_times(members: Sequence[Member]) -> tuple[list[float], float]:
    count = max(1, len(members))
    parts = [sum(getattr(member, name) for member in members) / count for _, name in PARTS]
    return parts, sum(member.hidden_s for member in members) / count


def _loss_curves(records: Sequence[RunRecord], x: Callable[[Point], float]) -> list[Curve]:
    """Validation losses; the training loss of runs without, and, faintly, of a run that is alone."""
    validated = _curves(records, x, lambda point: point.valid_loss)
    training = _curves(records, x, lambda point: point.train_loss)
    if len(records) == 1 and validated:
        return [Curve(c.index, c.x, c.y, faint=True) for c in training] + validated
    seen = {curve.index for curve in validated}
    return sorted(validated + [c for c in training if c.index not in seen], key=lambda curve: curve.index)


def _curves(
    records: Sequence[RunRecord], x: Callable[[Point], float], y: Callable[[Point], float | None]
) -> list[Curve]:
    """A curve for each run that has a finite value."""
    curves = []
    for index, record in enumerate(records):
        pairs = [(x(point), value) for point in record.curve if (value := y(point)) is not None]
        pairs = [(a, b if math.isfinite(b) else math.nan) for a, b in pairs if math.isfinite(a)]
        if any(math.isfinite(b) for _, b in pairs):
            stride = max(1, math.ceil(len(pairs) / _MOST_POINTS))
            kept = pairs[::stride] + ([pairs[-1]] if (len(pairs) - 1) % stride else [])
            curves.append(Curve(index, tuple(a for a, _ in kept), tuple(b for _, b in kept)))
    return curves


def _wide(curves: Sequence[Curve]) -> bool:
    """Whether the runs' extents differ so much that only a logarithmic axis shows them all."""
    ends = [curve.x[-1] for curve in curves if curve.x[-1] > 0]
    return bool(ends) and max(ends) / min(ends) > _LOG_FROM


def _scaled(curves: Sequence[Curve], scale: float) -> list[Curve]:
    return [Curve(c.index, tuple(x / scale for x in c.x), c.y, c.faint) for c in curves]


def _losses(records: Sequence[RunRecord]) -> Upward:
    """The axis of losses; in a comparison with the loss that every run reached drawn across."""
    if len(records) == 1:
        return Upward("loss", limits=_without_peaks)
    validated = all(point is not None for point in map(final_loss, records))
    return Upward("validation loss" if validated else "loss", level=common_loss(records), limits=_without_peaks)


def _time_unit(seconds: float) -> tuple[float, str]:
    return (1.0, "s") if seconds < 600 else (60.0, "min") if seconds < 3 * 3600 else (3600.0, "h")


def _bytes_unit(count: float) -> tuple[float, str]:
    return (1e3, "kB") if count < 1e5 else (1e6, "MB") if count < 1e10 else (1e9, "GB")


def _against_time(name: str, curves: Sequence[Curve], upward: Upward) -> Html | None:
    log = _wide(curves)
    scale, unit = (1.0, "s") if log else _time_unit(max((curve.x[-1] for curve in curves), default=0.0))
    return _plot(name, _scaled(curves, scale), f"time ({unit})", upward, log=log)


def _plot(name: str, curves: Sequence[Curve], across: str, upward: Upward, *, log: bool) -> Html | None:
    """Curves in one pair of axes; None without curves. A logarithmic axis leaves out what lies at 0."""
    shown = _positive(curves) if log else list(curves)
    if not shown:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for curve in shown:
            _draw_curve(axes, curve)
        if upward.level is not None:
            axes.axhline(upward.level, color=svg.SOFT, linewidth=1.5, linestyle=(0, (2, 3)))
        if log:
            axes.set_xscale("log")
            axes.minorticks_off()
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.10g}")
        axes.set_ylim(*upward.limits(shown))
        axes.set_xlabel(across)
        axes.set_ylabel(upward.label)

    return svg.drawn(name, 270, draw, label=f"{upward.label} against {across}")


def _positive(curves: Sequence[Curve]) -> list[Curve]:
    """The curves without their points at x = 0; those that have no others are gone."""
    kept = []
    for curve in curves:
        pairs = [(x, y) for x, y in zip(curve.x, curve.y, strict=True) if x > 0]
        if any(math.isfinite(y) for _, y in pairs):
            kept.append(Curve(curve.index, tuple(x for x, _ in pairs), tuple(y for _, y in pairs), curve.faint))
    return kept


def _draw_curve(axes: Axes, curve: Curve) -> None:
    colour = svg.CURVE[curve.index % svg.CURVES]
    hollow = curve.index // svg.CURVES % 2 == 1
    if curve.faint:
        axes.plot(curve.x, curve.y, color=colour, linewidth=1, alpha=0.45)
        return
    axes.plot(
        curve.x, curve.y, color=colour, linestyle="--" if hollow else "-", marker=_MARKS[curve.index % svg.CURVES],
        markevery=max(1, len(curve.x) // 12), markerfacecolor=svg.CARD if hollow else colour,
    )  # fmt: skip


def _without_peaks(curves: Sequence[Curve]) -> tuple[float | None, float | None]:
    """Limits without what rises far above the losses that the runs began with: one diverged run would flatten all."""
    finite = [[y for y in curve.y if math.isfinite(y)] for curve in curves]
    top, begin, low = max(map(max, finite)), max(ys[0] for ys in finite), min(map(min, finite))
    drop = begin - low
    if drop <= 0 or top <= begin + 2 * drop:
        return _as_drawn(curves)
    return low - 0.05 * drop, begin + 0.25 * drop
