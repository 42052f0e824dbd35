"""How a vector is written: the codecs, the table of their names, and the expressions that join them.

    >>> from thinwire.codecs import int4, parse, topk, zstd
    >>> topk(1 / 64) | int4 | zstd == parse("topk(1/64) | int4 | zstd")
    True
    >>> (topk(1 / 64) | int4).layout(1_000_000)
    {'value.scale': (torch.float32, 245), 'value.code': (torch.uint8, 7813), 'index': (torch.uint8, 15626)}

To add one: its file here, its line in `CODECS`, its example in tests/conformance/test_codecs.py. CONTRIBUTING.md says
the same of rounds of several exchanges (`STAGED`) and memories (`FEEDBACK`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from thinwire.codecs.anchor_delta import AnchorDelta, anchor_delta
from thinwire.codecs.base import Codec, Shapes, Traits, require
from thinwire.codecs.budget import Budget, budget
from thinwire.codecs.cards import CodecCard, card
from thinwire.codecs.chain import Chain
from thinwire.codecs.cst import CST, cst, join_tokens, salient_tokens, split_tokens
from thinwire.codecs.dct import DCT, dct
from thinwire.codecs.feedback import (
    DGC,
    EF21,
    EF21SGDM,
    EF21W,
    FEEDBACK,
    GMF,
    Diana,
    EControl,
    ErrorFeedback,
    Feedback,
    FrozenAdam,
    Scafcom,
    Scallion,
    dgc,
    diana,
    econtrol,
    ef21,
    ef21_sgdm,
    ef21w,
    feedback,
    frozen_adam,
    gmf,
    scafcom,
    scallion,
)
from thinwire.codecs.fetchsgd import FetchSGD, fetchsgd
from thinwire.codecs.filling import fill_demand
from thinwire.codecs.fp8 import FP8, fp8
from thinwire.codecs.hadamard import Hadamard, hadamard
from thinwire.codecs.integer import Integer, int2, int3, int4, int6, int8
from thinwire.codecs.kmeans import KMeans, kmeans
from thinwire.codecs.layers import Layers, layers
from thinwire.codecs.log import Log, e2m0, e3m0, e4m0
from thinwire.codecs.natural import Natural, natural
from thinwire.codecs.powersgd import PowerSGD, powersgd
from thinwire.codecs.pq import PQ, pq, train_codebook
from thinwire.codecs.precision import BF16, FP16, FP32, bf16, fp16, fp32
from thinwire.codecs.projection import Projection, projection
from thinwire.codecs.qsgd import QSGD, qsgd
from thinwire.codecs.randk import RandK, randk
from thinwire.codecs.rans import Rans, rans
from thinwire.codecs.rotation import Rotation, rotation
from thinwire.codecs.rows import Rows, rows
from thinwire.codecs.sign import Sign, sign
from thinwire.codecs.sketch import Sketch, sketch
from thinwire.codecs.stages import Staged
from thinwire.codecs.switch import Switch, Warmup, switch, warmup
from thinwire.codecs.tagc import TAGC, tagc
from thinwire.codecs.terngrad import TernGrad, terngrad
from thinwire.codecs.topk import TopK, topk, warmup_shares
from thinwire.codecs.whole import decode, encode
from thinwire.codecs.zstd import Zstd, train_dictionary, zstd
from thinwire.errors import ConfigError
from thinwire.expressions import Words, evaluate
from thinwire.packet import Fields, Layout

__all__ = [
    "BF16",
    "CODECS",
    "CST",
    "DCT",
    "DGC",
    "EF21",
    "EF21SGDM",
    "EF21W",
    "FEEDBACK",
    "FP8",
    "FP16",
    "FP32",
    "GMF",
    "PQ",
    "QSGD",
    "STAGED",
    "TAGC",
    "AnchorDelta",
    "Budget",
    "Chain",
    "Codec",
    "CodecCard",
    "Diana",
    "EControl",
    "ErrorFeedback",
    "Feedback",
    "FetchSGD",
    "Fields",
    "FrozenAdam",
    "Hadamard",
    "How",
    "Integer",
    "KMeans",
    "Layers",
    "Layout",
    "Log",
    "Natural",
    "PowerSGD",
    "Projection",
    "RandK",
    "Rans",
    "Rotation",
    "Rows",
    "Scafcom",
    "Scallion",
    "Shapes",
    "Sign",
    "Sketch",
    "Staged",
    "Switch",
    "TernGrad",
    "TopK",
    "Traits",
    "Warmup",
    "Zstd",
    "anchor_delta",
    "bf16",
    "budget",
    "cst",
    "dct",
    "decode",
    "describe",
    "dgc",
    "diana",
    "e2m0",
    "e3m0",
    "e4m0",
    "econtrol",
    "ef21",
    "ef21_sgdm",
    "ef21w",
    "encode",
    "feedback",
    "fetchsgd",
    "fill_demand",
    "fp8",
    "fp16",
    "fp32",
    "frozen_adam",
    "gmf",
    "hadamard",
    "int2",
    "int3",
    "int4",
    "int6",
    "int8",
    "join_tokens",
    "kmeans",
    "layers",
    "natural",
    "parse",
    "powersgd",
    "pq",
    "projection",
    "qsgd",
    "randk",
    "rans",
    "require",
    "rotation",
    "rows",
    "salient_tokens",
    "scafcom",
    "scallion",
    "sign",
    "sketch",
    "split_tokens",
    "switch",
    "tagc",
    "terngrad",
    "topk",
    "train_codebook",
    "train_dictionary",
    "warmup",
    "warmup_shares",
    "zstd",
]

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
    "randk": RandK,
    "rows": rows,
    "dct": DCT,
    "rotation": rotation,
    "hadamard": hadamard,
    "projection": Projection,
    "sketch": Sketch,
    "kmeans": kmeans,
    "pq": pq,
    "cst": cst,
    "anchor_delta": anchor_delta,
    "layers": layers,
    "zstd": zstd,
    "rans": rans,
}

#: Rounds of several exchanges by the name they have in expressions.
STAGED: Mapping[str, Callable[..., Staged]] = {
    "powersgd": PowerSGD,
    "fetchsgd": FetchSGD,
    "tagc": TAGC,
    "budget": budget,
    "switch": Switch,
    "warmup": Warmup,
}

#: How a vector is written: the answer to one of a round's six questions.
How = Codec | Staged | Feedback

_NAMES: Mapping[str, Callable[..., How]] = {**CODECS, **STAGED, **FEEDBACK}
_WORDS = Words("codec", _NAMES, "topk(1/64) | int4 | zstd or feedback(int4(block=128))", "`thinwire codecs {}`")
#: What stands for those that cannot be shown by their name alone; in the order of the tables.
_SHOWN = {
    "topk": "topk(1/64)",
    "randk": "randk(1/64)",
    "rows": "rows(1/8)",
    "dct": "dct(1/128)",
    "sketch": "sketch(width=50000)",
    "cst": "cst(128)",
    "anchor_delta": "anchor_delta(128)",
    "layers": "layers(topk(1/64))",
    "fetchsgd": "fetchsgd(0.01, width=50000)",
    "budget": "budget(topk(1/256), topk(1/64), topk(1/16))",
    "switch": "switch(int8, 100, topk(1/64))",
    "warmup": "warmup(topk(1/1000), rounds=500)",
    "feedback": "feedback(topk(1/64))",
    "ef21": "ef21(topk(1/64))",
    "ef21w": "ef21w(topk(1/64), smoothness=(1, 4))",
    "ef21_sgdm": "ef21_sgdm(topk(1/64))",
    "econtrol": "econtrol(topk(1/64))",
    "diana": "diana(int4(rounding='stochastic'))",
    "dgc": "dgc(topk(1/64))",
    "gmf": "gmf(topk(1/64))",
    "scallion": "scallion(int4(rounding='stochastic'))",
    "scafcom": "scafcom(topk(1/64))",
    "frozen_adam": "frozen_adam(switch(fp32, 1000, sign))",
}


def parse(expression: str) -> How:
    """The codec an expression stands for: "topk(1/64) | int4", "feedback(topk(1/64))", "int8(block=512)".

    raises  ConfigError naming what is unknown, and what there is
    """
    parsed = evaluate(expression, _WORDS)
    if not isinstance(parsed, Codec | Staged | Feedback):
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
    codec = parsed.codec if isinstance(parsed, Feedback) else parsed
    return card(name, _NAMES[name], type(parsed), codec, example)
