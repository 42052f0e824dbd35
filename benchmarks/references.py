"""What a user could pick instead of our codecs, through one small interface; packages that are missing are skipped.

fp16 cast       what torch's fp16_compress_hook does to a bucket
PowerSGD        the arithmetic of torch's powerSGD_hook for one bucket, first round: random Q, P = MQ made orthonormal,
                Q = M^T P; parameters it would not compress go as they are. Its orthogonalisation and its rule are used.
zstd            one frame of the tensor's bytes as they are
bitsandbytes    quantize_blockwise (8 bits, dynamic code, blocks of 256), quantize_4bit (nf4, blocks of 64)
hivemind        Uniform8BitQuantization, Quantile8BitQuantization; serialised size. The second has threads of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from math import prod
from typing import Any

import torch
import zstandard
from torch import Tensor

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Subject:
    """Something that writes a vector and reads it back.

    encode     float32 [n] -> what would be sent
    decode     that -> float32 [n]
    num_bytes  of what would be sent
    """

    encode: Callable[[Tensor], Any]
    decode: Callable[[Any], Tensor]
    num_bytes: Callable[[Any], int]


#: From the shapes that a vector is made of.
Maker = Callable[[Shapes], Subject]


def references() -> tuple[dict[str, Maker], list[str]]:
    """Those that run here by name, and a sentence on each package that is missing."""
    found: dict[str, Maker] = {
        "torch: fp16 cast": lambda shapes: _fp16(),
        "torch: PowerSGD rank 1": lambda shapes: _power_sgd(shapes, 1),
        "torch: PowerSGD rank 4": lambda shapes: _power_sgd(shapes, 4),
        "zstandard: level 1": lambda shapes: _zstd(1),
        "zstandard: level 3": lambda shapes: _zstd(3),
    }
    skipped = []
    for package, makers in (("bitsandbytes", _bitsandbytes), ("hivemind", _hivemind)):
        try:
            found |= makers()
        except ImportError as error:
            skipped.append(f"{package} is left out: it is not installed here ({error}).")
    return found, skipped


def versions() -> dict[str, str]:
    """Of the packages compared with, where they are installed."""
    told = {"zstandard": version("zstandard")}
    for package in ("bitsandbytes", "hivemind"):
        try:
            import_module(package)
            told[package] = version(package)
        except ImportError:
            pass
    return told


def _fp16() -> Subject:
    return Subject(lambda x: x.to(torch.float16), lambda half: half.to(torch.float32), lambda half: 2 * half.numel())


def _zstd(level: int) -> Subject:
    return Subject(
        lambda x: zstandard.ZstdCompressor(level=level).compress(x.numpy().data),
        lambda frame: torch.frombuffer(bytearray(zstandard.ZstdDecompressor().decompress(frame)), dtype=torch.float32),
        len,
    )


def _power_sgd(shapes: Shapes, rank: int) -> Subject:
    hook: Any = import_module("torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook")

    def matrices(x: Tensor) -> Iterator[tuple[Tensor, int]]:
        for shape, piece in zip(shapes, x.split([prod(shape) for shape in shapes]), strict=True):
            matrix = piece.view(shape[0], -1)
            r = min(*matrix.shape, rank)
            yield matrix, r if hook._should_compress(*matrix.shape, r, 2)[0] else 0

    def encode(x: Tensor) -> list[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(0)
        sent: list[tuple[Tensor, ...]] = []
        for matrix, r in matrices(x):
            if not r:
                sent.append((matrix.clone(),))
                continue
            q = torch.randn(1, matrix.shape[1], r, generator=generator).to(x.device)
            hook._orthogonalize(q)
            p = torch.bmm(matrix.unsqueeze(0), q)
            hook._orthogonalize(p)
            sent.append((p[0], torch.bmm(matrix.t().unsqueeze(0), p)[0]))
        return sent

    def decode(sent: Sequence[tuple[Tensor, ...]]) -> Tensor:
        x = torch.empty(sum(prod(shape) for shape in shapes), device=sent[0][0].device)
        for shape, piece, parts in zip(shapes, x.split([prod(shape) for shape in shapes]), sent, strict=True):
            target = piece.view(shape[0], -1)
            if len(parts) == 1:
                target.copy_(parts[0])
            else:
                torch.matmul(parts[0], parts[1].t(), out=target)
        return x

    return Subject(encode, decode, lambda sent: sum(4 * part.numel() for parts in sent for part in parts))


def _bitsandbytes() -> dict[str, Maker]:
    functional: Any = import_module("bitsandbytes.functional")

    def num_bytes(sent: Any) -> int:
        codes, state = sent
        return int(codes.nbytes + state.absmax.nbytes)

    def eight(shapes: Shapes) -> Subject:
        return Subject(
            lambda x: functional.quantize_blockwise(x, blocksize=256),
            lambda sent: functional.dequantize_blockwise(*sent),
            num_bytes,
        )

    def four(shapes: Shapes) -> Subject:
        return Subject(
            lambda x: functional.quantize_4bit(x, blocksize=64, quant_type="nf4"),
            lambda sent: functional.dequantize_4bit(*sent).view(-1),
            num_bytes,
        )

    return {"bitsandbytes: 8 bits": eight, "bitsandbytes: nf4": four}


def _hivemind() -> dict[str, Maker]:
    compression: Any = import_module("hivemind.compression")

    def of(kind: str) -> Maker:
        codec = getattr(compression, kind)()

        def make(shapes: Shapes) -> Subject:
            return Subject(
                lambda x: codec.compress(x, compression.CompressionInfo.from_tensor(x)),
                codec.extract,
                lambda sent: int(sent.ByteSize()),
            )

        return make

    return {"hivemind: uniform 8 bits": of("Uniform8BitQuantization"),
            "hivemind: quantile 8 bits": of("Quantile8BitQuantization")}  # fmt: skip
