"""How a scalar is written: in a byte, in two, or as it is. All relative to a power of two that members agree on.

    byte    bit 7: sign.  bits 0-6: c, for 2^E r_c with r_0 = 0 and r_c = m_(c mod 8) 2^floor((c - 127) / 8), c = 1..127
            m_k is 2^(k/8), rounded to 24 bits, for the k that puts r_127 at 1: eight levels an octave, 15.75 octaves
            0x80 (no number would be -0): the member abstains, its loss was not finite
    half    the float16 nearest to 2^(15-E) g
    whole   the float32 nearest to g

A magnitude above the top, 2^E, is written as the top (byte, half). Decoding takes no logarithm and no power: levels are
literal whole numbers and shifts of the exponent, exact in float32, and so the same on every machine.

Error   byte: a magnitude between two levels becomes one of them at random, so that its mean is what it was; neighbours
        are 9.05 % apart, the standard deviation at most 4.33 % of the magnitude. Below the lowest level, 2^(E-15.75):
        that level or 0. half: 2^-11 of the magnitude, down to 2^(E-29). whole: 2^-24.
Size    1, 2 or 4 bytes a scalar.
Source  Zelikman et al. 2023, arXiv:2306.10015 (Just One Byte), sends a scalar in a byte; the code is ours.
Differs a sign and 8 bits of logarithm there are nine bits. 127 fixed levels for the 33 octaves from 1e-6 to 1e4 lie
        20 % apart, a value up to 9.6 % from the nearest. But the scalars of a run keep near their median: half as many
        octaves that follow it lose nothing, and their levels lie half as far apart (4.3 % from the nearest).
"""

from __future__ import annotations

import math
import struct
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from thinwire.errors import ConfigError
from thinwire.expressions import Words, evaluate
from thinwire.randomness import random_bytes

#: Exponents of the top, E, that may be agreed on: decoded values are then never denormal in float32.
LOWEST, HIGHEST = -60, 60
#: Octaves from the byte's lowest level up to its top, rounded up.
OCTAVES = 16

_ABSTAINS = 0x80
_MANTISSAS = (8388608, 9147842, 9975792, 10878679, 11863283, 12937002, 14107901, 15384775)  # 2^(23 + k/8)
_LEVELS = (0.0, *(math.ldexp(_MANTISSAS[(c - 127) % 8], (c - 127) // 8 - 23) for c in range(1, 128)))
_MOST32 = (2.0 - 2.0**-23) * 2.0**127


class Code(Protocol):
    """Scalars to bytes and back.

    spec   the expression that makes it
    width  bytes of a scalar
    """

    @property
    def spec(self) -> str: ...

    @property
    def width(self) -> int: ...

    def encode(self, values: Sequence[float], exponent: int, key: int) -> Tensor:
        """A member's scalars.

        values    any floats; one that is not finite abstains
        exponent  E, from LOWEST to HIGHEST
        key       of the draws, where there are any
        returns   uint8 [width * len(values)], on the CPU
        """

    def decode(self, codes: bytes, exponent: int) -> list[float]:
        """What all members take them for: exact in float32; NaN for one that abstains.

        codes  a multiple of `width` bytes; any bytes have a meaning
        """


@dataclass(frozen=True)
class Byte:
    """See above."""

    spec: str = field(default="byte", init=False)
    width: int = field(default=1, init=False)

    def encode(self, values: Sequence[float], exponent: int, key: int) -> Tensor:
        words = struct.unpack(f"<{len(values)}I", random_bytes(key, 4 * len(values)).numpy().tobytes())
        codes = [_byte(value, exponent, word) for value, word in zip(values, words, strict=True)]
        return torch.tensor(codes, dtype=torch.uint8)

    def decode(self, codes: bytes, exponent: int) -> list[float]:
        return [math.nan if code == _ABSTAINS else _signed(code, exponent) for code in codes]


def _byte(value: float, exponent: int, word: int) -> int:
    """The code of a value, rounded up with the probability that keeps its mean.  word: uniform, 32 bits"""
    if not math.isfinite(value):
        return _ABSTAINS
    x = math.ldexp(min(abs(value), math.ldexp(1.0, exponent)), -exponent)  # in [0, 1]
    c = bisect_right(_LEVELS, x) - 1
    if c < 127 and word < 2.0**32 * (x - _LEVELS[c]) / (_LEVELS[c + 1] - _LEVELS[c]):
        c += 1
    return c | 0x80 if value < 0 and c else c  # a negative number that became 0 is 0, and does not abstain


def _signed(code: int, exponent: int) -> float:
    value = math.ldexp(_LEVELS[code & 0x7F], exponent)
    return -value if code & 0x80 else value


@dataclass(frozen=True)
class Half:
    """See above."""

    spec: str = field(default="half", init=False)
    width: int = field(default=2, init=False)

    def encode(self, values: Sequence[float], exponent: int, key: int) -> Tensor:
        top = math.ldexp(1.0, exponent)
        scaled = [math.ldexp(_clipped(value, top), 15 - exponent) for value in values]
        return _as_tensor(struct.pack(f"<{len(scaled)}e", *scaled))

    def decode(self, codes: bytes, exponent: int) -> list[float]:
        found = struct.unpack(f"<{len(codes) // 2}e", codes)
        return [math.ldexp(value, exponent - 15) if math.isfinite(value) else math.nan for value in found]


@dataclass(frozen=True)
class Whole:
    """See above."""

    spec: str = field(default="whole", init=False)
    width: int = field(default=4, init=False)

    def encode(self, values: Sequence[float], exponent: int, key: int) -> Tensor:
        return _as_tensor(struct.pack(f"<{len(values)}f", *(_clipped(value, _MOST32) for value in values)))

    def decode(self, codes: bytes, exponent: int) -> list[float]:
        return [v if math.isfinite(v) else math.nan for v in struct.unpack(f"<{len(codes) // 4}f", codes)]


#: Every code by the name used in expressions.
CODES: Mapping[str, Callable[..., Code]] = {"byte": Byte, "half": Half, "whole": Whole}
_WORDS = Words("code", CODES, "byte", "docs/seed-logs.md")


@lru_cache(maxsize=16)  # asked for in every round
def parse(expression: str) -> Code:
    """A code from an expression; its errors are ConfigErrors."""
    code = evaluate(expression, _WORDS)
    if not isinstance(code, Byte | Half | Whole):
        raise ConfigError(f"{expression!r} is no code", expected=" or ".join(CODES), mend="byte, say")
    return code


def float32(value: float) -> float:
    """The float32 nearest to a finite number; the largest one beyond them."""
    rounded: float = struct.unpack("<f", struct.pack("<f", _clipped(value, _MOST32)))[0]
    return rounded


def _clipped(value: float, most: float) -> float:
    return max(-most, min(most, value)) if math.isfinite(value) else math.nan


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
