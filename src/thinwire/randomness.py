"""Shared randomness: numbers every member can compute and nobody has to send.

A key is a 64-bit integer mixed from what identifies the draw (seed, round, fragment, sender, purpose).
Equal keys give equal numbers on every machine, device kind and library version, because only integer
arithmetic modulo 2^32 and 2^64 is used: no framework generator is involved.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1


def mix(*parts: int) -> int:
    """A 64-bit key from integers, order-sensitive; the finaliser of splitmix64 after each part."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state ^ (part & _MASK64)) * 0xBF58476D1CE4E5B9 & _MASK64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK64
        state ^= state >> 31
    return state


def random_bytes(key: int, count: int, device: torch.device | str = "cpu", *, start: int = 0) -> Tensor:
    """`count` uniform bytes of a key's stream, from its byte `start` on (a multiple of four).

    returns  uint8 [count], equal for equal keys on every device;
             random_bytes(k, n)[a:] == random_bytes(k, n - a, start=a)
    cost     one 32-bit hash (murmur3's finaliser on a counter) for four bytes
    """
    assert start % 4 == 0
    words = torch.empty((count + 3) // 4, dtype=torch.int32, device=device)
    fill(words, torch.empty_like(words), key, start=start // 4)
    return words.view(torch.uint8)[:count]


def fill(words: Tensor, spare: Tensor, key: int, *, start: int = 0) -> None:
    """The same stream into memory that is there, from its word `start` on.

    words, spare  int32 [w]; `spare` is left with any content
    """
    torch.arange(start, start + len(words), out=words)
    low, high = key & 0xFFFFFFFF, key >> 32
    words.mul_(_signed(0x9E3779B1)).add_(_signed(low))
    _scramble(words, spare)
    words.bitwise_xor_(_signed(high))
    _scramble(words, spare)


def _scramble(words: Tensor, spare: Tensor) -> None:
    """murmur3's 32-bit finaliser, in place on int32 words."""
    words.bitwise_xor_(_shift_right(words, 16, spare)).mul_(_signed(0x85EBCA6B))
    words.bitwise_xor_(_shift_right(words, 13, spare)).mul_(_signed(0xC2B2AE35))
    words.bitwise_xor_(_shift_right(words, 16, spare))


def _shift_right(words: Tensor, bits: int, spare: Tensor) -> Tensor:
    """Logical shift: int32 shifts are arithmetic in torch, so the sign bits are masked away."""
    return torch.bitwise_right_shift(words, bits, out=spare).bitwise_and_((1 << (32 - bits)) - 1)


def _signed(word: int) -> int:
    """The int32 with the bits of an unsigned 32-bit word."""
    return word - (1 << 32) if word >= 1 << 31 else word
