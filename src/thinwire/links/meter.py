"""The byte ledger: what a member sent and received, by purpose, counted where messages are handed to the engine."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """Bytes of messages; an engine's own framing (TCP, Ethernet) comes on top and is not ours to count."""

    sent_bytes: int = 0
    received_bytes: int = 0
    messages_sent: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.sent_bytes + other.sent_bytes,
            self.received_bytes + other.received_bytes,
            self.messages_sent + other.messages_sent,
        )


class Meter:
    """Totals by purpose; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_purpose: dict[str, Traffic] = {}

    def count(self, purpose: str, *, sent_bytes: int = 0, received_bytes: int = 0, messages_sent: int = 0) -> None:
        """Add to a purpose."""
        with self._lock:
            before = self._by_purpose.get(purpose, Traffic())
            self._by_purpose[purpose] = before + Traffic(sent_bytes, received_bytes, messages_sent)

    def add(self, other: Meter) -> None:
        """Add all of another ledger."""
        for purpose, traffic in other.by_purpose().items():
            with self._lock:
                self._by_purpose[purpose] = self._by_purpose.get(purpose, Traffic()) + traffic

    def by_purpose(self) -> Mapping[str, Traffic]:
        """A copy of the ledger."""
        with self._lock:
            return dict(self._by_purpose)

    def total(self) -> Traffic:
        """The sum over purposes."""
        return sum(self.by_purpose().values(), Traffic())
