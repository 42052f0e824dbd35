"""The doctor's findings as a person reads them."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from thinwire.doctor.advice import MODELS, STEP_S, readable_rate, readable_time
from thinwire.doctor.machine import Report
from thinwire.doctor.pair import PairReport


def render_report(report: Report) -> RenderableType:
    """This machine, and what to do about it."""
    devices, versions = report.devices, report.versions
    gib = 1 << 30
    rows = {
        "thinwire": versions.thinwire,
        "torch": f"{versions.torch}, Python {versions.python}, {versions.system}",
        "processors": f"{devices.usable_processors} usable of {devices.processors}, "
        f"torch uses {devices.torch_threads} threads",
        "GPUs": ", ".join(devices.cuda) or ("Apple MPS" if devices.mps else "none"),
        "memory": f"{report.free_memory_bytes / gib:.1f} GiB free of {report.memory_bytes / gib:.1f}",
        "backends": ", ".join(report.backends) or "none",
        "extras": ", ".join(f"{extra.name} {'incomplete' if extra.missing else 'yes'}" for extra in report.extras),
        "lab": report.lab.obstacle or f"yes, delays by {'netem' if report.lab.netem else 'the switch of its own'}",
        "clock": report.utc,
    }
    return Group(_two_columns(rows), *_sentences(report.advice))


def render_pair(report: PairReport) -> RenderableType:
    """The link, what synchronising over it costs, and what to do about it."""
    rows = {
        "other host": f"{report.theirs.address}, thinwire {report.theirs.versions.thinwire}, "
        f"torch {report.theirs.versions.torch}",
        "round trip": f"{readable_time(report.round_trip_s)}, slowest {readable_time(report.slowest_s)}",
        "sending": readable_rate(report.sent_bits_per_s),
        "receiving": readable_rate(report.received_bits_per_s),
        "other clock": f"{report.clock_ahead_s:+.3f} s, give or take {readable_time(report.round_trip_s / 2)}",
    }
    return Group(_two_columns(rows), _costs(report), *_sentences(report.advice))


def _costs(report: PairReport) -> Table:
    """A row a model, a column a codec."""
    shown = Table(title=f"One synchronisation of two members, and the steps of {STEP_S:g} s that hide it")
    shown.add_column("parameters")
    for codec in dict.fromkeys(cost.codec for cost in report.costs):
        shown.add_column(codec, justify="right")
    for name, parameters in MODELS.items():
        cells = [f"{readable_time(c.time_s)}  ({c.every:,})" for c in report.costs if c.parameters == parameters]
        shown.add_row(name, *cells)
    return shown


def _two_columns(rows: dict[str, str]) -> Table:
    shown = Table(show_header=False, box=None)
    for name, text in rows.items():
        shown.add_row(name, Text(text))
    return shown


def _sentences(advice: tuple[str, ...]) -> list[Text]:
    return [Text(f"- {sentence}") for sentence in advice]
