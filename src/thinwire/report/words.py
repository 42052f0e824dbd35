"""Numbers as people read them: 12.3 MB, 1 min 34 s, 4.1×."""

from __future__ import annotations

import math

ABSENT = "–"
NOT_FINITE = "not finite"


def bytes_text(count: float) -> str:
    """Decimal units and three digits: 0 B, 999 B, 1.23 kB, 12.3 MB."""
    if not math.isfinite(count):
        return NOT_FINITE
    value = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        digits = 0 if unit == "B" else _decimals(value)
        if float(f"{value:.{digits}f}") < 1000:  # the rounded value decides, or 999.96 kB would read 1000 kB
            return f"{value:.{digits}f} {unit}"
        value /= 1000
    return f"{value:,.0f} PB"


def seconds_text(seconds: float) -> str:
    """Two units at most: 420 ms, 12.3 s, 1 min 34 s, 2 h 05 min, 3 d 04 h."""
    if not math.isfinite(seconds):
        return NOT_FINITE
    if seconds == 0:
        return "0 s"
    if float(f"{seconds:.3f}") < 1:
        return f"{_short(1000 * seconds)} ms"
    if float(f"{seconds:.1f}") < 60:
        return f"{_short(seconds)} s"
    if round(seconds) < 3600:
        return _two_units(seconds, "min", 60, "s", 1)
    if round(seconds / 60) < 24 * 60:
        return _two_units(seconds, "h", 3600, "min", 60)
    return _two_units(seconds, "d", 86400, "h", 3600)


def number_text(value: float | None) -> str:
    """Four significant digits; what is missing and what is not finite say so."""
    if value is None:
        return ABSENT
    return f"{value:#.4g}".rstrip(".") if math.isfinite(value) else NOT_FINITE


def count_text(count: int) -> str:
    """Thousands set apart."""
    return f"{count:,}"


def maybe_seconds_text(seconds: float | None) -> str:
    """`seconds_text`, for what may be missing."""
    return ABSENT if seconds is None else seconds_text(seconds)


def times_text(ratio: float | None) -> str:
    """A speed-up: 12.3×."""
    return ABSENT if ratio is None else f"{_short(ratio)}×"


def share_of_first_text(ratio: float | None) -> str:
    """A share of the first run's bytes, as a comparison: 250× less, 1.5× more, the same."""
    if ratio is None:
        return ABSENT
    if ratio == 0:
        return "nothing"
    shown = _short(max(ratio, 1 / ratio))
    if float(shown.replace(",", "")) == 1:
        return "the same"
    return f"{shown}× {'more' if ratio > 1 else 'less'}"


def percent_text(share: float) -> str:
    """A share in [0, 1] as a percentage."""
    return "< 0.01 %" if 0 < share < 1e-4 else f"{_short(100 * share)} %"


def one_line(words: str, *, limit: int = 60) -> str:
    """Printable, on one line, cut at `limit` characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in words).split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def _two_units(seconds: float, large: str, large_s: int, small: str, small_s: int) -> str:
    count, rest = divmod(round(seconds / small_s), large_s // small_s)
    return f"{count:,} {large} {rest:02d} {small}"


def _short(value: float) -> str:
    """Three significant digits without an exponent."""
    if value != 0 and abs(value) < 0.01:
        return f"{value:.1g}"
    return f"{value:,.{_decimals(value)}f}"


def _decimals(value: float) -> int:
    """Decimals that leave three significant digits of numbers of at least 1."""
    size = abs(value)
    return 2 if size < 9.995 else 1 if size < 99.95 else 0
