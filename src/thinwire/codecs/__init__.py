"""How a vector is written: the codecs, the table of their names, and the expressions that join them.

    >>> from thinwire.codecs import int4, parse, topk, zstd
    >>> topk(1 / 64) | int4 | zstd == parse("topk(1/64) | int4 | zstd")
    True
    >>> (topk(1 / 64) | int4).layout(1_000_000)
    {'value.scale': (torch.float32, 245), 'value.code': (torch.uint8, 7813), 'index': (torch.int32, 15625)}

To add one: its file here, its line in `CODECS`, its example in tests/conformance/test_codecs.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from thinwire.codecs.base import Codec, Traits, require
from thinwire.codecs.cards import CodecCard, card
from thinwire.codecs.chain import Chain
from thinwire.codecs.feedback import ErrorFeedback, feedback
from thinwire.codecs.fp8 import FP8, fp8
from thinwire.codecs.integer import Integer, int2, int3, int4, int6, int8
from thinwire.codecs.log import Log, e2m0, e3m0, e4m0
from thinwire.codecs.natural import Natural, natural
from thinwire.codecs.precision import BF16, FP16, FP32, bf16, fp16, fp32
from thinwire.codecs.qsgd import QSGD, qsgd
from thinwire.codecs.sign import Sign, sign
from thinwire.codecs.terngrad import TernGrad, terngrad
from thinwire.codecs.topk import TopK, topk
from thinwire.codecs.zstd import Zstd, zstd
from thinwire.errors import ConfigError
from thinwire.expressions import Words, evaluate
from thinwire.packet import Fields, Layout

__all__ = [
    "BF16", "CODECS", "FP8", "FP16", "FP32", "QSGD", "Chain", "Codec", "CodecCard", "ErrorFeedback", "Fields",
    "Integer", "Layout", "Log", "Natural", "Sign", "TernGrad", "TopK", "Traits", "Zstd", "bf16", "describe", "e2m0",
    "e3m0", "e4m0", "feedback", "fp8", "fp16", "fp32", "int2", "int3", "int4", "int6", "int8", "natural", "parse",
    "qsgd", "require", "sign", "terngrad", "topk", "zstd",
]  # fmt: skip

#: Every codec by the name it has in expressions; called, an entry gives the codec.
CODECS: Mapping[str, Callable[..., Codec]] = {
    "fp32": FP32,
    "bf16": BF16,
    "fp16": FP16,
    "fp8": fp8,
    "int8": int8,
    "int6": int6,
    "int4": int4,
    "int3": int3,
    "int2": int2,
    "e4m0": e4m0,
    "e3m0": e3m0,
    "e2m0": e2m0,
    "natural": natural,
    "qsgd": qsgd,
    "terngrad": terngrad,
    "sign": sign,
    "topk": TopK,
    "zstd": zstd,
}

_NAMES: Mapping[str, Callable[..., Codec | ErrorFeedback]] = {**CODECS, "feedback": feedback}
_WORDS = Words("codec", _NAMES, "topk(1/64) | int4 | zstd or feedback(int4(block=128))", "`thinwire codecs {}`")
_SHOWN = {"topk": "topk(1/64)", "feedback": "feedback(topk(1/64))"}  # those that cannot be shown by their name alone


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
