"""`thinwire lab`: hosts and limited links on one machine."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from thinwire.errors import ConfigError
from thinwire.lab import LabSpec, clean, run, table
from thinwire.units import Duration, Rate


@click.group(short_help="Hosts and limited links on one machine.")
def lab() -> None:
    """Hosts and limited links on one machine: real sockets, real congestion. Needs root and iproute2."""


@lab.command("run", short_help="Run a command once on every host.", context_settings={"ignore_unknown_options": True})
@click.option("--hosts", default=4, show_default=True, help="How many.")
@click.option("--rate", default="unlimited", show_default=True, help="Of every host's line, both ways: 20mbit.")
@click.option("--down-rate", help="Of the line to the host, if it is another one.")
@click.option("--delay", default="0ms", show_default=True, help="One way, on top of the transmission: 40ms.")
@click.option("--mtu", default=9000, show_default=True, help="Bytes of a packet; 1500 is most of the internet.")
@click.option("--grace", default="30s", show_default=True, help="What the others may take to end after one failed.")
@click.option("--logs", type=click.Path(path_type=Path), help="Folder for the output of hosts 1, 2, ...")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run_command(
    hosts: int, rate: str, down_rate: str | None, delay: str, mtu: int, grace: str, logs: Path | None,
    command: tuple[str, ...],
) -> int:  # fmt: skip
    """Run a command once on every host, with the environment that torchrun gives.

    \b
    thinwire lab run --rate 20mbit --delay 40ms -- thinwire train run.toml

    Afterwards every interface's own counters are shown beside the command's byte ledger.
    """
    spec = LabSpec(
        hosts,
        rate_bits_per_s=_rate("--rate", rate),
        down_rate_bits_per_s=None if down_rate is None else _rate("--down-rate", down_rate) or float("inf"),
        delay_s=_duration("--delay", delay),
        mtu=mtu,
    )
    result = run(spec, command, grace_s=_duration("--grace", grace), logs=logs)
    Console(stderr=True).print(table(result))
    return result.exit_code


@lab.command("clean")
def clean_command() -> None:
    """Remove what is left of labs whose process is gone."""
    names = clean()
    click.echo("removed " + ", ".join(names) if names else "nothing to remove")


def _rate(flag: str, text: str) -> float | None:
    if text == "unlimited":
        return None
    try:
        return Rate.parse(text).bits_per_s
    except ConfigError as error:
        raise ConfigError(f"{flag} {text}: {error.wrong}", expected=error.expected, mend=error.mend) from None


def _duration(flag: str, text: str) -> float:
    try:
        return Duration.parse(text).seconds
    except ConfigError as error:
        raise ConfigError(f"{flag} {text}: {error.wrong}", expected=error.expected, mend=error.mend) from None
