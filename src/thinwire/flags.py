"""Command-line flags as settings of options: `--steps 200 --method.every=50 --no-tied`.

A flag is an option's dotted name, or its last part alone where only one section has it. The type of the value is the
option's.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from thinwire.errors import ConfigError
from thinwire.options import Option, Options, nearest, read


@dataclass(frozen=True)
class Flag:
    """`--name text`.

    typed  as it was typed
    name   with _ for -
    text   None where nothing followed
    """

    typed: str
    name: str
    text: str | None


def split_flags(words: Sequence[str]) -> Iterator[Flag]:
    """The flags in a row of words; a word after a flag is its value unless it begins with --."""
    left = list(words)
    while left:
        word = left.pop(0)
        if not word.startswith("--") or word == "--":
            raise ConfigError(
                f"{shlex.quote(word)}: not a flag",
                expected="--NAME VALUE or --NAME=VALUE",
                mend="put a value with spaces in quotes, and -- before a name",
            )
        name, equals, text = word[2:].partition("=")
        typed, value = _quoted(word), text if equals else None
        if not equals and left and not left[0].startswith("--"):
            value = left.pop(0)
            typed = f"{word} {_quoted(value)}"
        yield Flag(typed, name.replace("-", "_"), value)


def setting(flag: Flag, options: Mapping[str, Options], choosers: Iterable[str] = ()) -> tuple[str, str, object]:
    """What a flag sets.

    options   section -> what it can be told; the empty name is the run itself
    choosers  other flags there are, for a better guess at what was meant
    returns   section, option and value
    raises    ConfigError naming the flag as typed
    """
    text, found = flag.text, _find(flag, flag.name, options)
    if found is None and flag.name.startswith("no_") and text is None:
        text, found = "false", _find(flag, flag.name.removeprefix("no_"), options)
        if found and found[1].kind is not bool:
            raise ConfigError(
                f"{flag.typed}: {found[1].name} is not true or false",
                expected="--no-NAME only for what can be switched off",
                mend=f"write --{found[1].name} VALUE",
            )
    if found is None:
        raise _unknown_flag(flag, options, choosers)
    place, option = found
    if text is None and option.kind is bool:
        text = "true"
    if text is None:
        raise ConfigError(f"{flag.typed}: no value", expected=f"--{flag.name} VALUE", mend=f"it is: {option.help}")
    return place, option.name, read(option, text, flag.typed, typed=True)


def _find(flag: Flag, name: str, options: Mapping[str, Options]) -> tuple[str, Option] | None:
    """The option with this dotted name, or the only one with this last part."""
    place, _, last = name.rpartition(".")
    if last in options.get(place, {}):
        return place, options[place][last]
    found = [] if place else [where for where in options if name in options[where]]
    if len(found) > 1:
        names = [f"--{where}.{name}" for where in found]
        raise ConfigError(
            f"{flag.typed}: {len(found)} sections have an option {name!r}",
            expected=f"one of {', '.join(names)}",
            mend=f"write {names[0]}",
        )
    return (found[0], options[found[0]][name]) if found else None


def _unknown_flag(flag: Flag, options: Mapping[str, Options], choosers: Iterable[str]) -> ConfigError:
    dotted = {f"{place}.{name}".lstrip("."): name for place in options for name in options[place]}
    names = {name: full for full, name in dotted.items()} | {full: full for full in dotted}
    names |= {name: name for name in choosers}
    near = nearest(flag.name, names)
    return ConfigError(
        f"{flag.typed}: no such option",
        expected="an option of the run, or of the task, optimizer, method and link it uses",
        mend=f"did you mean --{names[near]}?" if near else "docs/configuration.md lists the options",
    )


def _quoted(word: str) -> str:
    """A word as a person would type it in a shell."""
    flag, equals, value = word.partition("=")
    return f"{flag}={shlex.quote(value)}" if equals and flag.startswith("--") else shlex.quote(word)
