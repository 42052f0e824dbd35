"""What members tell each other, a small word at every call, and how it is written.

Findings follow from words alone, and all members read the same words: so all reach the same findings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

from thinwire.errors import PacketError

#: Name of a member -> its word.
Told = Mapping[str, "Word"]

_DIGITS = 5  # of numbers on the wire


@dataclass(frozen=True)
class Word:
    """A member's word.

    steps             local steps (or units) made since its last word
    step_s, encode_s  seconds of a local step and of encoding a packet, lately; None: nothing to tell
    norm              of its last contribution; None: it contributed nothing
    finite            whether its contribution was
    counted           whether its contribution was counted in the last round
    paces             member -> median log(seconds / byte) of the last messages from it; filled in by the watch
    noise             standard deviation of those medians; filled in by the watch
    heard             the last call whose answers it knows, -1 for none; filled in by the watch
    """

    steps: int
    step_s: float | None = None
    encode_s: float | None = None
    norm: float | None = None
    finite: bool = True
    counted: bool = True
    paces: Mapping[str, float] = field(default_factory=dict)
    noise: float = 0.0
    heard: int = -1


def most_bytes(members: int) -> int:
    """The most that a word among so many members may have; names of up to 64 bytes, written in ASCII."""
    return 512 + 96 * members


def write(word: Word) -> bytes:
    """As JSON, numbers to five digits. A norm that is not finite is told as just that."""
    if word.norm is not None and not math.isfinite(word.norm):
        word = replace(word, norm=None, finite=False)
    told = asdict(word)
    for name in ("step_s", "encode_s", "norm", "noise"):
        told[name] = None if told[name] is None else _rounded(told[name])
    told["paces"] = {name: _rounded(pace) for name, pace in word.paces.items()}
    return json.dumps(told, separators=(",", ":"), allow_nan=False).encode()


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def read(text: bytes) -> Word:
    """raises  PacketError if it is no word"""
    try:
        told = json.loads(text, parse_constant=_refuse)
        word = Word(**told)
        numbers = [each for each in (word.step_s, word.encode_s, word.norm) if each is not None]
        fits = (
            isinstance(word.steps, int) and isinstance(word.heard, int)
            and isinstance(word.finite, bool) and isinstance(word.counted, bool)
            and all(isinstance(each, int | float) for each in [*numbers, word.noise, *word.paces.values()])
            and all(each >= 0 for each in [*numbers, word.noise, word.steps])
        )  # fmt: skip
    except (ValueError, TypeError, AttributeError) as error:
        raise PacketError(f"a member's word cannot be read: {type(error).__name__}: {error}") from error
    if not fits:
        raise PacketError(f"a member's word makes no sense: {text[:200].decode(errors='replace')}")
    return word


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no number")
