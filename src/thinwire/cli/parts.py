"""`thinwire methods` and `thinwire codecs`: what there is, with options, defaults, sources and cost."""

from __future__ import annotations

import inspect
import sys

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from thinwire.options import unknown

QUESTIONS = ("when?", "what?", "how?", "to whom?", "merged how?", "and then?")
_PROMISES = {
    "lossless": "lossless", "unbiased": "unbiased", "linear": "linear", "wants_feedback": "wants feedback"
}  # fmt: skip


@click.command(short_help="List the methods, or show one.")
@click.argument("name", required=False)
def methods(name: str | None) -> None:
    """List the methods, or show one: its rule, options, size and source."""
    from thinwire.codecs.cards import signature
    from thinwire.config import named_methods

    known = named_methods()
    console = Console()
    if name is not None:
        if name not in known:
            raise unknown(f"there is no method {name!r}", name, known, what="one of")
        made = known[name]
        module = sys.modules[made.__module__]
        console.print(f"[bold]{escape(signature(name, made))}[/]\n", highlight=False)
        console.print(escape(inspect.getdoc(module) or ""), highlight=False)
        return
    for each, make in known.items():
        console.print(
            f"[bold]{each}[/]  {escape(_first_sentence(sys.modules[make.__module__].__doc__))}", highlight=False
        )
        table = Table.grid(padding=(0, 2))
        for question, answer in zip(QUESTIONS, make().answers().values(), strict=True):
            table.add_row(f"  {question}", escape(answer))
        console.print(table)
    console.print("\nOptions, size, error and source of one: thinwire methods NAME", highlight=False)


@click.command(short_help="List the codecs, or show one.")
@click.argument("name", required=False)
def codecs(name: str | None) -> None:
    """List the codecs, or show one: its rule, options, bits, error and source."""
    from thinwire.codecs import CODECS, FEEDBACK, STAGED, describe

    known = {**CODECS, **STAGED, **FEEDBACK}

    console = Console()
    if name is not None:
        if name not in known:
            raise unknown(f"there is no codec {name!r}", name, known, what="one of")
        card = describe(name)
        console.print(f"[bold]{escape(card.signature)}[/]\n\n{escape(card.card)}\n", highlight=False)
        if card.bits_per_element is not None:
            console.print(
                f"{card.example}: {card.bits_per_element:.3f} bits an element, for a million", highlight=False
            )
        return
    table = Table(header_style="bold", box=None, padding=(0, 2, 0, 0))
    for heading in ("codec", "bits", "promises", "what it does"):
        table.add_column(heading, justify="right" if heading == "bits" else "left")
    for each in known:
        card = describe(each)
        kind = ["several exchanges"] * (each in STAGED) + ["memory around a codec"] * (each in FEEDBACK)
        promises = [word for trait, word in _PROMISES.items() if getattr(card.traits, trait, False)]
        bits = "" if card.bits_per_element is None or each in FEEDBACK else f"{card.bits_per_element:.2f}"
        table.add_row(f"[bold]{each}[/]", bits, ", ".join(kind or promises), escape(card.summary))
    console.print(table)
    console.print(
        "\nbits: for each element of a million. Joined with |, as in 'topk(1/64) | int4 | zstd'; error feedback goes\n"
        "around: 'feedback(int4)'.\n"
        "One of them in full: thinwire codecs NAME",
        highlight=False,
    )


def _first_sentence(card: str | None) -> str:
    return " ".join((card or "").split("\n\n")[0].split())
