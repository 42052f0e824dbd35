"""Options: what a dataclass or a function can be told, and how a file or a command line tells it.

The names, types, defaults and help of options are read off the dataclass or the signature that takes them; nothing is
declared twice. A field says more about itself with `field(default=..., metadata=about("help", at_least=1))`.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass
from typing import Any, Literal, Union, get_args, get_origin

from thinwire.codecs import Codec, Feedback, Staged, parse
from thinwire.errors import ConfigError
from thinwire.units import Duration, Rate, Size


def about(
    help: str, *, at_least: float | None = None, above: float | None = None, at_most: float | None = None
) -> Mapping[str, object]:
    """Metadata of an option's field: a line of help, and the bounds of a number."""
    return {"help": help, "at_least": at_least, "above": above, "at_most": at_most}


@dataclass(frozen=True)
class Option:
    """One thing that can be set.

    kind      its annotation
    default   `dataclasses.MISSING` if it must be given
    at_least, above, at_most   bounds of a number
    """

    name: str
    kind: Any
    default: object
    help: str = ""
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None


Options = Mapping[str, Option]


def of_dataclass(cls: type[Any]) -> dict[str, Option]:
    """The options that are fields of a dataclass, in order."""
    hints = typing.get_type_hints(cls)
    return {
        field.name: Option(field.name, hints[field.name], _default(field), **field.metadata)
        for field in dataclasses.fields(cls)
        if "help" in field.metadata
    }


def _default(field: dataclasses.Field[Any]) -> object:
    return field.default if field.default_factory is MISSING else field.default_factory()


def of_function(function: Callable[..., object], *, skip: Iterable[str] = ()) -> dict[str, Option]:
    """The options that are named parameters of a function; *args and **kwargs are nobody's options."""
    hints = typing.get_type_hints(function)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    options = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in named and name not in skip:
            default = MISSING if parameter.default is inspect.Parameter.empty else parameter.default
            options[name] = Option(name, hints.get(name, type(default)), default)
    return options


def check(instance: Any) -> None:
    """Hold a dataclass of options to its own bounds and choices; for its `__post_init__`.

    raises  ConfigError naming the field and the value
    """
    for option in of_dataclass(type(instance)).values():
        value = getattr(instance, option.name)
        with labelled(f"{type(instance).__name__}: {option.name} = {value!r}"):
            _check_choice(option.kind, value)
            _check_bounds(option, value)


def read(option: Option, given: object, where: str, *, typed: bool) -> object:
    """A value for an option.

    given  text from a command line if `typed`, else a value from a TOML file
    where  the beginning of an error's message: the file and key, or the flag as typed
    """
    with labelled(where):
        value = _read(option.kind, given, typed)
        _check_bounds(option, value)
        return value


def built(option: Option, value: object) -> object:
    """What the taker of the option gets: a codec where the value is the words for one, else the value."""
    kinds = get_args(option.kind) or (option.kind,)
    words = {choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)}
    if isinstance(value, str) and value not in words and any(_is_codec(kind) for kind in kinds):
        return parse(value)
    return value


def plain(value: object) -> object:
    """A value as a TOML file can hold it; `read` gives the value back."""
    if value is None:
        return "none"
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, Duration | Rate | Size):
        return str(value)
    if isinstance(value, Codec | Staged | Feedback):
        return value.spec
    return value


def unknown(wrong: str, name: str, known: Iterable[str], *, what: str) -> ConfigError:
    """The error for a name nobody knows, with the nearest one that somebody does."""
    names = sorted(known)
    near = nearest(name, names)
    return ConfigError(
        wrong,
        expected=f"{what}: {', '.join(names) or 'there are none'}",
        mend=f"did you mean {near!r}?" if near else "take one of these",
    )


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name that was probably meant: one that differs by case only, else the most similar; None if none is near."""
    folded = {each.casefold(): each for each in names}
    near = difflib.get_close_matches(name.casefold(), folded, n=1)
    return folded[near[0]] if near else None


@contextmanager
def labelled(where: str) -> Iterator[None]:
    """Put the place before the message of a ConfigError raised inside."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.wrong}", expected=error.expected, mend=error.mend) from error


