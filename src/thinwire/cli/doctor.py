"""`thinwire doctor`: what this machine has, and what lies between it and another one."""

from __future__ import annotations

import json

import click
from rich.console import Console

from thinwire.doctor import call, examine, listen, render_pair, render_report


@click.command(short_help="Look at this machine, or the way to another.")
@click.argument("peer", required=False, metavar="[HOST:PORT]")
@click.option("--listen", "port", type=click.IntRange(1, 65535), metavar="PORT", help="Wait here for the other host.")
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")
def doctor(peer: str | None, port: int | None, as_json: bool) -> None:
    """Look at this machine, or at the way to another one.

    \b
    thinwire doctor                        versions, devices, what is missing
    thinwire doctor --listen 29500         on the host that the others will dial
    thinwire doctor 203.0.113.7:29500      on another one: what lies between them
    """
    if peer is not None and port is not None:
        raise click.UsageError("give HOST:PORT to call or --listen PORT to wait, not both")
    if peer is None and port is None:
        report = examine()
        shown, told = render_report(report), report.as_dict()
    else:
        pair = listen(port) if port is not None else call(peer or "")
        shown, told = render_pair(pair), pair.as_dict()
    if as_json:
        click.echo(json.dumps(told, indent=1))
    else:
        Console().print(shown)
