"""float32 to half precision, once an update, so that what is too small for one step still counts in the mean.

    stochastic   up with the probability of the part that is cut off, down otherwise: E[rounded x] = x
    nearest      ties to even: what every library does. An update below half a step of the weight is lost for good

Sixteen bits r an element come from a Philox stream, so that all members round alike and in blocks of any size.
bfloat16: r is added to the sixteen bits that are then cut off. float16: its upper thirteen bits are added to the
thirteen; magnitudes below 2^-14, where float16 has a fixed step, are moved up by 2^-14 for it and back.

Error   stochastic: less than a step, unbiased to 2^-16 of a step (float16: 2^-13)
Cost    1/8 of a Philox block an element: as much as the signs of sixteen seeds
Source  Gupta et al. 2015, arXiv:1502.02551 (stochastic rounding)
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["stochastic", "nearest"]
ROUNDINGS = ("stochastic", "nearest")
PER_BLOCK = 8  # elements that a Philox block has bits for
_SMALLEST = 2.0**-14  # normal float16
_SIGN = -1 << 31


def nearest(x: Tensor, dtype: torch.dtype) -> None:
    """Round float32 [n] in place to what `dtype` holds."""
    x.copy_(x.to(dtype))


def stochastic(x: Tensor, dtype: torch.dtype, words: Tensor, spare: tuple[Tensor, Tensor]) -> None:
    """The same, at random.

    words  int32 [w], 2 w >= n: element j takes the lower half of word j // 2 if j is even, else the upper half
    spare  float32 [n] twice, of any content
    """
    bits, moved, r = x.view(torch.int32), spare[0], spare[1].view(torch.int32)
    r.copy_(words.view(torch.int16)[: len(x)]).bitwise_and_(0xFFFF)
    if dtype == torch.bfloat16:
        bits.add_(r).bitwise_and_(-1 << 16)  # a carry rounds the magnitude up
        return
    r.bitwise_right_shift_(3)
    r.bitwise_or_(torch.bitwise_and(bits, _SIGN, out=moved.view(torch.int32)))
    bits.bitwise_and_(~_SIGN)
    torch.lt(x, _SMALLEST, out=moved).mul_(_SMALLEST)
    x.add_(moved)
    bits.add_(r).bitwise_and_(-1 << 13)  # and with r the sign comes back
    x.sub_(moved.copysign_(x))
