"""Random-k sparsification: k entries drawn from the key, so that their positions are never sent.

    C(x)_i = x_i if i was drawn, else 0        k = ceil(share * n)

    scaled=True    n/k times that, unbiased

The draw: cut the vector into k strata of n/k entries, more or less one; take one entry of each, uniformly; shift all
of them round the end of the vector by one uniform offset. The k entries differ, and each of the n is drawn with
probability k/n: a stratum of size m holds an entry for m of the n offsets, and draws it then with probability 1/m.

Error   unscaled: E||x - C(x)||^2 = (1 - k/n) ||x||^2; biased: wants ErrorFeedback. scaled: omega = n/k - 1, unbiased up
        to 2^-32 n/k; results beyond the range of float32 are clamped to it.
Size    4k bytes of values in the order of the draw, nothing else. Linear: members with one key send sums.
Cost    a hash, two multiplications and a read for each of k. No permutation, no sort; reads go through x once.
Source  Stich, Cordonnier & Jaggi 2018, arXiv:1809.07599, Def. 2.1 (rand-k); Konecny et al. 2016, arXiv:1610.05492
        (random masks from a seed).
Differs they draw among all sets of k entries; ours are one in each stratum. The bounds need the probability of single
        entries alone, and that is the same. Every layer has its share in every round, and nothing need be sorted.
Avoid   where a few entries hold most of the vector, as in gradients: topk keeps far more of it in the same values. And
        scaled inside error feedback, which an omega above 1 makes diverge.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from thinwire.codecs.base import Codec, Traits, require
from thinwire.codecs.blocks import HUGE, pieces
from thinwire.codecs.memory import zeros
from thinwire.codecs.options import call, changed, check_share
from thinwire.errors import ConfigError
from thinwire.packet import Fields, Layout
from thinwire.randomness import mix, random_bytes

_OFFSET = 2  # purpose of the key's second draw; 1 is a chain's second codec


@dataclass(frozen=True)
class RandK(Codec):
    """Keep some, drop the rest, whatever they hold.

    share   of the entries, in (0, 1]
    scaled  multiply by n/k on arrival: right in the mean over rounds and members, without feedback
    """

    share: float
    _: KW_ONLY
    scaled: bool = False

    values = "value"

    def __post_init__(self) -> None:
        mend = "for 1.5 % write randk(0.015); `thinwire codecs randk` shows its options"
        check_share("randk", self.share, of="entries sent", mend=mend)
        if not isinstance(self.scaled, bool):
            raise ConfigError(
                f"randk(scaled={self.scaled!r})",
                expected="True or False",
                mend="True without error feedback, False with it",
            )

    @property
    def spec(self) -> str:
        return call("randk", repr(float(self.share)), **changed(self))

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=self.scaled, linear=True, reencodes=False, wants_feedback=not self.scaled)

    def layout(self, n: int) -> Layout:
        return {"value": (torch.float32, math.ceil(self.share * n))}

    def encode(self, x: Tensor, key: int) -> Fields:
        n = len(x)
        value = x.new_empty(self.layout(n)["value"][1])
        for start, stop, p in _drawn(n, len(value), key, x.device):
            value[start:stop] = x.index_select(0, p)
        return {"value": value}

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        require(fields, self.layout(n))
        value = fields["value"]
        x = zeros(n, device=value.device)
        for start, stop, p in _drawn(n, len(value), key, value.device):
            kept = value[start:stop]
            x.index_copy_(0, p, kept.mul(n / len(value)).clamp_(-HUGE, HUGE) if self.scaled else kept)
        return x

    def contraction(self, n: int) -> float | None:
        return None if self.scaled else self._kept(n)

    def variance(self, n: int) -> float | None:
        return (1 + 2.0**-22) / self._kept(n) - 1 if self.scaled else None  # n/k is rounded to float32

    def _kept(self, n: int) -> float:
        """k/n."""
        return self.layout(n)["value"][1] / n if n else 1.0


def _drawn(n: int, k: int, key: int, device: torch.device) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, positions of the kept entries [start, stop), int64), in pieces that stay in the cache."""
    bits = min(32, 62 - n.bit_length())
    step = (n << bits) // max(1, k)
    offset = mix(key, _OFFSET) % max(1, n)
    for start, stop, _ in pieces(k, 1, device):
        edge = (torch.arange(start, stop + 1, device=device) * step).bitwise_right_shift_(bits)
        if stop == k:
            edge[-1] = n
        word = random_bytes(key, 4 * (stop - start), device, start=4 * start).view(torch.int32).long() & 0xFFFFFFFF
        p = word.mul_(edge.diff()).bitwise_right_shift_(32).add_(edge[:-1]).add_(offset)
        yield start, stop, p.sub_((p >= n).long().mul_(n))


randk = RandK
