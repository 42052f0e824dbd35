"""The same numbers as the page's, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from thinwire.report.compare import best_loss, common_loss, comparison_rows, final_loss
from thinwire.report.record import ANSWERS, RunRecord
from thinwire.report.words import (
    bytes_text,
    count_text,
    maybe_seconds_text,
    number_text,
    seconds_text,
    share_of_first_text,
    times_text,
)


def comparison_table(records: Sequence[RunRecord]) -> Table:
    """A row for each run; ratios are against the first."""
    target = common_loss(records)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("\nrun", overflow="fold")
    to_target = "time to\nloss" if target is None else f"time to\n{number_text(target)}"
    for name in ("final\nloss", "sent by\na member", "against\nthe first", "\ntime", to_target, "speed-\nup"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in comparison_rows(records):
        table.add_row(
            Text(row.label),  # Text, not str: a label's brackets are no markup
            number_text(row.final_loss),
            bytes_text(row.sent_bytes),
            share_of_first_text(row.bytes_ratio),
            seconds_text(row.seconds),
            maybe_seconds_text(row.seconds_to_common),
            times_text(row.speedup),
        )
    return table


def run_summary(record: RunRecord) -> Table:
    """The method's six answers and the run's headline numbers, a line each."""
    table = Table(
        title=Text(record.label), box=None, show_header=False, pad_edge=False, title_justify="left", title_style="bold"
    )
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name in ANSWERS:
        if name in record.method:
            table.add_row(name, Text(record.method[name]))
    for name, words in _headlines(record):
        table.add_row(Text(name), Text(words))
    return table


def _headlines(record: RunRecord) -> list[tuple[str, str]]:
    train = record.curve[-1].train_loss if record.curve else None
    return [
        ("network", f"{record.network} ({record.clock} clock)"),
        ("members", f"{len(record.members)}, {count_text(record.parameters)} parameters"),
        ("steps", f"{count_text(record.steps)} in {seconds_text(record.seconds)}"),
        ("rounds", f"{count_text(record.rounds_committed)} committed, {count_text(record.rounds_skipped)} skipped"),
        ("sent", f"{bytes_text(record.sent_bytes)} by each member, in the mean"),
        ("communication", f"{seconds_text(record.exposed_s)} exposed, {seconds_text(record.hidden_s)} hidden"),
        ("training loss", number_text(train)),
        ("validation loss", f"{number_text(final_loss(record))} (best {number_text(best_loss(record))})"),
        *((f"final {name}", number_text(value)) for name, value in record.final.items()),
        ("weights", record.digest),
    ]
