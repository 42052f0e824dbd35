"""What the blockwise quantisers share: cutting a vector into blocks, rounding, checks of options and scales.

A vector of n elements is cut into blocks of B; the last one holds the t = n mod B left over, if any. Work is done on
pieces of whole blocks that fit a processor's cache: the same torch calls on the whole vector at once are several times
slower, because every temporary is then fresh memory. Results do not depend on the size of the pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from thinwire.codecs.memory import Scratch
from thinwire.codecs.options import is_whole
from thinwire.errors import ConfigError, PacketError
from thinwire.randomness import fill

Rounding = Literal["nearest", "stochastic"]

#: Blocks whose largest magnitude is below this become zero: 1 / magnitude would overflow, and processors that flush
#: denormal numbers to zero would disagree with those that do not.
TINY = 2.0**-120
#: Largest float32.
HUGE = torch.finfo(torch.float32).max
#: Taken off every claimed contraction: float32 rounding of quotients of up to 127 moves a boundary by 2^-16 of a step.
SLACK = 2.0**-13

_BELOW_TINY = TINY * (1 - 2.0**-24)  # the next smaller float32

_PIECE = {"cpu": 1 << 20}  # elements; other devices are fed larger ones, for them a call costs more than memory
_OTHER_PIECE = 1 << 26


def check_options(name: str, block: object, rounding: object, *, multiple: int = 2) -> None:
    """Refuse options that no blockwise quantiser can work with.

    multiple  what blocks must be multiples of: what they take is whole bytes, and dither comes in pairs
    """
    multiple = max(2, multiple)
    if not is_whole(block, multiple) or block % multiple:
        even = "an even whole number of at least 2" if multiple == 2 else f"a whole number, a multiple of {multiple}"
        raise ConfigError(
            f"{name} is to have blocks of {block!r}",
            expected=f"{even}: the elements that share a scale",
            mend=f"write {name}(block=256), say; a smaller block costs more bytes and loses less",
        )
    if rounding not in ("nearest", "stochastic"):
        raise ConfigError(
            f"{name} is to round {rounding!r}",
            expected="rounding='nearest' or rounding='stochastic'",
            mend="leave it out for nearest; stochastic is unbiased and loses more in each round",
        )


def num_blocks(n: int, block: int) -> int:
    return -(-n // block)


def pieces(n: int, block: int, device: torch.device) -> Iterator[tuple[int, int, int]]:
    """(start, stop, width): elements [start, stop) are rows of `width`, whole blocks or the one that is left over."""
    whole = n - n % block
    step = max(block, _PIECE.get(device.type, _OTHER_PIECE) // block * block)
    for start in range(0, whole, step):
        yield start, min(start + step, whole), block
    if whole < n:
        yield whole, n, n - whole


def flushed(largest: Tensor) -> Tensor:
    """In place: zero for blocks whose largest magnitude is below `TINY`."""
    return torch.threshold_(largest, _BELOW_TINY, 0.0)


def divisor(scale: Tensor) -> Tensor:
    """What the rows of blocks are divided by, [r, 1]: their scale, and infinity for 0, so that all becomes zero."""
    return torch.threshold(scale, 0.0, torch.inf).unsqueeze(1)


def dither(key: int, start: int, shape: torch.Size, scratch: Scratch) -> Tensor:
    """Uniform numbers of 16 bits for the elements from `start` on, start even.  int16 [rows, width] = `shape`

    A v stands for u = (v + 2^15 + 1/2) / 2^16, in (0, 1).

    Sixteen bits, not eight: an element of less than 2^-9 of a step would never be sent under an 8-bit u, however
    many rounds it stayed there. This way the mean over keys is off by at most 2^-16 of a step.
    """
    count = shape[0] * shape[1]
    words, spare = (scratch(name, ((count + 1) // 2,), torch.int32) for name in ("random", "spare"))
    fill(words, spare, key, start=start // 2)
    return words.view(torch.int16)[:count].view(shape)


def unit(v: Tensor, scratch: Scratch) -> Tensor:
    """The u that dither's v stands for; float32, exact."""
    return scratch("u", v.shape).copy_(v).mul_(2.0**-16).add_(0.5 + 2.0**-17)


def carry(v: Tensor, scratch: Scratch) -> Tensor:
    """The u that dither's v stands for, times 2^23; int32.

    Added to a float's bits it carries into the exponent with probability mantissa / 2^23: of the two powers of two
    beside a number, the mean of what is chosen is the number.
    """
    return scratch("carry", v.shape, torch.int32).copy_(v).add_(1 << 15).mul_(128).add_(64)


def sums(rows: Tensor) -> Tensor:
    """Sum of each row, in one order on every device: rows are folded in half until one element is left.

    rows     [r, w], overwritten
    returns  [r]; its rounding is at most 2^-24 log2(w) of the sum of magnitudes
    """
    width = rows.shape[1]
    while width > 1:
        half = width // 2
        rows[:, :half].add_(rows[:, width - half : width])
        width -= half
    return rows[:, 0].clone()


def require_scales(scale: Tensor, largest: float, name: str) -> None:
    """Refuse scales that decode to something else than finite numbers. NaN fails both comparisons."""
    if not bool(((scale >= 0) & (scale <= largest)).all()):
        raise PacketError(f"field {name!r} holds a scale that is negative, not finite or too large")


def contraction(relative_error: float, n: int, block: int, *, of_largest: float) -> float | None:
    """The delta that a bound on ||C(x) - x||^2 / ||x||^2 claims, or None.

    of_largest  share of the energy of a block's largest element that survives at least, if no element's error exceeds
                the element; 0 if one may. A B-th of it survives of the block's, whatever the other bound says
    """
    kept = max(1 - relative_error, of_largest / max(1, min(block, n)))
    return kept - SLACK if kept > SLACK else None
