"""Channel-separable token-wise quantisation, of a KV cache's values: tokens are rows, channels differ a lot in size.

    y_tj = x_tj / c_j,   c_j = sqrt(max_t |x_tj|)        each channel made smaller by one number
    q_tj = round((y_tj - l_t) / s_t),   s_t = (max_j y_tj - l_t) / (2^bits - 1),   l_t = min_j y_tj
    C(x)_tj = (l_t + s_t q_tj) c_j

A grid for each token costs two numbers a token and one a channel, where one for each group of 32 costs two every 32;
without c_j the largest channels would have the grid for themselves. l_t is rounded down and s_t up to bfloat16, so that
the grid still spans the token.

Error   |x_tj - C(x)_tj| <= c_j s_t / 2. A channel that is zero for all tokens stays zero, and so does a token of zeros.
        Zero is not on the grid: no contraction is claimed. Made for caches and activations, not for updates.
Size    4 bytes a channel, 4 a token, and `bits` an element.
Source  He et al. 2024, arXiv:2405.14256 (ZipCache), eq. 6 to 8.
Differs their parameters are float16, which overflows for large activations and cannot be rounded outwards as far.
Avoid   for updates, which need zero on the grid, and where channels are alike: int4 costs less.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.codecs.base import Codec, Traits, require
from thinwire.codecs.blocks import HUGE, TINY, num_blocks, pieces, require_scales
from thinwire.codecs.memory import empty
from thinwire.codecs.options import call, changed, is_whole
from thinwire.codecs.planar import pack_row, row_bytes, unpack_row
from thinwire.errors import ConfigError, PacketError
from thinwire.packet import Fields, Layout

_MOST = 2.0**65  # square root of the largest float32, twice: no channel's root, lowest value or step is beyond it


@dataclass(frozen=True)
class CST(Codec):
    """The vector is [tokens, channels], row after row; the last row may be shorter.

    channels  numbers of a token
    bits      of a code: 2, 4 or 8
    """

    channels: int
    bits: int = 4

    def __post_init__(self) -> None:
        check_channels("cst", self.channels)
        if isinstance(self.bits, bool) or self.bits not in (2, 4, 8):
            raise ConfigError(
                f"cst is to have codes of {self.bits!r} bits",
                expected="2, 4 or 8",
                mend="4 for the tokens that matter and 2 for the others: split_tokens takes them apart",
            )

    @property
    def spec(self) -> str:
        return call("cst", channels=self.channels, **changed(self))

    @property
    def traits(self) -> Traits:
        return Traits()

    @property
    def _largest_code(self) -> int:
        return (1 << self.bits) - 1

    def layout(self, n: int) -> Layout:
        tokens = num_blocks(n, self.channels)
        return {
            "channel": (torch.float32, min(self.channels, n)),
            "low": (torch.bfloat16, tokens),
            "step": (torch.bfloat16, tokens),
            "code": (torch.uint8, row_bytes(n, self.bits)),
        }

    def encode(self, x: Tensor, key: int) -> Fields:
        n, device = len(x), x.device
        channel = channel_maxima(x, self.channels).sqrt_()  # [C]
        divisor = channel.masked_fill(channel == 0, torch.inf)
        low = torch.empty(num_blocks(n, self.channels), device=device)  # [T]
        step, codes = torch.empty_like(low), torch.empty(n, dtype=torch.uint8, device=device)
        for start, stop, width in pieces(n, self.channels, device):
            y = x[start:stop].reshape(-1, width) / divisor[:width]  # [t, C]
            here = slice(start // self.channels, start // self.channels + len(y))
            low[here] = _bfloat_below(y.amin(dim=1))
            step[here] = _bfloat_above(self._steps(y.amax(dim=1).sub_(low[here])))
            y.sub_(low[here, None]).div_(step[here, None].masked_fill(step[here, None] == 0, torch.inf))
            codes[start:stop] = y.round_().clamp_(0, self._largest_code).view(-1)
        return {
            "channel": channel,
            "low": low.bfloat16(),
            "step": step.bfloat16(),
            "code": pack_row(codes, self.bits),
        }

    def _steps(self, span: Tensor) -> Tensor:
        # By a tensor, not by a number: GPUs multiply by a number's reciprocal instead, which is a bit off now and then.
        step = span / torch.full_like(span, self._largest_code)
        return step.masked_fill_(step < TINY, 0.0)

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        require(fields, self.layout(n))
        channel, low, step = fields["channel"], fields["low"].float(), fields["step"].float()
        require_scales(channel, _MOST, "channel")
        require_scales(step, _MOST, "step")
        if not bool((low.abs() <= _MOST).all()):
            raise PacketError("field 'low' holds a number that is not finite or too large")
        codes = unpack_row(fields["code"], n, self.bits)
        x = empty(n, torch.float32, codes.device)
        for start, stop, width in pieces(n, self.channels, codes.device):
            rows = x[start:stop].view(-1, width)  # [t, C]
            here = slice(start // self.channels, start // self.channels + len(rows))
            rows.copy_(codes[start:stop].view_as(rows)).mul_(step[here, None]).add_(low[here, None])
            # The grid reaches a little further than the numbers did: at the limit of float32, beyond it.
            rows.mul_(channel[:width]).clamp_(-HUGE, HUGE)
        return x


def check_channels(name: str, channels: object) -> None:
    """Refuse what is no number of channels."""
    if not is_whole(channels, 1):
        raise ConfigError(
            f"{name} is to have {channels!r} channels",
            expected="a whole number of at least 1: how many numbers of the vector are one token",
            mend=f"for a cache of [tokens, heads, size of a head], write {name}(channels=heads * size)",
        )


def channel_maxima(x: Tensor, channels: int) -> Tensor:
    """The largest magnitude of each channel, 0 where it is negligible.  float32 [min(channels, n)]"""
    largest = x.new_zeros(min(channels, len(x)))
    for start, stop, width in pieces(len(x), channels, x.device):
        here = x[start:stop].reshape(-1, width).abs().amax(dim=0)
        largest[:width] = torch.maximum(largest[:width], here)
    return largest.masked_fill_(largest < TINY, 0.0)


def _bfloat_below(x: Tensor) -> Tensor:
    """The largest bfloat16 that is not above, as float32; 0 for what is negligible."""
    bits = x.masked_fill(x.abs() < TINY, 0.0).view(torch.int32)
    # What is cut off a negative number brings it up: add so much to its magnitude first that it comes out below.
    return bits.add((bits >> 31).bitwise_and_(0xFFFF)).bitwise_and_(-0x10000).view(torch.float32)


def _bfloat_above(x: Tensor) -> Tensor:
    """The smallest bfloat16 that is not below, as float32, of numbers that are not negative."""
    return (x.view(torch.int32) + 0xFFFF).bitwise_and_(-0x10000).view(torch.float32)


def salient_tokens(attention: Tensor, positions: Tensor, share: float) -> Tensor:
    """The tokens that the others look at most, each by the mean attention of the rows that can see it.

    attention  float32 [rows, tokens], softmax rows of some queries; zero where a query is before the token
    positions  int64 [rows]: which token each query is
    share      of the tokens, in [0, 1], rounded up
    returns    bool [tokens]; of equals the earlier
    source     arXiv:2405.14256, eq. 9: a plain sum would favour the first tokens, which all rows see
    """
    tokens = torch.arange(attention.shape[1], device=attention.device)
    seeing = (positions[:, None] >= tokens).sum(dim=0).clamp_(min=1)  # [tokens]
    mean = attention.double().sum(dim=0) / seeing
    chosen = mean.sort(descending=True, stable=True).indices[: -int(-share * len(mean) // 1)]
    return torch.zeros_like(tokens, dtype=torch.bool).index_fill_(0, chosen, True)


def split_tokens(x: Tensor, channels: int, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen tokens and the others, each as a flat vector, to be written by two codecs.

    x        float32 [tokens * channels]
    chosen   bool [tokens]; sent along at a bit a token
    """
    rows = x.view(-1, channels)
    return rows[chosen].view(-1), rows[~chosen].view(-1)


def join_tokens(first: Tensor, second: Tensor, channels: int, chosen: Tensor) -> Tensor:
    """The inverse of `split_tokens`."""
    rows = first.new_empty(len(chosen), channels)
    rows[chosen], rows[~chosen] = first.view(-1, channels), second.view(-1, channels)
    return rows.view(-1)


cst = CST
