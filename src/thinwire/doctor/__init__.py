"""What is wrong with this machine, or with the link to that one, and what to do about it. See docs/lab.md."""

from thinwire.doctor.advice import SyncCost
from thinwire.doctor.machine import Report, Versions, examine
from thinwire.doctor.pair import Note, PairReport, call, listen
from thinwire.doctor.reach import Route, parse_address, reach
from thinwire.doctor.report import render_pair, render_report

__all__ = [
    "Note",
    "PairReport",
    "Report",
    "Route",
    "SyncCost",
    "Versions",
    "call",
    "examine",
    "listen",
    "parse_address",
    "reach",
    "render_pair",
    "render_report",
]
