"""What a run leaves to look at: its record, tables for the terminal, and one HTML file."""

from __future__ import annotations

from thinwire.report.compare import Row, common_loss, comparison_rows, seconds_to_loss
from thinwire.report.page import write_report
from thinwire.report.record import Event, Member, Point, RunRecord
from thinwire.report.terminal import comparison_table, run_summary

__all__ = [
    "Event",
    "Member",
    "Point",
    "Row",
    "RunRecord",
    "common_loss",
    "comparison_rows",
    "comparison_table",
    "run_summary",
    "seconds_to_loss",
    "write_report",
]
