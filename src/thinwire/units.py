"""Quantities as people type them: "20mbit", "2.5MB", "40ms". Inside the library: bits/s, whole bytes, seconds.

Each is a frozen value with `parse` and `str`, and `parse(str(q)) == q`. A number without a unit is refused: nobody
should have to guess. Arithmetic on the way is decimal, so that "40ms" is the float nearest to 0.04.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Self

from thinwire.errors import ConfigError

_NUMBER = re.compile(r"([0-9]{1,28}(?:\.[0-9]{0,28})?|\.[0-9]{1,28})(?:[eE]([+-]?[0-9]{1,3}))?\s*([^\s0-9.].*)")

_SECONDS = {"us": "1e-6", "ms": "1e-3", "s": "1", "min": "60", "h": "3600", "d": "86400"}
_BYTES = {
    "B": "1", "kB": "1e3", "MB": "1e6", "GB": "1e9", "TB": "1e12",
    "KiB": str(1 << 10), "MiB": str(1 << 20), "GiB": str(1 << 30), "TiB": str(1 << 40),
}  # fmt: skip
_BITS = {"bit": "1", "kbit": "1e3", "mbit": "1e6", "gbit": "1e9", "tbit": "1e12"}
#: Other spellings of the same units. "Mbps" is not among them: it stands for bits here and for bytes there.
_ALIASES = {"KB": "kB", "µs": "us", "μs": "us", "sec": "s", "m": "min"}


@dataclass(frozen=True)
class Duration:
    """A length of time, at least 0 s."""

    seconds: float

    def __post_init__(self) -> None:
        _finite(self.seconds, "duration")

    @classmethod
    def parse(cls, text: str) -> Self:
        """From "40ms", "1.5 s", "1min"."""
        return cls(float(_parse(text, _SECONDS, what="duration", example="40ms")))

    def __str__(self) -> str:
        return _write(self.seconds, _SECONDS)


@dataclass(frozen=True)
class Size:
    """An amount of data, in whole bytes."""

    bytes: int

    def __post_init__(self) -> None:
        _finite(self.bytes, "size")

    @classmethod
    def parse(cls, text: str) -> Self:
        """From "2.5MB" (10^6 bytes) or "64KiB" (2^10 bytes)."""
        count = _parse(text, _BYTES, what="size", example="2.5MB")
        if count != int(count):
            raise ConfigError(
                f"{text!r} is {float(count)} bytes",
                expected="a whole number of bytes",
                mend=f"write '{round(count)}B'",
            )
        return cls(int(count))

    def __str__(self) -> str:
        return _write(self.bytes, _BYTES)


@dataclass(frozen=True)
class Rate:
    """How fast a link is."""

    bits_per_s: float

    def __post_init__(self) -> None:
        _finite(self.bits_per_s, "rate")

    @classmethod
    def parse(cls, text: str) -> Self:
        """From "20mbit" or "20mbit/s"; "2.5MB/s" is eight times that many bits."""
        stem = text.strip()
        per_second = stem.endswith("/s")
        stem = stem.removesuffix("/s")
        if per_second and stem.endswith("B"):
            return cls(float(8 * _parse(stem, _BYTES, what="rate", example="20mbit", typed=text)))
        return cls(float(_parse(stem.lower(), _BITS, what="rate", example="20mbit", typed=text)))

    def __str__(self) -> str:
        return _write(self.bits_per_s, _BITS)


def _finite(value: float, what: str) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"a {what} of {value}", expected="a finite number of at least 0", mend=f"give another {what}")


def _parse(text: str, units: Mapping[str, str], *, what: str, example: str, typed: str | None = None) -> Decimal:
    """The amount in the base unit, exactly."""
    found = _NUMBER.fullmatch(text.strip())
    unit = found.group(3).strip() if found else ""
    unit = _ALIASES.get(unit, unit)
    if not found or unit not in units:
        shown = text if typed is None else typed
        bare = re.fullmatch(r"[0-9.]+", shown.strip())
        raise ConfigError(
            f"{shown!r} is no {what}" + (": it has no unit" if bare else ""),
            expected=f"a number of at least 0 and a unit: {', '.join(units)}",
            mend=f"write it like {example!r}",
        )
    number = Decimal(found.group(1) + "e" + (found.group(2) or "0"))
    return number * Decimal(units[unit])


def _write(value: float, units: Mapping[str, str]) -> str:
    """In the largest unit that gives a short number of at least 1 and is read back exactly; else in the base unit."""
    exact = Decimal(repr(value))
    for unit in sorted(units, key=lambda name: -Decimal(units[name])):
        factor = Decimal(units[unit])
        amount = exact / factor
        short = 1 <= amount < 1_000_000 and len(amount.normalize().as_tuple().digits) <= 6
        if short and amount * factor == exact:
            return f"{amount.normalize():f}{unit}"
    base = next(name for name in units if units[name] == "1")
    return f"{value!r}{base}"
