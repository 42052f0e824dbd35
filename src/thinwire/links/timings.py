"""How long a byte of each peer took lately: what a link measures of its neighbours, and others may judge."""

from __future__ import annotations

import math
import statistics
import threading
from collections import deque

_SPREAD_TO_SD = 1.4826  # of a median absolute deviation, where values are normal


class Timings:
    """The last messages from each peer, at most `window` of them; safe to use from several threads.

    window       messages kept of each peer (w = 20 in C4-like detectors)
    least_bytes  smaller messages tell of latency and are left out
    """

    def __init__(self, *, window: int = 20, least_bytes: int = 1 << 16) -> None:
        self._window, self._least_bytes = window, least_bytes
        self._logs: dict[int, deque[float]] = {}
        self._lock = threading.Lock()

    def took(self, peer: int, size: int, seconds: float) -> None:
        """A message of so many bytes from a peer was there after so many seconds."""
        if size < self._least_bytes or seconds <= 0:
            return
        with self._lock:
            self._logs.setdefault(peer, deque(maxlen=self._window)).append(math.log(seconds / size))

    def paces(self) -> dict[int, float]:
        """peer -> median log(seconds / byte) of its last messages; peers of whom there is none are missing."""
        with self._lock:
            return {peer: statistics.median(logs) for peer, logs in sorted(self._logs.items())}

    def noise(self) -> float:
        """Standard deviation that a median of `paces` has of itself, from how far single messages are from it.

        sqrt(pi / 2) sd / sqrt(messages), sd robust and over all peers; 0 while nobody sent two messages
        """
        with self._lock:
            many = [logs for logs in self._logs.values() if len(logs) > 1]
            if not many:
                return 0.0
            apart = [abs(log - statistics.median(logs)) for logs in many for log in logs]
            messages = statistics.median(len(logs) for logs in many)
        return math.sqrt(math.pi / 2) * _SPREAD_TO_SD * statistics.median(apart) / math.sqrt(messages)
