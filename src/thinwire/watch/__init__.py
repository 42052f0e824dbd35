"""Fault detection: the regular rhythm of rounds as a detector. See docs/fault-detection.md."""

from thinwire.watch.conduct import Bounds
from thinwire.watch.findings import Finding, Kind
from thinwire.watch.judging import Settings, judge
from thinwire.watch.liveness import Heartbeats
from thinwire.watch.policy import Isolation, Policy
from thinwire.watch.slowness import Limits
from thinwire.watch.stuck import Waiting, stuck
from thinwire.watch.watch import Watch
from thinwire.watch.words import Told, Word

__all__ = [
    "Bounds",
    "Finding",
    "Heartbeats",
    "Isolation",
    "Kind",
    "Limits",
    "Policy",
    "Settings",
    "Told",
    "Waiting",
    "Watch",
    "Word",
    "judge",
    "stuck",
]
