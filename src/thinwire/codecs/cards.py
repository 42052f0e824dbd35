"""What a person is shown of a codec; made from its code, so that it cannot be out of date."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from thinwire.codecs.base import Codec, Traits
from thinwire.codecs.stages import Staged
from thinwire.expressions import options

_N = 1_000_000


@dataclass(frozen=True)
class CodecCard:
    """A codec's card.

    name              as written in expressions
    signature         name with options and defaults: "int8(block=256, rounding='nearest')"
    summary           first paragraph of its card
    error             what is claimed of the loss, one line
    source            papers, one line
    avoid             when not to use it, one line; empty where the card does not say
    card              the whole text
    example           expression that the two numbers below are for
    bits_per_element  of the fields for a million elements, without the packet's header; a bound if the size varies;
                      None of a round of several exchanges, whose size is in its card
    traits            what it promises; None likewise
    """

    name: str
    signature: str
    summary: str
    error: str
    source: str
    avoid: str
    card: str
    example: str
    bits_per_element: float | None
    traits: Traits | None


def card(name: str, entry: Callable[..., Any], part: type, codec: Codec | Staged, example: str) -> CodecCard:
    """The card of a table entry.

    part   the class whose file holds the text
    codec  what the example stands for
    """
    text = inspect.cleandoc(sys.modules[part.__module__].__doc__ or "")
    plain = codec if isinstance(codec, Codec) else None
    size = None if plain is None else sum(dtype.itemsize * count for dtype, count in plain.layout(_N).values())
    return CodecCard(
        name=name,
        signature=signature(name, entry),
        summary=" ".join(text.split("\n\n")[0].split()),
        error=_line(text, "Error"),
        source=_line(text, "Source"),
        avoid=_line(text, "Avoid"),
        card=text,
        example=example,
        bits_per_element=None if size is None else 8 * size / _N,
        traits=None if plain is None else plain.traits,
    )


def signature(name: str, entry: Callable[..., Any]) -> str:
    """The entry as one would call it, with its defaults."""
    told = [str(p).split(":")[0] for p in inspect.signature(entry).parameters.values() if p.kind is p.VAR_POSITIONAL]
    told += [o if v is inspect.Parameter.empty else f"{o}={_worded(v)}" for o, v in options(entry).items()]
    return f"{name}({', '.join(told)})" if told else name


def _worded(value: object) -> str:
    return value.spec if isinstance(value, Codec | Staged) else repr(value)


def _line(text: str, label: str) -> str:
    """What stands behind a label of the card, its indented continuation lines included."""
    found: list[str] = []
    label = f"{label:8}"  # as cards are set; "Error feedback: ..." is no label
    for line in text.splitlines():
        if line.startswith(label):
            found = [line.removeprefix(label)]
        elif found and line.startswith(" "):
            found.append(line)
        elif found:
            break
    return " ".join(" ".join(found).split())
