"""What is asked of a key-value store, as values: a program yields them and is sent the answers."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Put:
    """Set a key; no answer."""

    key: str
    value: bytes


@dataclass(frozen=True)
class Gather:
    """Wait until all keys are there, `limit_s` at most (0: do not wait). Answer: key -> value of those that are."""

    keys: tuple[str, ...]
    limit_s: float
    what: str = ""


@dataclass(frozen=True)
class Swap:
    """Set a key if it holds `expected` (empty: if it is not there). Answer: what it holds then."""

    key: str
    expected: bytes
    desired: bytes


@dataclass(frozen=True)
class Add:
    """Add to a counter that begins at 0. Answer: its new value."""

    key: str
    amount: int


@dataclass(frozen=True)
class Delete:
    """Delete a key if it is there; no answer."""

    key: str


@dataclass(frozen=True)
class Clock:
    """Answer: seconds."""


Op = Put | Gather | Swap | Add | Delete | Clock
#: Yields operations, is sent their answers, returns a T.
Program = Generator[Op, Any, T]
