"""Options of codecs, rounds and memories: which may be given, and how an expression tells them."""

from __future__ import annotations

from dataclasses import MISSING, fields, replace
from typing import Any, TypeGuard, TypeVar

from thinwire.errors import ConfigError

_Part = TypeVar("_Part")


def call(name: str, *told: str, **options: object) -> str:
    """The expression `name(told, ..., option=value, ...)`; just the name where there is nothing to tell."""
    said = [*told, *(f"{option}={value!r}" for option, value in options.items())]
    return f"{name}({', '.join(said)})" if said else name


def changed(part: Any, *names: str) -> dict[str, object]:
    """Options of a dataclass that are not at their defaults, in order: those named, or all that its repr shows."""
    options = [f for f in fields(part) if f.default is not MISSING and (f.name in names if names else f.repr)]
    return {f.name: getattr(part, f.name) for f in options if getattr(part, f.name) != f.default}


def altered(part: _Part, **options: object) -> _Part:
    """The same with the options that are given; None stands for what is not."""
    given = {name: value for name, value in options.items() if value is not None}
    return replace(part, **given)  # type: ignore[type-var]


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: object, least: int, most: int | None = None) -> TypeGuard[int]:
    """Whether it is a whole number of at least `least` and at most `most`."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value and (most is None or value <= most)


def check_share(name: str, share: object, *, of: str, mend: str, verb: str = "keep") -> None:
    """Refuse what is no share.

    of  what it is a share of, in words
    """
    if not (is_number(share) and 0 < share <= 1):
        raise ConfigError(
            f"{name} is to {verb} a share of {share!r}",
            expected=f"a number in (0, 1]: the share of {of}",
            mend=mend,
        )


def check_number(name: str, told: str, value: object, *, above: float | None = None, at_least: float | None = None,
                 below: float | None = None, at_most: float | None = None, mend: str) -> None:  # fmt: skip
    """Refuse an option that is no number or out of range.

    told  the option in words: "with momentum"
    """
    held = is_number(value) and all(
        (
            above is None or value > above,
            at_least is None or value >= at_least,
            below is None or value < below,
            at_most is None or value <= at_most,
        )
    )
    if not held:
        limits = {"above": above, "at least": at_least, "below": below, "at most": at_most}
        said = " and ".join(f"{word} {limit:g}" for word, limit in limits.items() if limit is not None)
        raise ConfigError(f"{name} {told} {value!r}", expected=f"a number {said}", mend=mend)


def check_flag(name: str, told: str, value: object) -> None:
    """Refuse an option that is neither True nor False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} {told} {value!r}", expected="True or False", mend="leave it out for the default")
