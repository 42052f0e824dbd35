"""Legends: which colour and mark stands for which run, or for which part of the time."""

from __future__ import annotations

from collections.abc import Sequence

from thinwire.report import svg
from thinwire.report.compare import common_loss, final_loss
from thinwire.report.markup import Html, element, text
from thinwire.report.plots import PARTS, glyph
from thinwire.report.record import RunRecord
from thinwire.report.words import number_text


def run_label(index: int, label: str) -> Html:
    """A run's label beside its mark in the plots."""
    return _mark(f"c{index % svg.CURVES}", glyph(index), label)


def loss_legend(records: Sequence[RunRecord]) -> Html:
    """Which curve is which run, and which loss."""
    validated = [final_loss(record) is not None for record in records]
    if len(records) == 1:
        words = "validation; the fine line is the training loss" if validated[0] else "training"
        return _legend([_mark("c0", glyph(0), words)])
    marks = [
        run_label(i, record.label + ("" if validated[i] else " (training loss)")) for i, record in enumerate(records)
    ]
    target = common_loss(records)
    level = [] if target is None else [_mark("soft", "┈", f"reached by all: {number_text(target)}")]
    return _legend(marks + level)


def accuracy_legend(records: Sequence[RunRecord]) -> Html:
    """Which curve is which run."""
    if len(records) == 1:
        return _legend([_mark("c0", glyph(0), "validation")])
    return _legend([run_label(i, record.label) for i, record in enumerate(records)])


def bytes_legend(records: Sequence[RunRecord]) -> Html:
    """The same, and who has no place on an axis of bytes."""
    silent = [record.label for record in records if not any(point.sent_bytes for point in record.curve)]
    note = element("p", text(f"Sent nothing: {', '.join(silent)}."), class_="soft") if silent else Html("")
    return Html(loss_legend(records) + note)


def parts_legend(records: Sequence[RunRecord]) -> Html:
    """Which part of a bar is which, and whose bars they are."""
    names = [*(name for name, _ in PARTS), "hidden communication (thin bar: beside the compute, cost no time)"]
    whose = (
        [element("p", text("Each bar is the mean over a run's members."), class_="soft")] if len(records) > 1 else []
    )
    return Html("".join([_legend([_mark(f"p{i}", "■", name) for i, name in enumerate(names)]), *whose]))


def _legend(marks: Sequence[Html]) -> Html:
    return element("ul", *(element("li", mark) for mark in marks), class_="legend")


def _mark(colour: str, sign: str, words: str) -> Html:
    return Html(element("span", text(sign), class_=colour, aria_hidden="true") + " " + text(words))
