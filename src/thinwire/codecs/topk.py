"""Top-k sparsification: send only the k entries of largest magnitude.

    C(x)_i = x_i if |x_i| is among the k largest, else 0        k = ceil(share * n)

    block=B    the same in each block of B entries, with k_B = ceil(share * B), so that every part of x is heard

Error   ||x - C(x)||^2 <= (1 - k/n) ||x||^2, in a block with its own k and n. Biased: wants ErrorFeedback.
Size    4k bytes of values in ascending order of index, and the index (indices.py): by default what is smallest of those
        whose length follows from k and n, about (2 + log2(n/k)) / 8 bytes an entry; none if all are kept.
Cost    up to an eighth: one pass with a threshold from a sample, set low enough for a few more than k to pass, and a
        selection among those; 12 bytes for each that passes. Above, in blocks, on other devices, and where the sample
        misled: a selection among all; two copies of x. The outcome is the same.
Source  Stich, Cordonnier & Jaggi 2018, arXiv:1809.07599, Def. 2.1; the sample as in Lin et al. 2018 (DGC),
        arXiv:1712.01887, sec. 5; shares while warming up: its sec. 3.3.
Differs of equal magnitudes the one of lower index is kept, so that all members and devices keep the same. DGC sends
        about k entries, those above the sample's threshold; we send the k largest, which costs no more.
Avoid   without error feedback, with few rounds (what is dropped needs rounds to come through), and with many members:
        what they keep differs, and the combined vector is no longer sparse.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from thinwire.codecs import indices
from thinwire.codecs.base import Codec, Traits, require
from thinwire.codecs.indices import INDEX, Index
from thinwire.codecs.memory import zeros
from thinwire.codecs.options import call, changed, check_share, is_whole
from thinwire.codecs.selection import largest, largest_in_blocks
from thinwire.errors import ConfigError, PacketError
from thinwire.packet import Fields, Layout


@dataclass(frozen=True)
class TopK(Codec):
    """Keep the largest, drop the rest.

    share  of the entries, in (0, 1]
    index  how positions are written: compact, smallest (which looks at varint too), packed, bitmap, varint,
           elias_fano, int32 (longest, needs no computing)
    block  entries that k is counted among; None for all of the vector
    """

    share: float
    _: KW_ONLY
    index: Index = "compact"
    block: int | None = None

    values = "value"

    def __post_init__(self) -> None:
        mend = "for 1.5 % write topk(0.015); `thinwire codecs topk` shows its options"
        check_share("topk", self.share, of="entries sent", mend=mend)
        if self.index not in INDEX:
            raise ConfigError(
                f"topk is to write its positions as {self.index!r}",
                expected="one of " + ", ".join(INDEX),
                mend="leave it out for compact, which is the shortest of those of known length",
            )
        if self.block is not None and not is_whole(self.block, 1):
            raise ConfigError(
                f"topk is to count in blocks of {self.block!r}",
                expected="a whole number of entries, at least 1",
                mend="write block=4096, or leave it out for the k largest of the whole vector",
            )

    @property
    def spec(self) -> str:
        return call("topk", repr(float(self.share)), **changed(self))

    @property
    def traits(self) -> Traits:
        return Traits(fixed_size=indices.exact(self.index), reencodes=False, wants_feedback=True)

    def layout(self, n: int) -> Layout:
        if self.index == "int32" and n >= 1 << 31:
            raise ConfigError(
                f"topk of a vector of {n} elements",
                expected="fewer than 2^31 for index='int32'",
                mend="leave index out: the others know no such limit",
            )
        k = self._kept(n)
        value: Layout = {"value": (torch.float32, k)}
        if k == n and self.index != "int32":
            return value
        return {**value, "index": indices.layout(self.index, k, n)}

    def encode(self, x: Tensor, key: int) -> Fields:
        n = len(x)
        layout = self.layout(n)
        if "index" not in layout:
            return {"value": x}
        p = self._positions(x)
        return {"value": x.index_select(0, p), "index": indices.write(self.index, p, n)}

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        layout = self.layout(n)
        require(fields, layout, exact=self.traits.fixed_size)
        require({"value": fields["value"]}, {"value": layout["value"]})
        value = fields["value"]
        if "index" not in layout:
            return value
        p = indices.read(self.index, fields["index"], len(value), n)  # [k]
        if self.block is not None:
            per_block = math.ceil(self.share * self.block)
            if not torch.equal(p // self.block, torch.arange(len(p), device=p.device) // per_block):
                raise PacketError("field 'index' does not have as many positions in each block as are kept of it")
        return zeros(n, device=value.device).index_copy_(0, p, value)  # [n]

    def contraction(self, n: int) -> float | None:
        if not n:
            return 1.0
        if self.block is None:
            return self._kept(n) / n
        lengths = {min(self.block, n), n % self.block or self.block}  # of a block, and of the last one
        return min(math.ceil(self.share * length) / length for length in lengths)

    def _positions(self, x: Tensor) -> Tensor:
        """Of what is kept, ascending; int64 [k]."""
        if self.block is None or self._kept(len(x)) == len(x):
            return largest(x, self._kept(len(x)))
        return largest_in_blocks(x, self.share, self.block)

    def _kept(self, n: int) -> int:
        if self.block is None:
            return math.ceil(self.share * n)
        return n // self.block * math.ceil(self.share * self.block) + math.ceil(self.share * (n % self.block))


def warmup_shares(final: float, stages: int) -> tuple[float, ...]:
    """Shares that fall geometrically to the final one over `stages` stages of a run's beginning.

        share_e = max(final^((e+1) / (stages+1)), final)        e = 0 .. stages - 1

    With a final share of 0.1 % and five stages: 31.6 %, 10 %, 3.2 %, 1 %, 0.32 %. Lin et al. 2018, arXiv:1712.01887.
    """
    TopK(final)  # refuses shares out of range
    if not is_whole(stages, 0):
        raise ConfigError(
            f"a warm-up of {stages!r} stages",
            expected="a whole number, at least 0",
            mend="five stages of an epoch each are usual",
        )
    return tuple(max(final ** ((stage + 1) / (stages + 1)), final) for stage in range(stages))


topk = TopK
