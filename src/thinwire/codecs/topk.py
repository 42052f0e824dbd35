"""Top-k sparsification: send only the k entries of largest magnitude.

    C(x)_i = x_i if |x_i| is among the k largest, else 0        k = ceil(share * n)

Error   ||x - C(x)||^2 <= (1 - k/n) ||x||^2. Biased: wants ErrorFeedback.
Size    8k bytes: one float32 value and one int32 index per entry, in ascending order of index.
Cost    one histogram of the upper 16 bits of the magnitudes, one of the lower within the boundary's bin; O(n) whatever
        the data.
Source  Stich, Cordonnier & Jaggi 2018, arXiv:1809.07599, Def. 2.1.
Differs of equal magnitudes the one of lower index is kept, so that all members and devices keep the same.
Avoid   without error feedback, with few rounds (what is dropped needs rounds to come through), and with many members:
        what they keep differs, and the combined vector is no longer sparse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.codecs.base import Codec, Traits, require
from thinwire.errors import ConfigError, PacketError
from thinwire.packet import Fields, Layout


@dataclass(frozen=True)
class TopK(Codec):
    """Keep the largest, drop the rest.

    share  of the entries, in (0, 1]
    """

    share: float

    values = "value"

    def __post_init__(self) -> None:
        number = isinstance(self.share, int | float) and not isinstance(self.share, bool)
        if not (number and 0 < self.share <= 1):
            raise ConfigError(
                f"topk is to keep a share of {self.share!r}",
                expected="a number in (0, 1]: the share of entries sent",
                mend="for 1.5 % write topk(0.015); `thinwire codecs topk` shows its options",
            )

    @property
    def spec(self) -> str:
        return f"topk({float(self.share)!r})"

    @property
    def traits(self) -> Traits:
        return Traits(reencodes=False, wants_feedback=True)

    def layout(self, n: int) -> Layout:
        if n >= 1 << 31:
            raise ConfigError(
                f"topk of a vector of {n} elements",
                expected="fewer than 2^31: its indices are int32",
                mend="cut the model into more fragments",
            )
        k = math.ceil(self.share * n)
        return {"value": (torch.float32, k), "index": (torch.int32, k)}

    def encode(self, x: Tensor, key: int) -> Fields:
        k = self.layout(len(x))["value"][1]
        index = _largest(x, k)  # [k]
        return {"value": x[index], "index": index.int()}

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        require(fields, self.layout(n))
        value, index = fields["value"], fields["index"]
        if len(index) and not bool((index[0] >= 0) & (index[-1] < n) & (index[1:] > index[:-1]).all()):
            raise PacketError(
                "field 'index' is not a list of ascending positions", expected=f"ascending positions below {n}"
            )
        return value.new_zeros(n).index_copy_(0, index.long(), value)  # [n]

    def contraction(self, n: int) -> float | None:
        return self.layout(n)["value"][1] / n if n else 1.0


def _largest(x: Tensor, k: int) -> Tensor:
    """Positions of the k largest magnitudes, ascending; int64 [k]."""
    if k == len(x):
        return torch.arange(k, device=x.device)
    magnitude = x.abs().view(torch.int32)  # floats without sign are ordered as their bits are
    upper, rank = _bin(torch.bincount(magnitude >> 16, minlength=1 << 15), k)
    candidates = (magnitude >= upper << 16).nonzero().squeeze(1)  # [k or more], ascending
    magnitude = magnitude[candidates]
    lower, _ = _bin(torch.bincount(magnitude[magnitude >> 16 == upper] & 0xFFFF, minlength=1 << 16), rank)
    boundary = upper << 16 | lower  # the k-th largest
    keep = magnitude > boundary
    ties = (magnitude == boundary).nonzero().squeeze(1)
    keep[ties[: k - int(keep.sum())]] = True
    return candidates[keep]


def _bin(counts: Tensor, k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest, and its rank among those in that bin."""
    from_above = counts.flip(0).cumsum(0)
    place = int((from_above < k).sum())
    return len(counts) - 1 - place, k - (int(from_above[place - 1]) if place else 0)


topk = TopK
