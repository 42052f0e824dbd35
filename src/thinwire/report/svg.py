"""From matplotlib to a piece of a page: no prolog, no fixed size, no ids of anybody else's, the page's own colours.

Colours are left to the page's style sheet (light, dark, print): matplotlib draws with stand-in colours, which are then
replaced by CSS variables. Words of the user's never pass through matplotlib (its mathematics syntax, its fonts): draw
a stand-in, and name what is to stand there in `words`.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from thinwire.report.markup import Html

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 420  # units of the view box; letters of 12 units stay readable where it is shown 350 pixels wide
CURVES = 6  # colours that tell curves apart
PARTS = 5  # colours of stacked bars

# Stand-ins: none is a default of matplotlib's.
INK, SOFT, LINE, CARD = "#0a0000", "#0a0001", "#0a0002", "#0a0003"
CURVE = tuple(f"#0a010{i}" for i in range(CURVES))
PART = tuple(f"#0a020{i}" for i in range(PARTS))
_VARIABLES = {
    INK: "var(--ink)",
    SOFT: "var(--soft)",
    LINE: "var(--line)",
    CARD: "var(--card)",
    **{colour: f"var(--curve-{i})" for i, colour in enumerate(CURVE)},
    **{colour: f"var(--part-{i})" for i, colour in enumerate(PART)},
}

_STYLE: dict[Any, Any] = {  # Any: some versions of matplotlib list the names they know as a type
    "axes.axisbelow": True,
    "axes.edgecolor": SOFT,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": SOFT,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "font.family": ["DejaVu Sans"],  # comes with matplotlib: the same layout on every machine
    "font.size": 12,
    "grid.color": LINE,
    "grid.linewidth": 1,
    "lines.linewidth": 2,
    "lines.markersize": 5,
    "savefig.dpi": 72,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
}


def drawn(
    name: str, height: int, draw: Callable[[Figure], None], *, label: str, words: Mapping[str, str] | None = None
) -> Html:
    """The figure that `draw` fills, as an inline SVG that scales with the room it is given.

    name    of this figure, no other's on the page; its ids begin with it
    height  in units, of which the width has `WIDTH`
    label   what is to be seen, for readers who do not see
    words   stand-in drawn as text -> the user's words
    """
    import matplotlib
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with matplotlib.rc_context():  # restored at the end: the caller's own plots keep their style
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**_STYLE, "svg.hashsalt": name})
        figure = Figure(figsize=(WIDTH / 72, height / 72))
        draw(figure)
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index(">", svg.index("<svg")) + 1 :].strip()
    svg = re.sub(r"<style.*?</style>\s*", "", svg, flags=re.DOTALL)  # it would hold for the whole page
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\g<1>#{name}-", svg)
    svg = re.sub(r"#0a[0-9a-f]{4}", lambda found: _VARIABLES.get(found[0], found[0]), svg)
    svg = svg.replace("'DejaVu Sans'", "system-ui, sans-serif")
    for stand_in, text in (words or {}).items():
        svg = svg.replace(f">{stand_in}<", f">{html.escape(text)}<")
    return Html(f'<svg role="img" aria-label="{html.escape(label)}" viewBox="0 0 {WIDTH} {height}">\n{svg}')
