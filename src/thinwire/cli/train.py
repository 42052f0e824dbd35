"""`thinwire train`: one run."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from thinwire.cli import DONE, INTERRUPTED
from thinwire.config import Run, TorchLink, load, loads, override
from thinwire.errors import ConfigError
from thinwire.report import run_summary
from thinwire.report.record import RunRecord
from thinwire.train.display import JsonLines, Terminal
from thinwire.train.history import NOT_SAVED
from thinwire.train.launch import CONFIG, REPORT, execute
from thinwire.train.universal import read

FREE_FLAGS = {"ignore_unknown_options": True, "allow_extra_args": True}


@click.command(context_settings=FREE_FLAGS)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[RUN.toml] [--ANY.FIELD VALUE]...")
@click.option("--resume", metavar="FOLDER", help="Go on from the newest checkpoint in this run's folder.")
@click.option("--from", "start", metavar="FILE", help="Go on from a universal checkpoint, of whatever group.")
@click.option("--join", metavar="HOST:PORT", help="Be one member of several machines; member 0 listens there.")
@click.option("--rank", type=int, help="With --join: this member, from 0.")
@click.option("--world", type=int, help="With --join: number of members on all machines.")
@click.option("--json", "as_json", is_flag=True, help="JSON lines on standard output instead of a progress line.")
def train(
    words: tuple[str, ...], resume: str | None, start: str | None, join: str | None, rank: int | None,
    world: int | None, as_json: bool,
) -> int:  # fmt: skip
    """Train a model.

    Every field of the configuration is a flag too: --steps 200 --method diloco --every 50 --codec 'topk(1/64) | int4'.
    docs/configuration.md lists them all. Without a file, the run is the embedded default.

    \b
    thinwire train run.toml --workers 4              four members on this machine
    torchrun --nproc-per-node 4 -m thinwire train run.toml
    thinwire train run.toml --join 203.0.113.7:29500 --rank 1 --world 3
    thinwire train --resume runs/run --steps 800     go on, further
    thinwire train --from all.safetensors --workers 3   go on with another group
    """
    run = _joined(configured(words, resume, start), join, rank, world)
    console = Console(stderr=as_json)
    display = JsonLines(sys.stdout) if as_json else Terminal(console)
    try:
        record = execute(
            run, display=display, resume=resume is not None, start=None if start is None else Path(start),
            machine_readable=as_json,
        )  # fmt: skip
    finally:
        display.close()
    if record is None:
        return INTERRUPTED
    _finished(run, record, console, display if isinstance(display, JsonLines) else None)
    return DONE


def configured(words: tuple[str, ...], resume: str | None, start: str | None = None) -> Run:
    """The run that a file and flags describe."""
    flags = list(words)
    if resume is not None and start is not None:
        raise ConfigError(
            f"--resume {resume} and --from {start}",
            expected="one of them: --resume for the same group, --from for another",
            mend="leave one out",
        )
    if flags and not flags[0].startswith("-"):
        run = load(flags.pop(0))
    elif resume is not None:
        run = load(_file_of(resume))
    elif start is not None:
        run = loads(read(Path(start)).config, source=start)
    else:
        run = Run()
    if resume is None:
        return override(run, flags)
    moved = next((word for word in flags if word.partition("=")[0] == "--out"), None)
    if moved is not None:
        raise ConfigError(
            f"--resume {resume} and {moved}",
            expected="one of them: a run goes on in its own folder",
            mend="leave --out out; to go on elsewhere, copy the folder and resume the copy",
        )
    return replace(override(run, flags), out=resume)


def _file_of(folder: str) -> Path:
    path = Path(folder) / CONFIG
    if not path.exists():
        raise ConfigError(
            f"--resume {folder}: there is no {path}",
            expected="the folder of an earlier run",
            mend="name the folder that the run wrote into, or give its TOML file as well",
        )
    return path


def _joined(run: Run, address: str | None, rank: int | None, world: int | None) -> Run:
    """--join and torchrun choose the torch link; --rank and --world belong to --join."""
    if address is None:
        if rank is not None or world is not None:
            raise ConfigError(
                "--rank and --world without --join",
                expected="--join HOST:PORT beside them",
                mend="leave them out on a single machine; torchrun gives its own",
            )
        under_torchrun = "RANK" in os.environ and not isinstance(run.link, TorchLink)
        return replace(run, link=TorchLink()) if under_torchrun else run
    before = run.link if isinstance(run.link, TorchLink) else TorchLink()
    # One member here, unless the file says that this machine has several.
    workers = run.workers if isinstance(run.link, TorchLink) and run.link.address is not None else 1
    return replace(run, workers=workers, link=replace(before, address=address, rank=rank, world=world))


def _finished(run: Run, record: RunRecord, console: Console, lines: JsonLines | None) -> None:
    """The end, told once: by member 0's process, which for workers of this machine is not this one."""
    if "RANK" in os.environ and os.environ["RANK"] != "0":
        return
    if run.workers > 1 and isinstance(run.link, TorchLink) and "RANK" not in os.environ:
        return  # member 0 has told it
    if lines is not None:
        members = [asdict(member) for member in record.members]
        lines.write("finished", final=dict(record.final), digest=record.digest, sent_bytes=record.sent_bytes,
                    seconds=record.seconds, members=members, out=run.out)  # fmt: skip
        return
    unsaved = [event.text for event in record.events if event.kind == NOT_SAVED]
    if unsaved:
        console.print(
            Text(f"{len(unsaved)} checkpoints are missing; the last: {unsaved[-1]}", "yellow"), soft_wrap=True
        )
    if isinstance(run.link, TorchLink) and run.link.rank not in (None, 0):
        console.print(
            f"Done; member 0 has the report and the weights, whose digest is {record.digest}.", soft_wrap=True
        )
        return
    console.print(run_summary(record))
    for name, path in (("report", REPORT), ("weights", "model.safetensors")):
        console.print(Text(f"{name:7}  {Path(run.out) / path}"), soft_wrap=True)
