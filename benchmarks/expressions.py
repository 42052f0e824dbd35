"""The codecs that codecs.py and codec_training.py run over: a new one needs a line here, and has one without options.

What stands in the tables of thinwire.codecs and is named by no line is run as `thinwire codecs` shows it.
"""

from __future__ import annotations

from thinwire.codecs import CODECS, FEEDBACK, STAGED, Codec, Shapes, describe, parse

EXAMPLES = (
    "fp32",
    "bf16",
    "fp16",
    "int8",
    "int8(rounding='stochastic')",
    "int4",
    "int4(rounding='stochastic')",
    "int4(grid='zero')",
    "int2",
    "int2(grid='minmax')",
    "e3m0",
    "e3m0(rounding='stochastic')",
    "topk(1/100)",
    "topk(1/100, block=4096)",
    "feedback(topk(1/100), decay=0)",
    "topk(1/64) | int4",
    "topk(1/64) | int4 | zstd",
    "fp8",
    "fp8(format='e5m2')",
    "natural",
    "qsgd",
    "qsgd(levels=16, norm='max', code='elias')",
    "terngrad",
    "terngrad(clip=2.5, code='trits')",
    "sign",
    "sign(scale='two-means')",
    "randk(1/64)",
    "randk(1/4, scaled=True)",
    "switch(int8, 10, topk(1/64))",
    "warmup(topk(1/100), rounds=10)",
    "frozen_adam(switch(fp32, 20, sign))",
    "dgc(fp32, masking=False)",
    "dgc(topk(1/64))",
    "gmf(topk(1/64))",
    "ef21w(topk(1/64), smoothness=(1, 1, 2, 2))",
    "rows(1/8)",
    "rows(1/8, sampled=True)",
    "dct(1/128)",
    "rotation | int4",
    "hadamard",
    "hadamard(bits=4, scale='least_squares')",
    "sketch(width=2000)",
    "pq",
    "pq(stages=3)",
    "kmeans",
    "topk(0.003) | kmeans(4) | rans",
    "cst(128)",
    "anchor_delta(128) | rans",
    "powersgd",
    "powersgd(rank=4)",
    "fetchsgd(1/64, width=2000)",
    "zstd",
    "bf16 | zstd",
    "int8 | zstd",
    "rans",
    "int4 | rans",
)


def expressions() -> list[str]:
    """Every example, then every other name there is, as `thinwire codecs` shows it."""
    begun = {example.split("|")[0].split("(")[0].strip() for example in EXAMPLES}
    return [*EXAMPLES, *(describe(name).example for name in [*CODECS, *STAGED, *FEEDBACK] if name not in begun)]


def fitted(expression: str, shapes: Shapes) -> Codec | None:
    """The codec for a vector made of parameters of these shapes; None for what needs other members or memory."""
    parsed = parse(expression)
    return parsed.fit(shapes) if isinstance(parsed, Codec) else None
