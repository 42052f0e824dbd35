"""Runs beside each other: who reached what loss, after how many seconds and bytes.

Losses are validation losses throughout; a run that was never validated has no place in a comparison of losses, and its
entries are None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from thinwire.report.record import RunRecord


@dataclass(frozen=True)
class Row:
    """One run of a comparison.

    label              of the run
    final_loss         at the last evaluation; not finite if the run diverged
    best_loss          the lowest one
    steps              local steps of each member
    sent_bytes         by a member, the mean over members
    seconds            of the whole run
    seconds_to_common  until the loss that every run reached
    speedup            the first run's seconds_to_common over this one's
    bytes_ratio        this run's sent_bytes over the first run's
    """

    label: str
    final_loss: float | None
    best_loss: float | None
    steps: int
    sent_bytes: int
    seconds: float
    seconds_to_common: float | None
    speedup: float | None
    bytes_ratio: float | None


def seconds_to_loss(record: RunRecord, loss: float) -> float | None:
    """When a run first had a validation loss of `loss` or less.

    returns  seconds, on the straight line between the evaluations around that moment; None if it never came
    """
    before = None
    for point in record.curve:
        if point.valid_loss is None:
            continue
        if point.valid_loss <= loss:
            if before is None or not math.isfinite(before[1]) or not math.isfinite(point.valid_loss):
                return point.seconds
            share = (before[1] - loss) / (before[1] - point.valid_loss)  # before[1] > loss >= valid_loss
            return before[0] + share * (point.seconds - before[0])
        before = (point.seconds, point.valid_loss)
    return None


def best_loss(record: RunRecord) -> float | None:
    """The lowest finite validation loss; None if there is none."""
    losses = [p.valid_loss for p in record.curve if p.valid_loss is not None and math.isfinite(p.valid_loss)]
    return min(losses, default=None)


def final_loss(record: RunRecord) -> float | None:
    """The last validation loss, finite or not; None if there is none."""
    return next((p.valid_loss for p in reversed(record.curve) if p.valid_loss is not None), None)


def common_loss(records: Sequence[RunRecord]) -> float | None:
    """The lowest validation loss that every run reached: the highest of their best.

    Runs without a finite validation loss are left out; None if that is all of them.
    """
    return max((best for best in map(best_loss, records) if best is not None), default=None)


def comparison_rows(records: Sequence[RunRecord]) -> list[Row]:
    """A row for each run, in the order given; ratios are against the first."""
    target = common_loss(records)
    reached = [None if target is None else seconds_to_loss(record, target) for record in records]
    return [
        Row(
            label=record.label,
            final_loss=final_loss(record),
            best_loss=best_loss(record),
            steps=record.steps,
            sent_bytes=record.sent_bytes,
            seconds=record.seconds,
            seconds_to_common=seconds,
            speedup=_ratio(reached[0], seconds),
            bytes_ratio=_ratio(record.sent_bytes, records[0].sent_bytes),
        )
        for record, seconds in zip(records, reached, strict=True)
    ]


def _ratio(over: float | None, under: float | None) -> float | None:
    return None if over is None or not under else over / under
