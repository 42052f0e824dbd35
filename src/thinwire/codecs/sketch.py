"""Count sketch: every element is added, with a random sign, to one random cell of each of a few rows.

    S[j, h_j(i)] += s_j(i) x_i        estimate of x_i = median over j of s_j(i) S[j, h_j(i)]

Sums of sketches are the sketch of the sum, so a plain all-reduce carries them, and what is large in the sum is found
there although no member may have known: `unsketch`. The estimates themselves are not linear.

Error   no bound for all x: what shares a cell with an element in most rows disturbs it by
        about ||x without its k largest|| / sqrt(W). Of 100 elements planted among 20 000 zeros, 99 are found with 40
        cells a row for each and 5 rows, or 4 cells and 15 rows; with 4 cells and 5 rows half of them, since zeros too
        meet planted elements in three rows by chance. Dense estimates from few cells hold more noise than signal:
        use `keep`, or a method that unsketches (fetchsgd).
Size    4 R W bytes, whatever n.
Cost    per row and element, a multiplication, a gather and an addition at a random cell, both ways.
Source  Charikar, Chen & Farach-Colton 2002 (ICALP); hashing: Dietzfelbinger 1996 (STACS), multiply-add-shift.
Differs sign and cell come from one hash, whose values are pairwise independent; for the variance of a sum of many
        elements the proof asks for four-wise, so no variance is claimed. Cells are summed in double precision, in order
        of the elements, on the processor: on a GPU the order, and the last bits, would be left to chance.
Avoid   for dense vectors, whose estimates are noise, and where positions are cheap: topk of the same size is exact.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.codecs.base import Codec, Traits, require
from thinwire.codecs.blocks import HUGE
from thinwire.codecs.options import call, changed, is_whole
from thinwire.codecs.selection import largest
from thinwire.errors import ConfigError
from thinwire.packet import Fields, Layout
from thinwire.randomness import mix

_PIECE = 1 << 15  # elements hashed at once; hashes take 8 bytes each
_SIGN = -(1 << 63)


@dataclass(frozen=True)
class Sketch(Codec):
    """A table of sums that estimates can be read from.

    width  cells of a row, W above
    rows   hashed independently, an odd number; R above
    keep   decode to this many estimates, the largest, and zeros elsewhere; None decodes to all of them
    """

    width: int
    rows: int = 5
    keep: int | None = None

    def __post_init__(self) -> None:
        check_table("sketch", self.width, self.rows)
        if self.keep is not None and not is_whole(self.keep, 1):
            raise ConfigError(
                f"sketch is to keep {self.keep!r} estimates",
                expected="a whole number of at least 1",
                mend="leave it out to decode all of them, or keep a quarter of the width",
            )

    @property
    def spec(self) -> str:
        return call("sketch", width=self.width, **changed(self))

    @property
    def traits(self) -> Traits:
        return Traits(linear=True, reencodes=False)

    def layout(self, n: int) -> Layout:
        check_indices("sketch", n)
        return {"cell": (torch.float32, self.rows * self.width)}

    def encode(self, x: Tensor, key: int) -> Fields:
        check_indices("sketch", len(x))
        return {"cell": sketched(x, self.width, self.rows, key).view(-1)}

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        require(fields, self.layout(n))
        estimates = estimated(fields["cell"].view(self.rows, self.width), n, key)
        if self.keep is None or self.keep >= n:
            return estimates
        index = largest(estimates, self.keep)
        return torch.zeros_like(estimates).index_copy_(0, index, estimates[index])


def check_table(name: str, width: object, rows: object) -> None:
    """Refuse tables that cannot be."""
    if not is_whole(width, 1, (1 << 31) - 1):
        raise ConfigError(
            f"{name} is to have rows of {width!r} cells",
            expected="a whole number of at least 1",
            mend=f"write {name}(width=50000), say: ten cells a row or more for each element that is to be found",
        )
    if not (is_whole(rows, 1) and rows % 2):
        raise ConfigError(
            f"{name} is to have {rows!r} rows",
            expected="an odd number, so that one of the estimates is in the middle",
            mend="leave it out for 5",
        )


def check_indices(name: str, n: int) -> None:
    if n >= 1 << 31:
        raise ConfigError(
            f"{name} of a vector of {n} elements",
            expected="fewer than 2^31: it hashes indices of 31 bits",
            mend="cut the model into more fragments",
        )


def sketched(x: Tensor, width: int, rows: int, key: int) -> Tensor:
    """The sums: float32 [rows, width], on x's device."""
    cells = torch.zeros(rows, width, dtype=torch.float64)
    for start, stop in _pieces(len(x)):
        elements = x[start:stop].cpu().double()
        for j, mixed in enumerate(_mixed(start, stop, rows, key, elements.device)):
            signed = _with_sign(elements, mixed)
            cells[j].index_add_(0, _cell(mixed, width), signed)
    return cells.clamp_(-HUGE, HUGE).float().to(x.device)


