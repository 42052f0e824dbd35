"""The `thinwire` command."""

from __future__ import annotations

import logging
import sys

import click
from rich.console import Console
from rich.logging import RichHandler

from thinwire.errors import ThinwireError
from thinwire.version import __version__

#: Exit codes, as `thinwire --help` tells them.
DONE, FAILED, INTERRUPTED = 0, 2, 130


class _Commands(click.Group):
    """Commands by name, each loaded when it is called: `thinwire --version` need not import torch."""

    _PLACES = {  # noqa: RUF012 (a table, never changed)
        "demo": "thinwire.cli.demo",
        "train": "thinwire.cli.train",
        "compare": "thinwire.cli.compare",
        "methods": "thinwire.cli.parts",
        "codecs": "thinwire.cli.parts",
        "lab": "thinwire.cli.lab",
        "doctor": "thinwire.cli.doctor",
    }

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._PLACES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._PLACES:
            return None
        from importlib import import_module

        command: click.Command = getattr(import_module(self._PLACES[cmd_name]), cmd_name)
        return command


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="thinwire")
def cli() -> None:
    """Train one model across machines joined by slow, unreliable links.

    Exit codes: 0 done, 2 the request or the run failed (the message says how to mend it), 130 stopped by Ctrl-C.
    """


def main() -> None:
    """Run the command line: errors in three parts, no traceback, exit code 2."""
    console = Console(stderr=True)
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=console, show_path=False, show_level=False, markup=False)],
    )
    try:
        code = cli.main(standalone_mode=False)
    except ThinwireError as error:
        print(f"thinwire: {error}", file=sys.stderr)
        sys.exit(FAILED)
    except click.ClickException as error:
        error.show()
        sys.exit(FAILED)
    except (click.Abort, KeyboardInterrupt):
        print("thinwire: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    sys.exit(code if isinstance(code, int) else DONE)
