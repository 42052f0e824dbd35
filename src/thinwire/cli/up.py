"""`thinwire up`: start a run that others join."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path

import click

from thinwire.cli.train import FREE_FLAGS, configured
from thinwire.cli.uplink import with_uplink
from thinwire.config import Run, dump
from thinwire.elastic import journal
from thinwire.elastic.registry import get
from thinwire.errors import ConfigError, LinkError
from thinwire.train.elastic import newest
from thinwire.train.launch import write_config
from thinwire.train.member import Order, peers
from thinwire.train.supervise import Lighthouse, free_port, look_after
from thinwire.version import __version__


@click.command(context_settings=FREE_FLAGS)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[RUN.toml] [--ANY.FIELD VALUE]...")
@click.option("--bind", default="127.0.0.1", show_default=True, metavar="HOST", help="This machine, as others see it.")
@click.option("--port", default=29400, show_default=True, help="Where others join; 0 takes a free one.")
@click.option("--token", metavar="T", help="What others must know to join; made and printed if left out.")
@click.option("--at-least", default=1, show_default=True, metavar="N", help="Members before the first step.")
@click.option("--members-here", default=1, show_default=True, metavar="K", help="Members on this machine.")
@click.option("--epochs", default=0, metavar="E", help="End once E epochs are done, or with --steps.")
@click.option("--resume", metavar="FOLDER", help="Go on from the newest checkpoint in this run's folder.")
@with_uplink
@click.option("--isolate", is_flag=True, help="Members that are slow or damaged again and again leave.")
@click.option("--json", "as_json", is_flag=True, help="JSON lines on standard output instead of a progress line.")
def up(
    words: tuple[str, ...], bind: str, port: int, token: str | None, at_least: int, members_here: int, epochs: int,
    resume: str | None, uplink: str, isolate: bool, as_json: bool,
) -> int:  # fmt: skip
    """Start a run that others can join at any time.

    Prints the line that others type. Every field of the configuration is a flag, as
    for `thinwire train`; without a file, the run is the embedded default. Ctrl-C
    leaves after the round, twice at once; the others go on without this machine.

    \b
    thinwire up run.toml --bind 203.0.113.7 --at-least 2
    thinwire up --resume runs/run             after all machines were down
    """
    run = configured(words, resume)
    for name, value, least in (
        ("--at-least", at_least, 1),
        ("--members-here", members_here, 1),
        ("--epochs", epochs, 0),
    ):
        if value < least:
            raise ConfigError(f"{name} {value}", expected=f"{least} or more", mend="leave it out for the default")
    run.method.build()
    out = Path(run.out)
    _claim(out, resume)
    write_config(run)
    token = token or secrets.token_hex(16)
    port = port or free_port(bind)
    run_id = secrets.token_hex(4)
    lighthouse = Lighthouse(f"{bind}:0", out / "logs" / "lighthouse.log")
    try:
        _tell(bind, port, token, as_json)

        def order(place: int, life: int) -> Order | None:
            told = Order(
                dump(run), run_id, token, "up", bind, 0 if place else port, [lighthouse.address], at_least, epochs,
                shows="nothing" if place else "json" if as_json else "terminal", uplink=uplink,
                isolate=isolate,
            )  # fmt: skip
            return again(told, run, resume is not None or life > 0)

        return look_after(members_here, order, out / "logs", beside=lighthouse.look)
    finally:
        lighthouse.close()


def again(order: Order, run: Run, restarts: bool) -> Order | None:
    """The order for one who may have been in the run before; None if that has ended.

    If others go on, it is theirs; else from the newest checkpoint here.
    """
    from dataclasses import replace

    out = Path(run.out)
    if not restarts or not _has_begun(out):
        return order
    for address in peers(out):
        try:
            found = get(address, "/run", order.token, limit_s=2.0)
        except (LinkError, ConfigError):
            continue
        if found["ended"]:
            return None
        if not found["holds"]:  # it waits for others itself
            continue
        return replace(
            order, lighthouses=list(found["lighthouses"]), begun=True, run_id=found["id"], registries=peers(out)
        )
    kept = newest(out) is not None
    return replace(order, begun=True, resume=str(out) if kept else "")


def _has_begun(out: Path) -> bool:
    """Whether a round was committed, by the logs that are here."""
    try:
        logs = journal.read(out)
    except ConfigError:
        return newest(out) is not None
    return any(line["event"] == "round" for lines in logs.values() for line in lines)


def _claim(out: Path, resume: str | None) -> None:
    """A new run does not write over an old one's logs and checkpoints."""
    if resume is None and any((out / journal.FOLDER).glob("*.jsonl")):
        raise ConfigError(
            f"{out} holds the logs of an earlier run",
            expected="a folder of its own for a new run",
            mend=f"go on with it: thinwire up --resume {out}; or choose another folder with --out",
        )


def _tell(bind: str, port: int, token: str, as_json: bool) -> None:
    where = sys.stderr if as_json else sys.stdout
    print(f"thinwire {__version__}. Others join with\n", file=where)
    print(f"  thinwire join {bind}:{port} --token {token}\n", file=where)
    print(f"and anybody sees how it goes at http://{bind}:{port}/#{token}", file=where)
    if bind.startswith("127."):
        print("Members of this machine alone can come; --bind ADDRESS lets other machines in.", file=where)
    where.flush()
