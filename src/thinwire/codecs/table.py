"""Writes docs/codecs.md from the codecs' cards and the recorded speeds:

python -m thinwire.codecs.table benchmarks/results/codecs.json > docs/codecs.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thinwire.codecs import CODECS, FEEDBACK, STAGED, CodecCard, describe, parse
from thinwire.codecs.base import Codec

_N = 4096  # elements that the bounds are quoted for
_FAST, _MEDIUM = 0.5, 0.125  # of a copy's speed
_LINK_BITS_PER_S = 1e9

_INTRODUCTION = """\
# Codecs

Written by `python -m thinwire.codecs.table benchmarks/results/codecs.json > docs/codecs.md` from the cards in
`thinwire/codecs/`; change those, not this file. `thinwire codecs NAME` shows a card in full: the rule, what it costs,
where it comes from and where we differ.

Codecs are joined with `|`, as in `topk(1/64) | int4 | zstd`; feedback goes around the whole: `feedback(topk(1/64) |
int4)`. Figures are for the name alone, or for the example that stands below it.

**bits** are an element's, of a million, without the packet's header; where the size depends on the data it is what was
measured on a gradient of a small GPT, or the bound. **promises**: *lossless*; *unbiased*, the mean over keys is the
vector; *linear*, packets add up without being decoded; *contracts by δ*, the mean of `||C(x) - x||²` is at most
`(1 - δ) ||x||²`, and *ω*, at most `ω ||x||²`, both for 4096 elements; *feedback*, it converges only with error
feedback, which methods put around it unasked. The conformance suite holds every codec to what it promises.

**speed** is encoding and decoding on one core as a fraction of a plain copy of the same float32 tensor of 64 MiB:
*fast* from a half on both ways, *medium* from an eighth, *slow* below; see
[the benchmark](../benchmarks/results/codecs.md), which has real tensors, two cores, memory and other libraries too.
"""

_STAGED = """
## Rounds of several exchanges

They are written where a codec is, but members talk more than once in a round.

"""

_FEEDBACK = """
## Memories around a codec

"""


def markdown(speeds: Mapping[str, Any]) -> str:
    """The whole file.

    speeds  rows of benchmarks/results/codecs.json: expression -> what was measured; may lack any
    """
    lines = [_INTRODUCTION, "| codec | bits | promises | error | speed | not to be used |", "|---|---|---|---|---|---|"]
    for name in CODECS:
        card = describe(name)
        row = _measured(card, speeds)
        error = "none" if card.traits is not None and card.traits.lossless else _sentence(card.error)
        lines.append(_line([_named(card), _bits(card, row), _promises(card), error, _speed(row), _avoid(card)]))
    for introduction, names in ((_STAGED, STAGED), (_FEEDBACK, FEEDBACK)):
        lines += [introduction + "| | what it does | error | not to be used |", "|---|---|---|---|"]
        for name in names:
            card = describe(name)
            lines.append(_line([_named(card), card.summary, _sentence(card.error), _avoid(card)]))
    return "\n".join(lines) + "\n"


def _named(card: CodecCard) -> str:
    example = "" if card.example == card.name else f"<br>here `{card.example}`"
    return f"`{card.signature}`{example}"


def _measured(card: CodecCard, speeds: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The row of the card's own example, else the first one whose codec it is."""
    alike = [row for expression, row in speeds.items() if expression.split("|")[0].split("(")[0].strip() == card.name]
    own = speeds.get(card.example)
    return own if own is not None else alike[0] if alike else None


def _bits(card: CodecCard, row: Mapping[str, Any] | None) -> str:
    assert card.traits is not None  # a codec's card
    assert card.bits_per_element is not None
    if card.traits.fixed_size:
        return f"{card.bits_per_element:.3g}"
    bound = f"at most {card.bits_per_element:.3g}"
    return bound if row is None else f"{sorted(row['gradient']['bits'])[1]:.3g}; {bound}"


def _promises(card: CodecCard) -> str:
    codec = parse(card.example)
    assert isinstance(codec, Codec)
    told = [word for word in ("lossless", "unbiased", "linear") if getattr(codec.traits, word)]
    delta, omega = codec.contraction(_N), codec.variance(_N)
    if not codec.traits.lossless:
        told += [] if delta is None else [f"contracts by {_rounded_down(delta)}"]
        told += [] if omega is None else [f"ω {omega:.3g}"]
        told += ["feedback"] if codec.traits.wants_feedback else []
    return ", ".join(told)


def _rounded_down(delta: float) -> str:
    """A promise is not made larger by rounding it: 0.99999 is not 1."""
    return f"{int(delta * 1e4) / 1e4:g}" if delta >= 1e-3 else f"{delta:.1e}"


def _speed(row: Mapping[str, Any] | None) -> str:
    if row is None or "1" not in row:
        return "not measured"
    timed = row["1"]
    encode, decode = timed["encode"][0], timed["decode"][0]
    slower = min(encode, decode)
    word = "fast" if slower >= _FAST else "medium" if slower >= _MEDIUM else "slow"
    late = timed["encode_s"] > 32 * timed["n"] / _LINK_BITS_PER_S
    note = "; slower than a 1 Gbit/s link moves float32" if late else ""
    return f"{word}: {_fraction(encode)} and {_fraction(decode)}{note}"


def _fraction(speed: float) -> str:
    return "no work" if speed > 20 else f"{speed:.2g}"


def _sentence(text: str) -> str:
    """The first sentence: the bound; the rest is in the card."""
    return text.split(". ")[0].removesuffix(".")


def _avoid(card: CodecCard) -> str:
    """What the card says; of a card of several codecs, "fp32: ...; fp16: ...", the part that is about this one."""
    own = [part.removeprefix(f"{card.name}: ") for part in card.avoid.split("; ") if part.startswith(f"{card.name}: ")]
    return own[0].removesuffix(".") if own else card.avoid.removesuffix(".")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())["rows"]), end="")
