"""HTML in pieces. `Html` is a type of its own, so that the type checker sees user text that was not escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import NewType

Html = NewType("Html", str)


def text(words: str) -> Html:
    """Words of anybody's, escaped."""
    return Html(html.escape(words))


def element(name: str, *children: Html, **attributes: str) -> Html:
    """`<name attribute="...">children</name>`; class_ and for_ lose their underscore, data_x becomes data-x."""
    named = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"' for key, value in attributes.items() if value
    )
    return Html(f"<{name}{named}>{''.join(children)}</{name}>")


def join(parts: Iterable[Html]) -> Html:
    """One piece after the other."""
    return Html("\n".join(parts))


def table(head: Sequence[Html], rows: Iterable[Sequence[Html]], *, numbers_from: int, caption: str) -> Html:
    """A table that scrolls inside its own container.

    head          a heading for each column; the first column of the body holds headings too
    numbers_from  columns from this one on are aligned to the right; len(head) aligns none
    caption       for readers who hear the page
    """

    def kind(column: int) -> str:
        return "number" if column >= numbers_from else ""

    top = join(element("th", words, scope="col", class_=kind(i)) for i, words in enumerate(head))
    body = join(
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(element("td", cell, class_=kind(i)) for i, cell in enumerate(row) if i > 0),
        )
        for row in rows
    )
    inner = element("thead", element("tr", top)) + element("tbody", body)
    whole = element("table", Html(inner))
    return element("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)


def details(summary: Html, content: Html, *, opened: bool = False) -> Html:
    """Something to unfold."""
    start = "<details open>" if opened else "<details>"
    return Html(f"{start}<summary>{summary}</summary>{content}</details>")


def section(heading: str, *content: Html) -> Html:
    """A part of the page under its heading; nothing at all if it has no content."""
    shown = [part for part in content if part]
    return element("section", element("h2", text(heading)), *shown) if shown else Html("")