def estimated(cells: Tensor, n: int, key: int) -> Tensor:
    """All n estimates from cells [rows, width].  [n]"""
    rows, width = cells.shape
    x, exact = cells.new_empty(n), cells.double()
    for start, stop in _pieces(n):
        found = []
        for j, mixed in enumerate(_mixed(start, stop, rows, key, cells.device)):
            signs = mixed & _SIGN
            found.append(_with_sign(exact[j].index_select(0, _cell(mixed, width)), signs))
        x[start:stop] = _median(found)
    return x


def unsketch(cells: Tensor, n: int, k: int, key: int) -> tuple[Tensor, Tensor]:
    """The k largest estimates, by ascending position: positions (int64) and values, [k] each."""
    estimates = estimated(cells, n, key)
    index = largest(estimates, min(k, n))
    return index, estimates[index]


def touched(index: Tensor, width: int, rows: int, key: int) -> Iterator[Tensor]:
    """For each row, the cells that the elements at these positions are added to: int64 [len(index)]."""
    for a, b in _multipliers(rows, key):
        yield _cell(index * a + b, width)


def _multipliers(rows: int, key: int) -> Iterator[tuple[int, int]]:
    for j in range(rows):
        yield _signed(mix(key, j, 0) | 1), _signed(mix(key, j, 1))


def _pieces(n: int) -> Iterator[tuple[int, int]]:
    for start in range(0, n, _PIECE):
        yield start, min(start + _PIECE, n)


def _mixed(start: int, stop: int, rows: int, key: int, device: torch.device) -> Iterator[Tensor]:
    """For each row, the hashes of elements [start, stop), int64; no table of all elements."""
    index = torch.arange(start, stop, device=device)
    for a, b in _multipliers(rows, key):
        yield (index * a).add_(b)  # modulo 2^64


def _cell(mixed: Tensor, width: int) -> Tensor:
    """From the 32 bits below the sign: a number below `width`, each as likely; in place."""
    return mixed.bitwise_right_shift_(31).bitwise_and_(0xFFFFFFFF).mul_(width).bitwise_right_shift_(32)


def _with_sign(x: Tensor, mixed: Tensor) -> Tensor:
    """Float64 x, negated where the hash is negative: their sign bits side by side."""
    return (mixed & _SIGN).bitwise_xor_(x.view(torch.int64)).view(torch.float64)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


def _median(rows: list[Tensor]) -> Tensor:
    """Element by element the middle one of an odd number of rows: bubbles rise until the middle has settled."""
    for settled in range(len(rows) // 2 + 1):
        for i, j in itertools.pairwise(range(len(rows) - settled)):
            rows[i], rows[j] = torch.minimum(rows[i], rows[j]), torch.maximum(rows[i], rows[j])
    return rows[len(rows) // 2]


sketch = Sketch
