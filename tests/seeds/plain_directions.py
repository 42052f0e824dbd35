"""The definitions of docs/perturbations.md, word by word and element by element: what the fast code is held to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from thinwire.seeds.updates import Update

F = np.float32
Z = Callable[[int, str, int], np.ndarray]  # seed, name, elements -> float32 [n]


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32-10 in Python's integers."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ k0, p1 & 0xFFFFFFFF, p0 >> 32 ^ c[3] ^ k1, p0 & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


def tensor_id(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8"), digest_size=4).digest(), "little")


def word(seed: int, tensor: int, index: int, stream: int = 0) -> int:
    key = seed & 0xFFFFFFFF, seed >> 32
    return philox((index // 4, tensor, stream, 0), key)[index % 4]


def rademacher(seed: int, name: str, n: int) -> np.ndarray:
    words = [word(seed, tensor_id(name), index) for index in range((n + 31) // 32)]
    return np.array([1 - 2 * (words[j // 32] >> j % 32 & 1) for j in range(n)], dtype=F)


def binomial(seed: int, name: str, n: int) -> np.ndarray:
    words = [word(seed, tensor_id(name), index) for index in range(2 * n)]
    set_bits = [bin(words[2 * j]).count("1") + bin(words[2 * j + 1]).count("1") for j in range(n)]
    return np.array([(count - 32) / 4 for count in set_bits], dtype=F)


def is_reached(seed: int, layer: str, share: float) -> bool:
    return word(seed, tensor_id(layer), 0, stream=2) < int(share * 2**32)


def applied(w: Tensor, name: str, updates: Sequence[Update], z: Z = rademacher) -> Tensor:
    """A float32 tensor after its updates, in the contract's order."""
    x = w.numpy().reshape(-1).copy()
    for update in updates:
        if w.ndim >= 2:
            x = x * F(update.keep)
        told = [(seed, c) for seed, c in zip(update.seeds, update.scalars, strict=True) if c]
        for begin in range(0, len(told), 8):
            u = None
            for seed, c in told[begin : begin + 8]:
                product = F(c) * z(seed, name, len(x))
                u = product if u is None else u + product
            x = x - u
    return torch.from_numpy(x).view(w.shape)
