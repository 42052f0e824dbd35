"""`thinwire chaos`: faults on a run in the lab."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType

import click

from thinwire.cli.train import FREE_FLAGS, configured
from thinwire.config import dump
from thinwire.errors import ConfigError
from thinwire.units import Duration, Rate


@click.command(context_settings=FREE_FLAGS)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[RUN.toml] [--ANY.FIELD VALUE]...")
@click.option("--hosts", default=4, show_default=True, help="Machines, a member on each.")
@click.option("--rate", default="100mbit", show_default=True, help="Of every host's line, both ways.")
@click.option("--script", type=click.Path(path_type=Path), help="File of faults: lines like 12s kill host2.")
@click.option("--fault", "lines", multiple=True, metavar="LINE", help="One such line; may be given several times.")
@click.option("--seed", type=int, help="Draw faults instead.")
@click.option("--fault-every", metavar="TIME", help="With --seed: a fault about that often.  [default: 30s]")
@click.option("--for", "length", metavar="TIME", help="How long to watch; left out: 60 s after the last fault.")
@click.option("--begin", default="2min", show_default=True, help="How long until all members are in the run.")
@click.option("--grace", default="60s", show_default=True, help="How long members may take to leave.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/chaos"), show_default=True)
@click.option("--beside", type=click.Path(path_type=Path), help="Folder of the same run without faults.")
@click.option("--dry", is_flag=True, help="Print the schedule and end.")
def chaos(
    words: tuple[str, ...], hosts: int, rate: str, script: Path | None, lines: tuple[str, ...], seed: int | None,
    fault_every: str | None, length: str | None, begin: str, grace: str, out: Path, beside: Path | None, dry: bool,
) -> int:  # fmt: skip
    """Faults on a run in the lab, and what they cost.

    Host 0 runs `thinwire up`, the others `thinwire join`, in the lab: real processes,
    real lines, real kill -9. Needs root, as `thinwire lab` does. Everything is undone
    at the end. Exit code 2 if members ever disagreed, or a unit was counted twice.

    \b
    thinwire chaos run.toml --fault '20s kill host1'
    thinwire chaos run.toml --seed 7 --fault-every 30s --for 10min --hosts 4
    thinwire chaos run.toml --for 10min --out runs/calm   no faults: to set beside
    """
    from thinwire.chaos import field as places
    from thinwire.chaos import goodput, schedule, watching
    from thinwire.lab import LabSpec

    watched_s = None if length is None else _seconds("--for", length)
    if seed is not None and (script is not None or lines):
        raise ConfigError("--seed with a script", expected="one of them", mend="leave one out")
    if fault_every is not None and seed is None:
        raise ConfigError(
            f"--fault-every {fault_every} without --seed", expected="a seed that faults are drawn from", mend="--seed 1"
        )
    faults: tuple[schedule.Fault, ...] = ()
    if seed is not None:
        faults = schedule.drawn(seed, hosts, _seconds("--fault-every", fault_every or "30s"), watched_s or 600.0)
    elif script is not None or lines:
        faults = schedule.parse("\n".join([_text(script), *lines]), hosts)
    if watched_s is None and not faults:
        raise ConfigError(
            "no faults, and no --for", expected="one of them: what to do, or how long to watch", mend="--for 5min"
        )
    watched_s = watched_s or schedule.end_s(faults) + 60.0
    if dry:
        click.echo("\n".join(map(str, faults)))
        return 0
    run = configured(words, None)
    watching.check_beside(beside)
    places.check_folder(out)
    spec = LabSpec(hosts, rate_bits_per_s=_rate(rate))
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "run.toml").write_text(dump(run), encoding="utf-8")
    fills = frozenset(number for fault in faults if fault.verb == "fill" for number in fault.hosts)
    field = places.Field(spec, out / "run.toml", out, fills, hosts)
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        with field:
            until = watching.carry_out(
                field, faults, length_s=watched_s, begin_limit_s=_seconds("--begin", begin),
                grace_s=_seconds("--grace", grace), tell=lambda text: print(text, file=sys.stderr, flush=True),
            )  # fmt: skip
    finally:
        signal.signal(signal.SIGTERM, before)
    found, other = watching.report(field, until, beside)
    click.echo(goodput.table(found, other))
    watching.refuse(found)
    return 0


def _leave(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _text(script: Path | None) -> str:
    if script is None:
        return ""
    try:
        return script.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--script {script}: {error}", expected="a text file of faults", mend="docs/chaos.md shows one"
        ) from None


def _seconds(flag: str, text: str) -> float:
    try:
        return Duration.parse(text).seconds
    except ConfigError as error:
        raise ConfigError(f"{flag} {text}: {error.wrong}", expected=error.expected, mend=error.mend) from None


def _rate(text: str) -> float:
    try:
        return Rate.parse(text).bits_per_s
    except ConfigError as error:
        raise ConfigError(f"--rate {text}: {error.wrong}", expected=error.expected, mend=error.mend) from None
