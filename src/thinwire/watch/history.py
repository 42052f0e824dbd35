"""What a watch remembers: the last calls, as values, the same on all members; and how it is handed to a newcomer."""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass, field
from typing import Any

from thinwire.errors import PacketError
from thinwire.watch.findings import Finding, Kind
from thinwire.watch.judging import Settings, judge, since
from thinwire.watch.policy import Isolation, Policy, Strikes
from thinwire.watch.words import Told, Word

MOST_BYTES = 1 << 24  # of a history that is handed over, written out


@dataclass(frozen=True)
class Heard:
    """A call, and what followed from it.

    isolated  members isolated by this call
    strikes   what the policy remembers after it
    """

    call: int
    told: Told
    findings: tuple[Finding, ...] = ()
    isolated: tuple[Isolation, ...] = ()
    strikes: Strikes = field(default_factory=Strikes)


History = tuple[Heard, ...]


def after(past: History, told: Told, policy: Policy, settings: Settings) -> History:
    """The history with one call more."""
    call = past[-1].call + 1 if past else 0
    before = past[-1] if past else Heard(-1, {})
    apart = before.strikes.isolated(call)
    found = since(judge([*(each.told for each in past), told], settings), before.findings, call)
    found = tuple(each for each in found if not (each.kind is Kind.IDLE and each.who[0] in apart))  # it was told to
    strikes, isolated = policy.decide(before.strikes, call, found, told.keys())
    return (*past, Heard(call, told, found, isolated, strikes))[-settings.window :]


def until(past: History, call: int) -> History:
    """Without what was heard after a call: not all did."""
    return tuple(each for each in past if each.call <= call)


def written(past: History) -> bytes:
    """As compressed JSON: plain values that a stranger may be given, and give."""
    return zlib.compress(json.dumps([asdict(each) for each in past], separators=(",", ":")).encode())


def read(text: bytes) -> History:
    """raises  PacketError if it is no history"""
    try:
        plain = zlib.decompressobj().decompress(text, MOST_BYTES)
        return tuple(_heard(each) for each in json.loads(plain))
    except (ValueError, TypeError, KeyError, AttributeError, zlib.error) as error:
        raise PacketError(f"a watch's history cannot be read: {type(error).__name__}: {error}") from error


def _heard(told: Any) -> Heard:
    strikes = told["strikes"]
    return Heard(
        int(told["call"]),
        {str(name): Word(**word) for name, word in told["told"].items()},
        tuple(_finding(each) for each in told["findings"]),
        tuple(_isolation(each) for each in told["isolated"]),
        Strikes(
            {str(name): tuple(calls) for name, calls in strikes["found"].items()},
            {str(name): _isolation(each) for name, each in strikes["apart"].items()},
        ),
    )


def _finding(told: Any) -> Finding:
    return Finding(**{**told, "kind": Kind(told["kind"]), "who": tuple(told["who"])})


def _isolation(told: Any) -> Isolation:
    return Isolation(**{**told, "because": tuple(told["because"])})
