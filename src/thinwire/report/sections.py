"""The parts of the page that are words and numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

from thinwire.report.compare import best_loss, common_loss, comparison_rows, final_loss
from thinwire.report.legends import run_label
from thinwire.report.markup import Html, details, element, join, table, text
from thinwire.report.record import ANSWERS, Event, Member, RunRecord
from thinwire.report.words import (
    ABSENT,
    bytes_text,
    count_text,
    maybe_seconds_text,
    number_text,
    percent_text,
    seconds_text,
    share_of_first_text,
    times_text,
)

_MOST_EVENTS = 200  # of one run; their kinds are counted all the same
_EXPOSED = (
    "Exposed: a member stood still for a round, for the link (wait) or for its own coding (encode). "
    "Hidden: a round ran beside the compute and is in no other time; its coding still takes processor time."
)
_CLOCKS = {"simulated": "simulated network, simulated seconds", "wall": "real seconds"}


def subtitle(records: Sequence[RunRecord]) -> Html:
    """What all runs have in common, on one line."""
    counts = sorted({len(record.members) for record in records})
    shared = [
        f"{len(records)} runs" if len(records) > 1 else records[0].label,
        f"{' or '.join(map(str, counts))} member{'' if counts == [1] else 's'}",
        *_if_shared([record.network for record in records]),
        *_if_shared([_CLOCKS[record.clock] for record in records]),
    ]
    return element("p", text(" · ".join(shared)), class_="soft")


def comparison(records: Sequence[RunRecord]) -> list[Html]:
    """The table of a comparison, what it comes to in a sentence, and what makes it unfair."""
    rows, target = comparison_rows(records), common_loss(records)
    least = min((row.best_loss for row in rows if row.best_loss is not None), default=None)
    head = ["Run", "Final loss", "Best loss", "Steps", "Sent by a member", "Against the first", "Exposed", "Hidden"]
    head += ["Time"]
    head += ["Time to loss" if target is None else f"Time to loss {number_text(target)}", "Speed-up"]
    body = [
        [
            run_label(index, row.label),
            text(number_text(row.final_loss)),
            _best(number_text(row.best_loss), row.best_loss is not None and row.best_loss == least),
            text(count_text(row.steps)),
            text(bytes_text(row.sent_bytes)),
            text(share_of_first_text(row.bytes_ratio)),
            text(seconds_text(records[index].exposed_s)),
            text(seconds_text(records[index].hidden_s)),
            text(seconds_text(row.seconds)),
            text(maybe_seconds_text(row.seconds_to_common)),
            text(times_text(row.speedup)),
        ]
        for index, row in enumerate(rows)
    ]
    shown = table([text(name) for name in head], body, numbers_from=1, caption="comparison of the runs")
    note = element("p", text(f"{_EXPOSED} Both are means over members."), class_="soft")
    return [element("div", shown, class_="runs"), note, _verdict(records), _unlike(records)]


def _verdict(records: Sequence[RunRecord]) -> Html:
    """Who was first at the loss that all reached."""
    rows, target = comparison_rows(records), common_loss(records)
    timed = [(row.seconds_to_common, row) for row in rows if row.seconds_to_common is not None]
    if target is None or len(timed) < 2:
        return Html("")
    seconds, first = min(timed, key=lambda pair: pair[0])
    who = "every run" if len(timed) == len(rows) else "every run with a finite validation loss"
    told = f"The loss {number_text(target)} was reached by {who}; first by {first.label}, after {seconds_text(seconds)}"
    if first.speedup is not None and first is not rows[0]:
        told += f", {times_text(first.speedup)} as fast as {rows[0].label}"
    return element("p", text(f"{told}. Losses are validation losses."))


def _unlike(records: Sequence[RunRecord]) -> Html:
    """What the runs should have in common and do not."""
    views: dict[str, Callable[[RunRecord], object]] = {
        "network": lambda record: record.network,
        "clock": lambda record: record.clock,
        "machine": lambda record: record.machine,
        "number of members": lambda record: len(record.members),
        "number of parameters": lambda record: record.parameters,
        "seed": lambda record: record.seed,
        "library versions": lambda record: tuple(sorted(record.versions.items())),
    }
    unlike = [name for name, view in views.items() if len({view(record) for record in records}) > 1]
    if not unlike:
        return Html("")
    return element("p", text(f"These runs also differ in: {', '.join(unlike)}. Compare with care."), class_="note")


def headlines(record: RunRecord) -> Html:
    """The numbers of one run that matter most."""
    last = record.curve[-1] if record.curve else None
    whole = sum(_member_seconds(member) for member in record.members)
    rounds = record.rounds_committed + record.rounds_skipped
    numbers: list[tuple[str, str, str]] = []
    if (final := final_loss(record)) is not None:
        numbers.append(("Best validation loss", number_text(best_loss(record)), f"the last one {number_text(final)}"))
    if last is not None:
        numbers.append(("Training loss", number_text(last.train_loss), f"at step {count_text(last.step)}"))
    numbers += [(f"Final {name}", number_text(value), "") for name, value in record.final.items()]
    numbers += [
        ("Time", seconds_text(record.seconds), _CLOCKS[record.clock]),
        ("Sent by a member", bytes_text(record.sent_bytes), f"mean of {len(record.members)}"),
        ("Rounds committed", count_text(record.rounds_committed), f"{count_text(record.rounds_skipped)} skipped"),
    ]
    if rounds:
        numbers.append(("Sent in a round", bytes_text(record.sent_bytes / rounds), "by a member, in the mean"))
    if 0 < whole < math.inf:
        share = record.exposed_s * len(record.members) / whole
        stood_still = f"{percent_text(share)} of the members' time, which stood still"
        numbers.append(("Exposed communication", seconds_text(record.exposed_s), stood_still))
        numbers.append(("Hidden communication", seconds_text(record.hidden_s), "beside the compute"))
    return element("dl", *(_number(*entry) for entry in numbers), class_="numbers")


def _number(name: str, value: str, remark: str) -> Html:
    small = [element("small", text(remark))] if remark else []
    return element("div", element("dt", text(name)), element("dd", text(value), *small))


def setup(records: Sequence[RunRecord]) -> Html:
    """The six answers, and where the method was run; a column for each run."""
    facts = [(_question(name, question), _answer(name)) for name, question in ANSWERS.items()]
    facts += [
        (text("network"), lambda record: record.network),
        (text("clock"), lambda record: _CLOCKS[record.clock]),
        (text("members"), lambda record: count_text(len(record.members))),
        (text("parameters"), lambda record: count_text(record.parameters)),
        (text("seed"), lambda record: str(record.seed)),
    ]
    return _columns(records, facts, caption="what was run")


def versions(records: Sequence[RunRecord]) -> Html:
    """Machine and libraries; a column for each run."""
    names = list(dict.fromkeys(name for record in records for name in record.versions))
    facts: list[tuple[Html, Callable[[RunRecord], str]]] = [(text("machine"), lambda record: record.machine)]
    facts += [(text(name), _version(name)) for name in names]
    return _columns(records, facts, caption="versions and machine")


def _answer(name: str) -> Callable[[RunRecord], str]:
    return lambda record: record.method.get(name, ABSENT)


def _version(name: str) -> Callable[[RunRecord], str]:
    return lambda record: record.versions.get(name, ABSENT)


def _columns(
    records: Sequence[RunRecord], facts: Sequence[tuple[Html, Callable[[RunRecord], str]]], *, caption: str
) -> Html:
    """A row for each fact, a column for each run; one column where all runs agree on everything."""
    values = [[fact(record) for _, fact in facts] for record in records]
    merged = len(records) > 1 and all(column == values[0] for column in values)
    columns = values[:1] if merged else values
    heads = [text("all runs")] if merged else [run_label(i, record.label) for i, record in enumerate(records)]
    if len(records) == 1:
        heads = [text(records[0].label)]
    rows = [[name, *(text(column[i]) for column in columns)] for i, (name, _) in enumerate(facts)]
    shown = table([Html(""), *heads], rows, numbers_from=len(heads) + 1, caption=caption)
    return element("div", shown, class_="facts")


def purposes(records: Sequence[RunRecord]) -> list[Html]:
    """What the bytes were for, summed over members."""

    def one(record: RunRecord) -> Html:
        whole = sum(sent for sent, _ in record.bytes_by_purpose.values())
        ordered = sorted(record.bytes_by_purpose.items(), key=lambda item: (-item[1][0], item[0]))
        rows = [
            [
                text(purpose),
                text(bytes_text(sent)),
                text(bytes_text(received)),
                text(percent_text(sent / whole) if whole else ABSENT),
            ]
            for purpose, (sent, received) in ordered
        ]
        head = [text(name) for name in ("Purpose", "Sent", "Received", "Share of sent")]
        return table(head, rows, numbers_from=1, caption=f"bytes by purpose: {record.label}")

    shown = _per_run(records, one, lambda record: bool(record.bytes_by_purpose))
    note = element("p", text("Summed over members, counted at the link."), class_="soft")
    return [note, *shown] if shown else []


def members(records: Sequence[RunRecord]) -> list[Html]:
    """A table for each run, a row for each member."""

    def one(record: RunRecord) -> Html:
        tokens = any(member.tokens for member in record.members)
        columns = _MEMBER_COLUMNS if tokens else [column for column in _MEMBER_COLUMNS if column[0] != "Tokens"]
        rows = [[text(view(member)) for _, view in columns] for member in record.members]
        head = [text(name) for name, _ in columns]
        return table(head, rows, numbers_from=1, caption=f"members: {record.label}")

    shown = _per_run(records, one, lambda record: bool(record.members))
    return [element("p", text(_EXPOSED), class_="soft"), *shown] if shown and len(records) == 1 else shown


_MEMBER_COLUMNS: list[tuple[str, Callable[[Member], str]]] = [
    ("Member", lambda member: str(member.rank)),
    ("Rounds", lambda member: count_text(member.rounds)),
    ("Samples", lambda member: count_text(member.samples)),
    ("Tokens", lambda member: count_text(member.tokens)),
    ("Sent", lambda member: bytes_text(member.sent_bytes)),
    ("Received", lambda member: bytes_text(member.received_bytes)),
    ("Compute", lambda member: seconds_text(member.compute_s)),
    ("Encode", lambda member: seconds_text(member.encode_s)),
    ("Wait", lambda member: seconds_text(member.wait_s)),
    ("Apply", lambda member: seconds_text(member.apply_s)),
    ("Hidden", lambda member: seconds_text(member.hidden_s)),
]


def events(records: Sequence[RunRecord]) -> list[Html]:
    """What happened on the way, the first of them one by one."""

    def row(event: Event) -> list[Html]:
        when = seconds_text(event.seconds).replace(" ", "\u00a0")  # not to be broken where the last column is wide
        return [text(count_text(event.step)), text(when), text(event.kind), text(event.text)]

    def one(record: RunRecord) -> Html:
        kinds = Counter(event.kind for event in record.events)
        told = ", ".join(f"{count_text(count)} × {kind}" for kind, count in kinds.most_common())
        if len(record.events) > _MOST_EVENTS:
            told += f"; the first {_MOST_EVENTS} are shown"
        head = [text(name) for name in ("Step", "Time", "Kind", "What happened")]
        rows = [row(event) for event in record.events[:_MOST_EVENTS]]
        shown = table(head, rows, numbers_from=len(head), caption=f"events: {record.label}")
        return join([element("p", text(told), class_="soft"), shown])

    shown = _per_run(records, one, lambda record: bool(record.events))
    return shown or [element("p", text("None was recorded."), class_="soft")]


def digests(records: Sequence[RunRecord]) -> list[Html]:
    """Equal digests are equal weights, to the bit."""
    alone = len(records) == 1
    return [
        element("p", *([] if alone else [text(f"{record.label}: ")]), element("code", text(record.digest)))
        for record in records
        if record.digest
    ]


def _per_run(
    records: Sequence[RunRecord], view: Callable[[RunRecord], Html], has: Callable[[RunRecord], bool]
) -> list[Html]:
    """One run's part as it is, several folded under their labels with the first one open."""
    if len(records) == 1:
        return [view(record) for record in records if has(record)]
    return [
        details(run_label(i, record.label), view(record), opened=i == 0)
        for i, record in enumerate(records)
        if has(record)
    ]


def _question(name: str, question: str) -> Html:
    return Html(text(name) + " " + element("span", text(question), class_="soft"))


def _best(words: str, best: bool) -> Html:
    return element("span", text(words), class_="best") if best else text(words)


def _if_shared(words: Sequence[str]) -> list[str]:
    return [words[0]] if len(set(words)) == 1 and words[0] else []


def _member_seconds(member: Member) -> float:
    return member.compute_s + member.encode_s + member.wait_s + member.apply_s
