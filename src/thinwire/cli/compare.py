"""`thinwire compare`: the same work under several methods, one table, one report."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console

from thinwire.cli import DONE, INTERRUPTED
from thinwire.cli.train import FREE_FLAGS
from thinwire.config import Run, SimulatedLink, load, named_methods, override
from thinwire.errors import ConfigError
from thinwire.options import of_function, unknown
from thinwire.report import comparison_table, write_report
from thinwire.report.record import RunRecord
from thinwire.train.display import JsonLines, Terminal
from thinwire.train.launch import REPORT, execute


@click.command(context_settings=FREE_FLAGS)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[RUN.toml]... [--ANY.FIELD VALUE]...")
@click.option("--methods", metavar="NAME,NAME,...", help="Run each file under each of these methods.")
@click.option("--json", "as_json", is_flag=True, help="JSON lines on standard output.")
def compare(words: tuple[str, ...], methods: str | None, as_json: bool) -> int:
    """Compare runs: loss against bytes and against time.

    \b
    thinwire compare a.toml b.toml
    thinwire compare --methods ddp,diloco,streaming --steps 300 --rate 5mbit

    Without a file, the work is the embedded default on a simulated link. Flags hold for all runs; what only some of the
    methods can be told (--every 20) holds for those.
    """
    files = list(itertools.takewhile(lambda word: not word.startswith("--"), words))
    flags = list(words[len(files) :])
    bases = [(Path(file).stem, load(file)) for file in files] or [("run", Run(link=SimulatedLink()))]
    names = _names(methods) if methods is not None else [None]
    runs: list[tuple[str, Run]] = []
    for stem, base in bases:
        for name in names:
            own = flags if name is None else ["--method", name, *_flags_for(name, names, flags)]
            chosen = override(base, own)
            label = stem if name is None else name if len(bases) == 1 else f"{stem} {name}"
            runs.append((label, chosen))
    if len(runs) < 2:
        raise ConfigError(
            "one run to compare", expected="two or more", mend="name several files, or --methods ddp,diloco,streaming"
        )
    folder = Path(bases[0][1].out).parent / "compare"
    records = carry_out(
        [(label, replace(run, out=str(folder / f"{index}-{label}"))) for index, (label, run) in enumerate(runs)],
        as_json,
    )
    if records is None:
        return INTERRUPTED
    conclude(records, folder / REPORT, " against ".join(label for label, _ in runs), as_json)
    return DONE


def _names(methods: str) -> list[str | None]:
    names, known = [name.strip() for name in methods.split(",")], named_methods()
    for name in names:
        if name not in known:
            raise unknown(f"--methods {methods}: there is no method {name!r}", name, known, what="names among")
    return [*names]


def _flags_for(name: str, names: Sequence[str | None], flags: Sequence[str]) -> list[str]:
    """The flags without those that are for other methods of the comparison only."""
    known = named_methods()
    others = {option for each in names if each is not None for option in of_function(known[each])}
    foreign = others - set(of_function(known[name]))
    kept, left = [], list(flags)
    while left:
        words = [left.pop(0)]
        if "=" not in words[0] and left and not left[0].startswith("--"):
            words.append(left.pop(0))
        flag = words[0].lstrip("-").partition("=")[0].replace("-", "_").removeprefix("method.")
        kept += [] if flag in foreign else words
    return kept


def carry_out(runs: Sequence[tuple[str, Run]], as_json: bool) -> list[RunRecord] | None:
    """Run one after the other; None if one was stopped."""
    records = []
    for label, run in runs:
        display = JsonLines(sys.stdout) if as_json else Terminal(Console(), label)
        _empty(Path(run.out))
        try:
            record = execute(run, display=display, machine_readable=as_json)
        finally:
            display.close()
        if record is None:
            return None
        records.append(replace(record, label=label))
    return records


def conclude(records: Sequence[RunRecord], report: Path, title: str, as_json: bool) -> None:
    """One table and one report."""
    report.parent.mkdir(parents=True, exist_ok=True)
    write_report(report, records, title=title)
    if as_json:
        for record in records:
            JsonLines(sys.stdout).write(
                "compared",
                label=record.label,
                final=dict(record.final),
                sent_bytes=record.sent_bytes,
                seconds=record.seconds,
            )
        return
    console = Console()
    console.print(comparison_table(records))
    console.print(f"report  {report}", highlight=False)


def _empty(folder: Path) -> None:
    """A comparison starts anew every time: checkpoints of the last one are removed."""
    for old in folder.glob("checkpoints/*/*.safetensors"):
        old.unlink()
