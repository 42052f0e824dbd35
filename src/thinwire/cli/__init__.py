"""The `thinwire` command."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from keyword import iskeyword
from typing import NoReturn

import click

from thinwire.errors import ThinwireError
from thinwire.version import __version__

#: Exit codes, as `thinwire --help` tells them.
DONE, FAILED, INTERRUPTED = 0, 2, 130


class _Commands(click.Group):
    """Commands by name, each loaded when it is called: `thinwire --version` need not import torch."""

    _PLACES = {  # noqa: RUF012 (a table, never changed)
        "demo": "thinwire.cli.demo",
        "train": "thinwire.cli.train",
        "up": "thinwire.cli.up",
        "join": "thinwire.cli.join",
        "status": "thinwire.cli.status",
        "ledger": "thinwire.cli.ledger",
        "checkpoint": "thinwire.cli.checkpoint",
        "compare": "thinwire.cli.compare",
        "methods": "thinwire.cli.parts",
        "codecs": "thinwire.cli.parts",
        "lab": "thinwire.cli.lab",
        "chaos": "thinwire.cli.chaos",
        "doctor": "thinwire.cli.doctor",
        "export": "thinwire.cli.seeds",
        "import": "thinwire.cli.seeds",
        "replay": "thinwire.cli.seeds",
    }

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._PLACES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        from importlib import import_module

        if cmd_name not in self._PLACES:
            from thinwire.options import unknown

            raise unknown(f"there is no command {cmd_name!r}", cmd_name, self._PLACES, what="one of")
        function = cmd_name + "_" * iskeyword(cmd_name)  # import_
        command: click.Command = getattr(import_module(self._PLACES[cmd_name]), function)
        return command


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="thinwire")
def cli() -> None:
    """Train one model across machines joined by slow, unreliable links.

    Exit codes: 0 done, 2 the request or the run failed (the message says how to mend it), 130 stopped by Ctrl-C.
    """


class _Words(logging.Handler):
    """Log messages as plain lines above a progress line, wherever standard error is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"thinwire: {self.format(record)}", file=sys.stderr)


def main() -> None:
    """Run the command line: errors in three parts, no traceback, exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_Words()])
    try:
        code = cli.main(prog_name="thinwire", standalone_mode=False)
    except ThinwireError as error:
        print(f"thinwire: {error}", file=sys.stderr)
        _end_now(FAILED)
    except click.ClickException as error:
        print(_three_parts(error), file=sys.stderr)
        _end_now(FAILED)
    except (click.Abort, KeyboardInterrupt):
        print("thinwire: interrupted", file=sys.stderr)
        _end_now(INTERRUPTED)
    if isinstance(code, int) and code:
        _end_now(code)


def _three_parts(error: click.ClickException) -> str:
    """What click found, in our form; a group called without a command shows its help."""
    words, context = error.format_message(), getattr(error, "ctx", None)
    if words.startswith("Usage:"):
        return words
    path = context.command_path if context is not None else "thinwire"
    wrong = words.strip().removesuffix(".")
    return f"thinwire: {wrong}\n  expected  what `{path} --help` lists\n  mend      look there for names and defaults"


def _end_now(code: int) -> NoReturn:
    """End without Python's clean-up, which aborts where a thread still waits inside the engine for a lost member."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
