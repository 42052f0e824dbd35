"""The flag --uplink of commands that give newcomers the state."""

from __future__ import annotations

import click

from thinwire.elastic.exhibit import Exhibit
from thinwire.errors import ConfigError
from thinwire.units import Rate


def _checked(context: click.Context, option: click.Parameter, typed: str) -> str:
    try:
        Exhibit(Rate.parse(typed))
    except ConfigError as error:
        raise ConfigError(f"--uplink {typed}: {error.wrong}", expected=error.expected, mend=error.mend) from error
    return typed


with_uplink = click.option(
    "--uplink", default="100mbit", show_default=True, metavar="RATE", callback=_checked,
    help="Of this machine; newcomers that fetch the state get 30 % of it.",
)  # fmt: skip
