"""How a vector is written: the codecs, the table of their names, and the expressions that join them.

    >>> from thinwire.codecs import int4, parse, topk, zstd
    >>> topk(1 / 64) | int4 | zstd == parse("topk(1/64) | int4 | zstd")
    True
    >>> (topk(1 / 64) | int4).layout(1_000_000)
    {'value.scale': (torch.float32, 245), 'value.code': (torch.uint8, 7813), 'index': (torch.uint8, 15626)}

To add one: its file here, its line in `CODECS`, its example in tests/conformance/test_codecs.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from thinwire.codecs.base import Codec, Traits, require
from thinwire.codecs.cards import CodecCard, card
from thinwire.codecs.chain import Chain
from thinwire.codecs.e3m0 import E3M0, e3m0
from thinwire.codecs.feedback import ErrorFeedback, feedback
from thinwire.codecs.integer import Integer, int4, int8
from thinwire.codecs.precision import BF16, FP16, FP32, bf16, fp16, fp32
from thinwire.codecs.randk import RandK, randk
from thinwire.codecs.rows import Rows, rows
from thinwire.codecs.topk import TopK, topk, warmup_shares
from thinwire.codecs.zstd import Zstd, zstd
from thinwire.errors import ConfigError
from thinwire.expressions import Words, evaluate
from thinwire.packet import Fields, Layout

__all__ = [
    "BF16", "CODECS", "E3M0", "FP16", "FP32", "Chain", "Codec", "CodecCard", "ErrorFeedback", "Fields", "Integer",
    "Layout", "RandK", "Rows", "TopK", "Traits", "Zstd", "bf16", "describe", "e3m0", "feedback", "fp16", "fp32",
    "int4", "int8", "parse", "randk", "require", "rows", "topk", "warmup_shares", "zstd",
]  # fmt: skip

#: Every codec by the name it has in expressions; called, an entry gives the codec.
CODECS: Mapping[str, Callable[..., Codec]] = {
    "fp32": FP32,
    "bf16": BF16,
    "fp16": FP16,
    "int8": int8,
    "int4": int4,
    "e3m0": e3m0,
    "topk": TopK,
    "randk": RandK,
    "rows": rows,
    "zstd": zstd,
}

_NAMES: Mapping[str, Callable[..., Codec | ErrorFeedback]] = {**CODECS, "feedback": feedback}
_WORDS = Words("codec", _NAMES, "topk(1/64) | int4 | zstd or feedback(int4(block=128))", "`thinwire codecs {}`")
#: Those that cannot be shown by their name alone.
_SHOWN = {"topk": "topk(1/64)", "randk": "randk(1/64)", "rows": "rows(1/8)", "feedback": "feedback(topk(1/64))"}


def parse(expression: str) -> Codec | ErrorFeedback:
    """The codec an expression stands for: "topk(1/64) | int4", "feedback(topk(1/64))", "int8(block=512)".

    raises  ConfigError naming what is unknown, and what there is
    """
    parsed = evaluate(expression, _WORDS)
    if not isinstance(parsed, Codec | ErrorFeedback):
        raise ConfigError(
            f"{expression!r} is no codec",
            expected="one of " + ", ".join(sorted(_NAMES)) + ", or several joined with |",
            mend="`thinwire codecs` shows what each of them does",
        )
    return parsed


def describe(name: str) -> CodecCard:
    """What `thinwire codecs NAME` shows; `describe(name) for name in CODECS` is the whole list.

    raises  ConfigError for an unknown name
    """
    example = _SHOWN.get(name, name)
    if name not in _NAMES:
        parse(name)  # refuses it, in the words for unknown names
        raise ConfigError(f"{name!r} is an expression", expected="one codec's name", mend="leave its options out")
    parsed = parse(example)
    codec = parsed.codec if isinstance(parsed, ErrorFeedback) else parsed
    return card(name, _NAMES[name], type(parsed), codec, example)
