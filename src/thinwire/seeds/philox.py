"""Random words that can be computed anywhere in a stream: Philox4x32-10, a hash of a counter under a key.

    words(seed, tensor, 4b .. 4b+3, stream) = Philox4x32-10(counter = (b, tensor, stream, VERSION), key = seed)

A word depends on these numbers alone: not on how many are drawn at a time, on the device or on a library's version.
Only integer arithmetic modulo 2^64 is used, in numpy on a processor (whose vector units it knows better) and in torch
on every other device.

Cost    0.2 to 0.3 ns a bit on one core, in batches of `BATCH` blocks: ten rounds of five passes over each half
State   none
Source  Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3" (SC11): Philox, and the known
        answers of its authors' Random123 that the tests hold us to. docs/perturbations.md defines what we do with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from thinwire.codecs.memory import Scratch
from thinwire.errors import ConfigError

BATCH = 1 << 16  # blocks: fewer, and the interpreter costs more than the arithmetic; more, and caches are left
VERSION = 0  # of the definition, the counter's last word: another one draws everything anew
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85  # what the two halves of the key grow by from round to round
_ROUNDS = 10
_MASK = (1 << 32) - 1


@lru_cache(maxsize=1 << 16)
def tensor_id(name: str) -> int:
    """A parameter's 32 bits of the counter: the first four bytes of its name's BLAKE2b, little-endian."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")


def on_host(device: torch.device) -> bool:
    """Whether numpy computes there."""
    return device.type == "cpu"


def words(
    seed: int, tensor: int, start: int, count: int, device: torch.device | str = "cpu", stream: int = 0
) -> Tensor:
    """Words `start` to `start + count` of a tensor's stream.  int32 [count], the bits of unsigned ones"""
    first = start // 4
    block = torch.arange(first, (start + count + 3) // 4, dtype=torch.int64, device=device)
    return draw([seed], tensor, block, stream)[0, start - 4 * first :][:count].clone()


def draw(
    keys: Sequence[int], tensor: int | Tensor, block: Tensor, stream: int = 0, scratch: Scratch | None = None
) -> Tensor:
    """The four words of each of n blocks, for each of g keys.

    keys     64 bits each
    tensor   id of all blocks, or int64 [n]: one id a block
    block    int64 [n], from 0 to 2^32 - 1; its device is where the words are made
    returns  int32 [g, 4n], in memory of `scratch` if that is given
    """
    scratch = Scratch(block.device) if scratch is None else scratch
    shape = len(keys), len(block)
    turns: Any = scratch("turns", (3, 2, *shape), torch.int64)
    pairs: Any = scratch("words", (*shape, 2), torch.int64)
    low, high = _schedule(keys, block.device)
    shift: Any = torch.bitwise_right_shift
    counters: Any = (tensor, block)
    if on_host(block.device):
        turns, pairs, low, high = turns.numpy(), pairs.numpy(), low.numpy(), high.numpy()
        counters = tuple(x.numpy() if isinstance(x, Tensor) else x for x in counters)
        shift = np.right_shift
    _rounds(turns, pairs, low, high, counters, stream, shift)
    words = scratch("words", (*shape, 2), torch.int64)
    return words.view(torch.int32).view(shape[0], 4 * shape[1])


def _schedule(keys: Sequence[int], device: torch.device) -> tuple[Any, Any]:
    """Both halves of the keys, round by round.  int64 [10, g, 1] twice"""
    if wrong := [key for key in keys if not 0 <= key < 1 << 64]:
        raise ConfigError(
            f"a seed of {wrong[0]}", expected="64 bits: from 0 to 2^64 - 1", mend="seed % 2**64, on all members alike"
        )
    grown = torch.arange(_ROUNDS).view(-1, 1, 1)
    halves = [torch.tensor(part, dtype=torch.int64).view(1, -1, 1) for part in (
        [key & _MASK for key in keys], [key >> 32 for key in keys],
    )]  # fmt: skip
    low, high = (((half + grown * step) & _MASK).to(device) for half, step in zip(halves, _WEYL, strict=True))
    return low, high


def _rounds(turns: Any, pairs: Any, low: Any, high: Any, counters: tuple[Any, Any], stream: int, shift: Any) -> None:
    """Fill `pairs` [g, n, 2] with words, two in each of its 64 bits; numpy arrays or torch tensors alike.

    A round takes (a, c, b, d) to (hi(b m1) ^ c ^ k0, lo(b m1), hi(a m0) ^ d ^ k1, lo(a m0)). Of c and d only the lower
    32 bits count: products are kept whole. In the first round a is the block, so its product is common to
    all keys; b is the stream, so its product is one number; c is the tensor and d the version.
    """
    tensor, block = counters
    m0, m1 = _MULTIPLIERS
    (a, b), c, d = turns[0], (stream * m1) & _MASK, turns[2][0][:1]  # [g, n] twice, [], [1, n]
    d[:] = block
    d *= m0
    a[:] = tensor
    a ^= low[0] ^ (stream * m1 >> 32)
    b[:] = d
    b >>= 32
    b &= _MASK
    b ^= high[0] ^ VERSION
    for r in range(1, _ROUNDS):
        a *= m0
        b *= m1
        x, y = turns[r % 3]  # what turns a and c were two rounds ago
        shift(b, 32, out=x)
        x ^= c
        x ^= low[r]
        x &= _MASK
        shift(a, 32, out=y)
        y ^= d
        y ^= high[r]
        y &= _MASK
        a, b, c, d = x, y, b, a
    for place, (word, upper) in enumerate(((a, c), (b, d))):
        upper <<= 32
        upper |= word
        pairs[..., place] = upper
