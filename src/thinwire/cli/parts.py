"""`thinwire methods` and `thinwire codecs`: what there is, with options, defaults, sources and cost."""

from __future__ import annotations

import inspect
import sys

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from thinwire.options import unknown


@click.command()
@click.argument("name", required=False)
def methods(name: str | None) -> None:
    """List the methods, or show one: its rule, options, size and source."""
    from thinwire.methods import METHODS

    console = Console()
    if name is not None:
        if name not in METHODS:
            raise unknown(f"there is no method {name!r}", name, METHODS, what="one of")
        made = METHODS[name]
        module = sys.modules[made.__module__]
        console.print(f"[bold]{name}[/]{escape(str(inspect.signature(made)).split(' ->')[0])}", highlight=False)
        console.print(escape(inspect.getdoc(module) or ""), highlight=False)
        return
    table = Table(title="Methods as six answers (defaults)", header_style="bold")
    for heading in ("name", "when?", "what?", "how?", "to whom?", "merged how?", "and then?"):
        table.add_column(heading, overflow="fold")
    for each, make in METHODS.items():
        table.add_row(f"[bold]{each}[/]", *(escape(answer) for answer in make().answers().values()))
    console.print(table)
    console.print("Options and sources of one: thinwire methods NAME", highlight=False)


@click.command()
@click.argument("name", required=False)
def codecs(name: str | None) -> None:
    """List the codecs, or show one: its rule, options, bits, error and source."""
    from thinwire.codecs import CODECS, describe

    console = Console()
    if name is not None:
        if name not in CODECS:
            raise unknown(f"there is no codec {name!r}", name, CODECS, what="one of")
        card = describe(name)
        console.print(f"[bold]{escape(card.signature)}[/]\n\n{escape(card.card)}\n", highlight=False)
        console.print(f"{card.example}: {card.bits_per_element:.3f} bits an element, for a million", highlight=False)
        return
    table = Table(title="Codecs", header_style="bold")
    for heading in ("codec", "bits/element", "lossless", "unbiased", "linear", "feedback", "what it does"):
        table.add_column(heading, overflow="fold", justify="right" if heading == "bits/element" else "left")
    for each in CODECS:
        card = describe(each)
        told = [_tick(getattr(card.traits, trait)) for trait in ("lossless", "unbiased", "linear", "wants_feedback")]
        table.add_row(f"[bold]{escape(card.signature)}[/]", f"{card.bits_per_element:.3f}", *told, escape(card.summary))
    console.print(table)
    console.print(
        "Joined with |, as in 'topk(1/64) | int4 | zstd'; error feedback goes around: 'feedback(int4)'.\n"
        "One of them in full: thinwire codecs NAME",
        highlight=False,
    )


def _tick(yes: bool) -> str:
    return "yes" if yes else ""
