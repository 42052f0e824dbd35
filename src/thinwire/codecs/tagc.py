"""TAGC: sparse vectors whose packets are added on the way and decode to the exact sum of what each member kept.

    kept_w = top_k(x_w)                              k = ceil(share * n)
    1  unit: a power of two for which all |kept_w| / unit < 2^23 (the largest over the members)
    2  union: which elements any member kept (bitmaps, joined)
    3  sum_w round(kept_w / unit), folded into a table of about `cells` n integers that peels (see peeling)

Tables are integers and add up in any order, in the network's or the owner's hands, without being decoded.

Error   sent_w is kept_w to half a unit, less what the table has no room for: of a union of more than cells / 1.3 of the
        elements, a part that changes from round to round stays out on all members. Biased: wants ErrorFeedback.
Size    two bits an element (the bitmap to the owners, and the union back), and twice 32 `cells` bits.
Cost    top-k; a fold of what is kept; to plan and to peel, a few random accesses for each element of the union.
Source  Polyakov et al. 2025, arXiv:2504.05638 (TAGC), after Li et al. 2023 (lossless homomorphic compression).
Differs top-k instead of a ladder of thresholds. Bitmaps are joined; added bit by bit, as in the public code, elements
        that two members share carry into their neighbours. Whole numbers instead of floats: sums are exact. What cannot
        be peeled is known before it is sent, and is left to the residual. Columns of 64 elements, not 1024, share their
        hashes: shards of a fragment would have too few blocks. Up to 255 members.
Avoid   with two members (topk is smaller), and where members keep different elements, so that the union outgrows the
        table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from thinwire.aggregators.base import Needs
from thinwire.codecs.base import Codec, Traits, require
from thinwire.codecs.options import call, check_share, is_number
from thinwire.codecs.peeling import Plan, Table, plan, rows_for
from thinwire.codecs.planar import pack_row, row_bytes, unpack_row
from thinwire.codecs.stages import Result, Stage, Staged, Stages, Tensors
from thinwire.codecs.topk import TopK
from thinwire.errors import ConfigError
from thinwire.packet import Fields, Layout
from thinwire.randomness import mix

_BITS = 23  # of a kept element as a whole number: 255 of them add up within 32 bits
_LANE = 64
_PEELS = 1.3  # rows that a nonzero takes
_SPARE = rows_for(0)  # rows that small tables have on top


@dataclass(frozen=True)
class TAGC(Staged):
    """Top-k, summed exactly without being decoded.

    share  of the entries that a member keeps, in (0, 1]
    cells  of the table for each element, in (0, 1): 1.3 times the share of elements that any member keeps
    """

    share: float = 0.2
    cells: float = 0.5

    def __post_init__(self) -> None:
        check_share("tagc", self.share, of="entries that a member keeps", mend="leave it out for 0.2")
        if not (is_number(self.cells) and 0 < self.cells < 1):
            raise ConfigError(
                f"tagc is to have {self.cells!r} cells an element",
                expected="a number between 0 and 1",
                mend="leave it out for 0.5, enough for a share of 0.2 and two members",
            )

    @property
    def spec(self) -> str:
        return call("tagc", share=float(self.share), cells=float(self.cells))

    @property
    def wants_feedback(self) -> bool:
        return True

    def run(self, x: Tensor, shared: Tensors, key: int) -> Stages:
        top = TopK(self.share)
        kept = top.decode(top.encode(x, 0), len(x), 0)
        largest, _ = yield Stage(kept.abs().amax().view(1) if len(x) else x.new_zeros(1), rule=Largest())
        union, _ = yield Stage((kept != 0).float(), Bitmap(), Largest())
        unit = 2.0 ** max(math.frexp(largest.item())[1] - _BITS, -149)
        combined, sent = yield Stage(kept, Peeled(union > 0, unit, self.cells, mix(key, 1)))
        return Result(combined, sent, shared)


@dataclass(frozen=True)
class Largest:
    """The largest value of each coordinate."""

    needs: Needs = field(default="coordinates", init=False, repr=False)
    weighs: bool = field(default=False, init=False, repr=False)

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        return rows.amax(dim=0)


@dataclass(frozen=True)
class Bitmap(Codec):
    """Which elements are above zero: a bit each, decoded to 0 and 1."""

    @property
    def spec(self) -> str:
        return "tagc.bitmap"

    @property
    def traits(self) -> Traits:
        return Traits()

    def layout(self, n: int) -> Layout:
        return {"bit": (torch.uint8, row_bytes(n, 1))}

    def encode(self, x: Tensor, key: int) -> Fields:
        return {"bit": pack_row((x > 0).view(torch.uint8), 1)}

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        require(fields, self.layout(n))
        return unpack_row(fields["bit"], n, 1).float()


@dataclass(frozen=True, eq=False)
class Peeled(Codec):
    """Elements of a union as whole numbers of `unit`, in a table of sums.

    union  bool [n]; others are not sent
    cells  for each element
    key    of the hashes, the same on all members
    """

    union: Tensor
    unit: float
    cells: float
    key: int

    @property
    def spec(self) -> str:
        return "tagc.table"

    @property
    def traits(self) -> Traits:
        return Traits(summable=True, reencodes=False)

    def part(self, begin: int, end: int) -> Peeled:
        return Peeled(self.union[begin:end], self.unit, self.cells, mix(self.key, begin))

    @cached_property
    def _rows(self) -> int:
        """Of the table; 0 if it would be no smaller than the elements themselves."""
        blocks = -(-len(self.union) // _LANE)
        rows = 3 * math.ceil((self.cells * blocks + _SPARE) / 3)
        return rows if rows < blocks else 0

    @cached_property
    def _plan(self) -> Plan:
        blocks = -(-len(self.union) // _LANE)
        full = torch.nn.functional.pad(self.union.cpu(), (0, blocks * _LANE - len(self.union))).view(blocks, _LANE)
        room = int((self._rows - _SPARE) / _PEELS)
        if int(full.sum(dim=0).max()) > room:  # who is first in the queue changes from round to round
            turn = self.key % blocks
            queue = full.roll(-turn, 0)
            full = (queue & (queue.cumsum(dim=0) <= room)).roll(turn, 0)
        return plan(Table(blocks, _LANE, self._rows // 3, self.key), full)

    def layout(self, n: int) -> Layout:
        assert n == len(self.union)
        return {"sum": (torch.int32, self._rows * _LANE if self._rows else n)}

    def encode(self, x: Tensor, key: int) -> Fields:
        whole = x.double().div_(self.unit).round_().to(torch.int32).mul_(self.union)
        if not self._rows:
            return {"sum": whole}
        found = self._plan
        matrix = torch.nn.functional.pad(whole.cpu(), (0, found.sent.numel() - len(x))).view_as(found.sent)
        return {"sum": found.table.fold(matrix * found.sent).view(-1).to(x.device)}

    def add(self, contributions: Sequence[Fields], n: int) -> Fields:
        for fields in contributions:
            require(fields, self.layout(n))
        total = contributions[0]["sum"].clone()
        for fields in contributions[1:]:
            total += fields["sum"]
        return {"sum": total}

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        require(fields, self.layout(n))
        whole = fields["sum"]
        if self._rows:
            sums = self._plan.peel(whole.cpu().view(self._rows, _LANE))
            whole = sums.view(-1)[:n].to(whole.device)
        return whole.double().mul_(self.unit).float()


tagc = TAGC
