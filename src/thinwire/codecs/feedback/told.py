"""What schemes have in common beside the contract: their expressions, and numbers that are in range."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from typing import Any

from thinwire.codecs.base import Codec
from thinwire.codecs.stages import Staged
from thinwire.errors import ConfigError


def spec_of(name: str, codec: Codec | Staged, scheme: Any) -> str:
    """`name(codec, option=...)` with the options of a scheme that are not at their defaults."""
    told = [f", {f.name}={getattr(scheme, f.name)!r}" for f in fields(scheme) if _is_told(scheme, f)]
    return f"{name}({codec.spec}{''.join(told)})"


def check_number(name: str, told: str, value: object, *, above: float | None = None, at_least: float | None = None,
                 below: float | None = None, at_most: float | None = None, mend: str) -> None:  # fmt: skip
    """Refuse an option that is no number or out of range.

    told  the option in words: "with momentum"
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    limits = {"above": above, "at least": at_least, "below": below, "at most": at_most}
    held = number and all(
        (
            above is None or value > above,  # type: ignore[operator]
            at_least is None or value >= at_least,  # type: ignore[operator]
            below is None or value < below,  # type: ignore[operator]
            at_most is None or value <= at_most,  # type: ignore[operator]
        )
    )
    if not held:
        said = " and ".join(f"{word} {limit:g}" for word, limit in limits.items() if limit is not None)
        raise ConfigError(f"{name} {told} {value!r}", expected=f"a number {said}", mend=mend)


def check_flag(name: str, told: str, value: object) -> None:
    """Refuse an option that is neither True nor False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} {told} {value!r}", expected="True or False", mend="leave it out for the default")


def _is_told(scheme: Any, option: Field[Any]) -> bool:
    return option.default is not MISSING and getattr(scheme, option.name) != option.default
