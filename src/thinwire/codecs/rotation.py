"""Randomised Hadamard rotation: every element becomes a sum of all in its block, so that none stands out.

    C(x) = 2^-s H D x      D = diag(+-1) from the key, H the orthonormal Hadamard matrix of each block, s a constant

A quantiser that follows meets a vector whose elements are nearly Gaussian whatever x was: `rotation | int4`. The last
n mod B elements are cut into blocks of the powers of two that they consist of, so that nothing is padded. The factor
2^-s keeps the largest float32 vectors finite.

Error   none but float32 rounding; a chain's error is that of the codec after it, which sees the norms of x.
Size    4n bytes, which the codec after it replaces.
Cost    log2 B additions an element and a few passes. Measured on one core at B = 4096: the additions alone 0.75 GB/s,
        two matrix products of 64 x 64 instead 1.0 GB/s, with other last bits on every processor, and the same in exact
        double precision 0.4 GB/s; the whole codec 0.5 GB/s.
Source  Ailon & Chazelle 2009 (SIAM J. Comput. 39); Suresh et al. 2017, arXiv:1611.00429, Sect. 3.
Differs the transform adds and subtracts only, in one order: members of any kind get the same bits. Signs are new for
        every block.
Avoid   before sparsifiers, which live on elements that stand out, and alone: it saves nothing by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.codecs.base import Codec, Traits, require
from thinwire.codecs.blocks import HUGE, SLACK, pieces
from thinwire.codecs.memory import Scratch, empty
from thinwire.codecs.options import altered, call, changed, is_whole
from thinwire.errors import ConfigError
from thinwire.packet import Fields, Layout
from thinwire.randomness import mix, random_bytes

DEFAULT_BLOCK = 4096


@dataclass(frozen=True)
class Rotation(Codec):
    """The rotated vector, as float32.

    block   elements rotated together, a power of two; B above
    rounds  of signs and Hadamard, 1 or 2; two hide heavy tails better at twice the cost
    """

    block: int = DEFAULT_BLOCK
    rounds: int = 1

    values = "value"

    def __post_init__(self) -> None:
        check_rotation("rotation", self.block, self.rounds)

    def __call__(self, block: int | None = None, *, rounds: int | None = None) -> Rotation:
        """The same codec with other options: `rotation(block=1024)`."""
        return altered(self, block=block, rounds=rounds)

    @property
    def spec(self) -> str:
        return call("rotation", **changed(self))

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=True)

    def layout(self, n: int) -> Layout:
        return {"value": (torch.float32, n)}

    def encode(self, x: Tensor, key: int) -> Fields:
        value = empty(len(x), torch.float32, x.device)
        for start, stop, rotated in rotate(x, self.block, self.rounds, key, Scratch(x.device)):
            value[start:stop] = rotated
        return {"value": value}

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        require(fields, self.layout(n))
        value = fields["value"]
        x, scratch = empty(n, torch.float32, value.device), Scratch(value.device)
        for start, stop, _ in pieces(n, self.block, value.device):
            x[start:stop] = value[start:stop]
            rotate_back(x[start:stop], start, self.block, self.rounds, key, scratch)
        return x

    def contraction(self, n: int) -> float | None:
        return 1 - SLACK

    def variance(self, n: int) -> float | None:
        return SLACK


def check_rotation(name: str, block: object, rounds: object) -> None:
    """Refuse options that nothing can be rotated with."""
    if not is_whole(block, 1 << 6, 1 << 20) or block & (block - 1):
        raise ConfigError(
            f"{name} is to have blocks of {block!r}",
            expected="a power of two from 64 to 1048576: the elements that are rotated together",
            mend=f"write {name}(block=4096); larger blocks hide outliers better and are slower",
        )
    if rounds not in (1, 2) or isinstance(rounds, bool):
        raise ConfigError(
            f"{name} in {rounds!r} rounds",
            expected="rounds=1 or rounds=2",
            mend="leave it out for 1; two are for heavy tails at 1 bit",
        )


def rotate(x: Tensor, block: int, rounds: int, key: int, scratch: Scratch) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, rotated elements [stop - start]) piece by piece; each is overwritten by the next."""
    for start, stop, _ in pieces(len(x), block, x.device):
        work = scratch("rotated", (stop - start,)).copy_(x[start:stop])
        for turn in range(rounds):
            _flip(work, start, mix(key, turn))
            down = 0.0 if turn else _shift(block)
            for begin, end, width in parts(stop - start, block):
                _hadamard(work[begin:end], width, down, scratch)
        yield start, stop, work


def rotate_back(work: Tensor, start: int, block: int, rounds: int, key: int, scratch: Scratch) -> None:
    """The inverse, in place on the piece of rotated elements that begins at `start`. Never gives inf or NaN."""
    for turn in reversed(range(rounds)):
        for begin, end, width in parts(len(work), block):
            _hadamard(work[begin:end], width, 0.0, scratch)
        _flip(work, start, mix(key, turn))
    # The largest float32 vectors may be overshot by what a quantiser changed.
    work.mul_(2.0 ** _shift(block)).nan_to_num_(0.0, HUGE, -HUGE)


def parts(n: int, block: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, width): elements [begin, end) of a piece are blocks of `width`, a power of two."""
    begin, left = 0, n % block
    if n >= block:
        begin = n - left
        yield 0, begin, block
    while left:
        width = 1 << (left.bit_length() - 1)
        yield begin, begin + width, width
        begin, left = begin + width, left - width


def num_parts(n: int, block: int) -> int:
    """Blocks that n elements make."""
    return n // block + (n % block).bit_count()


def _shift(block: int) -> int:
    """s: a block of float32 vectors has a norm of at most sqrt(B) times the largest; four bits of room for sums."""
    return block.bit_length() // 2 + 4


def _flip(work: Tensor, start: int, key: int) -> None:
    """Signs of elements [start, start + len), one bit of the key's stream each; start a multiple of 32."""
    drawn = random_bytes(key, -(-len(work) // 8), work.device, start=start // 8)
    work.mul_(_signs(work.device).index_select(0, drawn.int()).view(-1)[: len(work)])


@functools.cache
def _signs(device: torch.device) -> Tensor:
    """1 or -1 for each bit of each byte, from the lowest up; [256, 8]"""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return (1.0 - 2.0 * bits).to(device)


def _hadamard(x: Tensor, width: int, down: float, scratch: Scratch) -> None:
    """Blocks of `width` times the orthonormal matrix and 2^-down, in place; its own inverse, but for 2^-down.

    A block is seen as a matrix: sums along its columns, and then, on the transposed matrix, along what were its rows,
    because sums of elements that lie close together are slow.
    """
    if width == 1:
        x.mul_(2.0**-down)
        return
    j = width.bit_length() - 1
    sides = [1 << (j + 1) // 2, 1 << j // 2]
    a, b = x.mul_(2.0 ** (-j / 2 - down)), scratch("sums", x.shape)
    for side, other in (sides, sides[::-1]):
        half = width // 2
        while half >= other:
            (left, right), (total, difference) = a.view(-1, 2, half).unbind(1), b.view(-1, 2, half).unbind(1)
            torch.add(left, right, out=total)
            torch.sub(left, right, out=difference)
            a, b, half = b, a, half // 2
        b.view(-1, other, side).copy_(a.view(-1, side, other).transpose(1, 2))
        a, b = b, a
    if a is not x:
        x.copy_(a)


rotation = Rotation()
