"""The packets whose bytes are committed beside this file, one a file, for wire version 1; and a log of seeds.

    python tests/golden/renew.py

writes the files that are missing and refuses to change one that is there: a wire version, once released, stays as it
is. Bytes that have to change want a new WIRE_VERSION (docs/wire-format.md), new files, and the old ones kept.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from thinwire.codecs import Codec, parse
from thinwire.packet import WIRE_VERSION, Flag, Header, Kind, Packet
from thinwire.seeds.log import Closed, Log
from thinwire.seeds.recipe import Recipe
from thinwire.seeds.seal import FORMAT, key_of

HERE = Path(__file__).parent
KEY = 5
#: The vector of the golden vectors in tests/codecs, and a longer one for the chain.
SHORT = torch.tensor([7, -7, 3.5, -3.4, 0, 1, -1, 0.49])
LONG = torch.cat([SHORT * scale for scale in (1.0, -0.5, 0.25, 2.0, 0.0, 1e-3, 1e3, 0.75)])
#: Long enough that a table of frequencies pays.
REPEATED = LONG.repeat(8)

#: Codec packets: file name -> (expression, vector).
ENCODED: dict[str, tuple[str, torch.Tensor]] = {
    "fp32": ("fp32", SHORT),
    "bf16": ("bf16", SHORT),
    "int8": ("int8", SHORT),
    "int4": ("int4(block=8)", SHORT),
    "int4-stochastic": ("int4(block=8, rounding='stochastic')", LONG),
    "int4-minmax": ("int4(block=8, grid='minmax')", LONG),
    "int6": ("int6(block=8)", SHORT),
    "int3-zero": ("int3(block=8, grid='zero')", LONG),
    "int2": ("int2(block=8)", SHORT),
    "e3m0": ("e3m0(block=8)", SHORT),
    "e2m0": ("e2m0(block=8)", SHORT),
    "e4m0": ("e4m0(block=8)", LONG),
    "dct-int8": ("dct(1/8) | int8", LONG),
    "rotation-int4": ("rotation(block=64) | int4(block=32)", LONG),
    "hadamard": ("hadamard(bits=3, block=64, rounds=2)", LONG[:62]),
    "projection": ("projection(20, per_block=4)", torch.cat([LONG, SHORT])),
    "sketch": ("sketch(width=8, rows=3)", LONG),
    "topk-int4-zstd": ("topk(1/4, index='int32') | int4(block=8) | zstd", LONG),
    "empty": ("topk(1/4, index='int32') | e3m0", torch.zeros(0)),
    "topk": ("topk(1/16)", LONG),
    "topk-packed": ("topk(1/16, index='packed')", LONG),
    "topk-bitmap": ("topk(1/16, index='bitmap')", LONG),
    "topk-varint": ("topk(1/16, index='varint')", LONG),
    "topk-elias-fano": ("topk(1/16, index='elias_fano')", LONG),
    "topk-smallest": ("topk(1/4, index='smallest', block=16)", LONG),
    "randk": ("randk(1/4)", LONG),
    "fp8": ("fp8(block=8)", LONG),
    "fp8-e5m2": ("fp8('e5m2', block=8)", LONG),
    "natural": ("natural", LONG),
    "qsgd": ("qsgd(block=8)", LONG),
    "qsgd-elias": ("qsgd(3, block=8, code='elias')", LONG),
    "terngrad": ("terngrad(block=8)", LONG),
    "terngrad-trits": ("terngrad(block=12, clip=2.5, code='trits')", LONG),
    "sign": ("sign(block=8)", SHORT),
    "sign-two-means": ("sign(block=8, scale='two-means')", LONG),
    "topk-kmeans": ("topk(1/2) | kmeans(3)", LONG),
    "cst": ("cst(channels=6, bits=2)", LONG),
    "anchor-delta": ("anchor_delta(channels=3, layers=2, group=4)", LONG),
    "pq": ("pq(length=4, size=16, stages=2, block=16)", LONG),
    "int8-rans": ("int8 | rans(segment=100)", REPEATED),
    "rows": ("rows(1/4, width=4)", LONG),
    "rows-sampled": ("rows(1/4, width=4, sampled=True)", LONG),
}


def codec_of(name: str) -> Codec:
    codec = parse(ENCODED[name][0])
    assert isinstance(codec, Codec)
    return codec


@cache
def packets() -> dict[str, Packet]:
    """What the files hold."""
    header = Header(Kind.CONTRIBUTION, sender=2, fragment=1, round=7, context=0x0123456789ABCDEF, weight=96.0)
    made = {
        name: Packet(codec_of(name).spec, len(x), codec_of(name).encode(x, KEY), header)
        for name, (_, x) in ENCODED.items()
    }
    made["hello"] = Packet(
        "hello",
        0,
        {"version": torch.tensor(list(b"0.1.0"), dtype=torch.uint8), "digest": torch.tensor([-1], dtype=torch.int64)},
        Header(Kind.HELLO, sender=3, context=2**64 - 1),
    )
    made["verdict"] = Packet(
        "verdict",
        0,
        {"held": torch.tensor([1, 0, 1], dtype=torch.int8), "loss": torch.tensor([0.25], dtype=torch.float64)},
        Header(Kind.VERDICT, sender=1, round=7, weight=0.0, flags=Flag.ABSTAINS | Flag.FAILED),
    )
    return made


#: What the golden log is signed with.
LOG_KEY = key_of(b"sixteen bytes or more")


def log() -> Log:
    """Four rounds: member 9 joins in the second, one abstains in the third, member 0 is gone in the fourth."""
    made = Log(
        Recipe(seed=7, samples=2, rule="momentum(0.9, window=3)", decay=0.5),
        tensors={"h.weight": ("float32", (2, 3)), "h.bias": ("bfloat16", (2,))},
        base="00112233445566778899aabbccddeeff",
        frozen={"steps": ("int64", ())},
        rest="ffeeddccbbaa99887766554433221100",
        aliases={"out.weight": "h.weight"},
    )
    rounds = [
        Closed(0, 0.25, {0: b"\x50\xd1", 3: b"\x4f\x01"}),
        Closed(1, 0.25, {0: b"\x7f\xff", 3: b"\x40\xc0", 9: b"\x10\x90"}, joined=(9,)),
        Closed(2, 0.125, {0: b"\x80\x80", 3: b"\0\x33", 9: b"\x41\xc1"}),
        Closed(3, 0.0625, {3: b"\x42\xc2", 9: b"\x43\xc3"}, left=(0,)),
    ]
    for closed in rounds:
        made = made.append(closed)
        if closed.number == 1:
            made = made.checked("0123456789abcdef0123456789abcdef")
    return made.checked("fedcba9876543210fedcba9876543210")


def log_path() -> Path:
    return HERE / f"seeds.v{FORMAT}.log"


def path(name: str) -> Path:
    return HERE / f"{name}.v{WIRE_VERSION}.bin"


def main() -> None:
    files = {path(name): packet.to_bytes().numpy().tobytes() for name, packet in packets().items()}
    for file, data in {**files, log_path(): log().to_bytes(LOG_KEY)}.items():
        if file.exists():
            print(f"kept     {file.name}")
        else:
            file.write_bytes(data)
            print(f"written  {file.name}")


if __name__ == "__main__":
    main()
