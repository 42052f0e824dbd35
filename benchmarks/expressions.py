"""The codecs that codecs.py and codec_training.py run over: a new one needs a line here, and has one without options.

A codec of the table `thinwire.codecs.CODECS` that no line names is run as `thinwire codecs` shows it.
"""

from __future__ import annotations

from thinwire.codecs import CODECS, Codec, describe, parse

EXAMPLES = (
    "fp32",
    "bf16",
    "fp16",
    "int8",
    "int8(rounding='stochastic')",
    "int4",
    "int4(rounding='stochastic')",
    "e3m0",
    "e3m0(rounding='stochastic')",
    "topk(1/100)",
    "topk(1/64) | int4",
    "topk(1/64) | int4 | zstd",
    "zstd",
    "bf16 | zstd",
    "int8 | zstd",
)


def expressions() -> list[str]:
    """Every example, then every codec that none of them begins with."""
    begun = {example.split("|")[0].split("(")[0].strip() for example in EXAMPLES}
    return [*EXAMPLES, *(describe(name).example for name in CODECS if name not in begun)]


def fitted(expression: str, shapes: tuple[tuple[int, ...], ...]) -> Codec:
    """The codec itself, without the feedback that may be around it, fitted to the shapes that a vector is made of."""
    parsed = parse(expression)
    codec = parsed if isinstance(parsed, Codec) else parsed.codec
    fit = getattr(codec, "fit", None)
    return codec if fit is None else fit(shapes)