def _check_bounds(option: Option, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    low = option.at_least is not None and value < option.at_least
    flat = option.above is not None and value <= option.above
    high = option.at_most is not None and value > option.at_most
    if low or flat or high:
        bounds = [("at least", option.at_least), ("above", option.above), ("at most", option.at_most)]
        expected = " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)
        raise ConfigError(f"{value} is out of range", expected=f"a number {expected}", mend=_mend(option))


def _mend(option: Option) -> str:
    if option.default is MISSING:
        return f"{option.name} is: {option.help}"
    return f"{option.name} is: {option.help}; left out, it is {plain(option.default)}"


def _check_choice(kind: Any, value: object) -> None:
    if get_origin(kind) is Literal and value not in get_args(kind):
        raise _no_choice(value, get_args(kind))


def _no_choice(value: object, choices: Sequence[object]) -> ConfigError:
    return unknown(f"{value!r} is no choice here", str(value), map(str, choices), what="one of")


def _read(kind: Any, given: object, typed: bool) -> object:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _read_union(get_args(kind), given, typed)
    if origin is Literal:
        return _read_literal(get_args(kind), given)
    if origin in (tuple, list, Sequence):
        return _read_row(kind, given, typed)
    if _is_codec(kind):
        return _read_codec(given)
    if kind in _READERS:
        return _READERS[kind](given, typed)
    raise ConfigError(
        f"{getattr(kind, '__name__', kind)} is nothing a file or a flag can hold",
        expected="a number, a word, a list, a quantity or a codec",
        mend="compose it in Python instead",
    )


def _readable(kind: Any) -> bool:
    return kind in _READERS or _is_codec(kind) or get_origin(kind) in (Literal, tuple, list, Sequence)


def _is_codec(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Codec | Staged | Feedback)


def _read_union(kinds: Sequence[Any], given: object, typed: bool) -> object:
    """The first of the kinds that can read it; a plain word last, because it can read everything typed."""
    if type(None) in kinds and given == "none":
        return None
    codecs = [kind for kind in kinds if _is_codec(kind)]  # with and without feedback: one grammar reads both
    candidates = sorted((kind for kind in kinds if _readable(kind) and kind not in codecs[1:]), key=lambda k: k is str)
    errors = []
    for kind in candidates:
        try:
            return _read(kind, given, typed)
        except ConfigError as error:
            errors.append(error)
    if not errors:
        return _read(kinds[0], given, typed)  # refuses it
    raise ConfigError(errors[0].wrong, expected="; or ".join(error.expected for error in errors), mend=errors[0].mend)


def _read_literal(choices: Sequence[object], given: object) -> object:
    for choice in choices:
        if given == choice or (not isinstance(choice, str) and given == str(choice)):
            return choice
    raise _no_choice(given, choices)


def _read_row(kind: Any, given: object, typed: bool) -> tuple[object, ...]:
    """`tuple[x, ...]`, `tuple[x, y]`, `list[x]`: always read as a tuple."""
    inner = get_args(kind)
    if typed and isinstance(given, str):
        items: list[object] = [word.strip() for word in given.split(",")] if given.strip() else []
    elif isinstance(given, list):
        items = given
    else:
        raise _not(given, "a list", "[1, 2]")
    any_length = get_origin(kind) is not tuple or (len(inner) == 2 and inner[1] is Ellipsis)
    if not any_length and len(items) != len(inner):
        example = ",".join(["..."] * len(inner))
        raise ConfigError(
            f"{len(items)} values", expected=f"{len(inner)} values", mend=f"write {example} (in a file: [{example}])"
        )
    kinds = [inner[0]] * len(items) if any_length else list(inner)
    return tuple(_read(each, item, typed) for each, item in zip(kinds, items, strict=True))


def _read_codec(given: object) -> str:
    """A codec stays the words it was written in; whoever builds the method parses them again."""
    if not isinstance(given, str):
        raise _not(given, "a codec expression", '"topk(1/64) | int4"')
    parse(given)
    return given


def _read_bool(given: object, typed: bool) -> bool:
    value = {"true": True, "false": False}.get(given) if typed and isinstance(given, str) else given
    if not isinstance(value, bool):
        raise _not(given, "true or false", "true")
    return value


def _read_int(given: object, typed: bool) -> int:
    if typed and isinstance(given, str):
        try:
            return int(given)
        except ValueError:
            pass
    if not isinstance(given, int) or isinstance(given, bool):
        raise _not(given, "a whole number", "100")
    return given


def _read_float(given: object, typed: bool) -> float:
    value = _number(given) if typed and isinstance(given, str) else given
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise _not(given, "a finite number", "0.5")
    return float(value)


def _number(text: str) -> float | None:
    """A float, or a fraction like 1/64."""
    over, _, under = text.partition("/")
    try:
        return float(over) / float(under) if under else float(text)
    except (ValueError, ZeroDivisionError):
        return None


def _read_str(given: object, typed: bool) -> str:
    if not isinstance(given, str):
        raise _not(given, "text", '"text" (with quotes in a file)')
    return given


def _read_quantity(kind: type[Duration | Rate | Size], given: object, example: str) -> Duration | Rate | Size:
    if not isinstance(given, str):
        raise _not(given, "text with a number and a unit", f'"{example}"')
    return kind.parse(given)


def _not(given: object, expected: str, example: str) -> ConfigError:
    return ConfigError(f"{given!r} is not {expected}", expected=expected, mend=f"write it like {example}")


_READERS: Mapping[Any, Callable[[object, bool], object]] = {
    bool: _read_bool,
    int: _read_int,
    float: _read_float,
    str: _read_str,
    Duration: lambda given, typed: _read_quantity(Duration, given, "40ms"),
    Rate: lambda given, typed: _read_quantity(Rate, given, "20mbit"),
    Size: lambda given, typed: _read_quantity(Size, given, "2.5MB"),
}
