"""The report: one HTML file for a run or for several beside each other. No scripts, nothing fetched, nothing dated.

Equal records give an equal file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from thinwire.errors import ConfigError
from thinwire.report import legends, plots, sections
from thinwire.report.markup import Html, details, element, join, section, text
from thinwire.report.record import RunRecord
from thinwire.report.style import STYLE_SHEET

# The browser's own promise that the page asks the network for nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_report(path: Path | str, records: Sequence[RunRecord], *, title: str) -> None:
    """Write the report of one run, or the comparison of several, the first being the one to compare with.

    path   of the HTML file; folders that are missing are made
    title  heading of the page
    """
    if not records:
        raise ConfigError(
            f"a report {title!r} of no runs",
            expected="one run record, or several to compare",
            mend="pass the records in the order they are to be shown",
        )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # A lone surrogate can come out of JSON and has no UTF-8: a question mark is shown.
    target.write_bytes(page(records, title=title).encode("utf-8", errors="replace"))


def page(records: Sequence[RunRecord], *, title: str) -> str:
    """The whole document."""
    body = join(
        part
        for part in (
            element("header", element("h1", text(title)), sections.subtitle(records)),
            section("Comparison", *sections.comparison(records)) if len(records) > 1 else Html(""),
            section("In short", sections.headlines(records[0])) if len(records) == 1 else Html(""),
            section("What was run", sections.setup(records)),
            _pair(
                _plot("Loss against time", plots.loss_against_time(records), legends.loss_legend(records)),
                _plot("Loss against bytes sent", plots.loss_against_bytes(records), legends.bytes_legend(records)),
            ),
            _plot("Accuracy against time", plots.accuracy_against_time(records), legends.accuracy_legend(records)),
            _pair(
                _plot("Where the time went", plots.time_bars(records), legends.parts_legend(records)),
                section("Bytes by purpose", *sections.purposes(records)),
            ),
            section("Members", *sections.members(records)),
            section("Events", *sections.events(records)),
            section("Configuration", *(_config(record, alone=len(records) == 1) for record in records)),
            section("Versions and machine", sections.versions(records)),
            section("Digest of the final weights", *sections.digests(records)),
        )
        if part
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE_SHEET}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _pair(*parts: Html) -> Html:
    """Side by side where there is room."""
    return element("div", *parts, class_="pair") if any(parts) else Html("")


def _plot(heading: str, svg: Html | None, legend: Html) -> Html:
    return Html("") if svg is None else section(heading, legend, svg)


def _config(record: RunRecord, *, alone: bool) -> Html:
    if not record.config:
        return Html("")
    summary = text("Show the TOML" if alone else record.label)
    return details(summary, element("pre", text(record.config)))
