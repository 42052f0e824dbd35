"""Deltas to anchor tokens, of a KV cache: the tokens of a group are alike, so one is sent and the others' difference.

    anchors   a = s q,   q = round(x / s),   s = max_anchors |x| / 127               the first token of each group
    others    C(x) = C(a) + 2 h q,   q = round((x - C(a)) / 2h),   2h = max(bin rms(x - C(a)), max |x - C(a)| / 127)

s and h are those of a layer's channel; rms and max go over its tokens. Differences are to the anchor, not to the token
before, so that all of a group are read at once. `bins` are steps in units of the rms of what is coded: 0.5, 1 and 1.5
for the first, middle and last third of the layers, since the first matter most. The codes want an entropy coder behind
them: `anchor_delta(...) | rans` writes normal ones in 3.1, 2.1 and 1.6 bits. In units of rms they share one table.

It pays where tokens are much alike. Of an AR(1) = 0.95 cache at steps of sigma/4, the differences take 3.5 bits where
the numbers themselves take 4.1, and 4.0 with the 8 bits of every tenth token; at steps of sigma, nothing is gained.

Error   |x - C(x)| <= h off the anchors, <= s/2 on them; h and s are in the packet. Numbers that are small beside their
        channel's others count for nothing: no contraction is claimed. Made for caches and activations.
Size    n bytes, and 8 a channel and layer, before the entropy coder.
Source  Liu et al. 2024, arXiv:2310.07240 (CacheGen), sec. 5.2.
Differs the paper fits its arithmetic coder a table for each channel and layer, which can take more room than the codes;
        we scale each channel instead. Its released code has no deltas at all.
Avoid   without an entropy coder behind it, for updates, and at coarse steps: the anchors' 8 bits outweigh the gain.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.codecs.base import Codec, Traits, require
from thinwire.codecs.blocks import HUGE, TINY, num_blocks, require_scales
from thinwire.codecs.cst import check_channels
from thinwire.codecs.options import call, changed, is_number, is_whole
from thinwire.errors import ConfigError, PacketError
from thinwire.packet import Fields, Layout

_LARGEST_CODE = 127
_PIECE = 1 << 18  # elements worked on at once
_FINE = 4095  # levels that deltas are rounded to before their squares are summed


@dataclass(frozen=True)
class AnchorDelta(Codec):
    """The vector is [layers, tokens, channels], row after row; the last row may be shorter, the last layer too.

    channels  numbers of a token
    layers    how many; layer l takes the bin l len(bins) // layers
    group     tokens that share an anchor
    bins      steps, in units of the rms of a channel's deltas
    """

    channels: int
    layers: int = 1
    group: int = 10
    bins: tuple[float, ...] = (0.5, 1.0, 1.5)

    def __post_init__(self) -> None:
        check_channels("anchor_delta", self.channels)
        for option, least, what in (("layers", 1, "layers in the vector"), ("group", 2, "tokens with one anchor")):
            value = getattr(self, option)
            if not is_whole(value, least):
                raise ConfigError(
                    f"anchor_delta is to have {option}={value!r}",
                    expected=f"a whole number of at least {least}: how many {what}",
                    mend=f"leave it out for {type(self).__dataclass_fields__[option].default}",
                )
        if not (isinstance(self.bins, tuple) and self.bins and all(_is_bin(width) for width in self.bins)):
            raise ConfigError(
                f"anchor_delta is to have bins={self.bins!r}",
                expected="a tuple of numbers from 2^-10 to 2^10, one for each part of the layers",
                mend="write bins=(0.5, 1.0, 1.5), or bins=(0.5,) for all layers alike; smaller ones lose less",
            )
        object.__setattr__(self, "bins", tuple(float(width) for width in self.bins))

    @property
    def spec(self) -> str:
        return call("anchor_delta", channels=self.channels, **changed(self))

    @property
    def traits(self) -> Traits:
        return Traits()

    def layout(self, n: int) -> Layout:
        shape = _Shape.of(self, n)
        scales = shape.layers * shape.channels
        return {
            "scale": (torch.float32, scales),
            "anchor": (torch.int8, shape.anchors * shape.channels),
            "half": (torch.float32, scales),
            "code": (torch.int8, (shape.rows - shape.anchors) * shape.channels),
        }

    def encode(self, x: Tensor, key: int) -> Fields:
        shape = _Shape.of(self, len(x))
        missing = shape.rows * shape.channels - len(x)
        rows = (torch.nn.functional.pad(x, (0, missing)) if missing else x.contiguous()).view(
            -1, max(1, shape.channels)
        )
        written: dict[str, list[Tensor]] = {"scale": [], "anchor": [], "half": [], "code": []}
        for layer, part in enumerate(_layers(rows, shape.rows_a_layer)):
            for name, field in _write(part, self.group, self._bin(layer)).items():
                written[name].append(field.view(-1))
        return {
            name: torch.cat(written[name]) if count else torch.empty(0, dtype=dtype, device=x.device)
            for name, (dtype, count) in self.layout(len(x)).items()
        }

    def _bin(self, layer: int) -> float:
        return self.bins[layer * len(self.bins) // self.layers]

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        require(fields, self.layout(n))
        require_scales(fields["scale"], HUGE / _LARGEST_CODE, "scale")
        require_scales(fields["half"], HUGE / _LARGEST_CODE, "half")
        for name in ("anchor", "code"):
            if fields[name].numel() and int(fields[name].amin()) < -_LARGEST_CODE:
                raise PacketError(f"field {name!r} holds the reserved code {-_LARGEST_CODE - 1}")
        shape = _Shape.of(self, n)
        if not n:
            return torch.empty(0, device=fields["code"].device)
        x = torch.empty(shape.rows, shape.channels, device=fields["code"].device)
        scale, half = (fields[name].view(-1, shape.channels) for name in ("scale", "half"))
        anchor, code = (fields[name].view(-1, shape.channels) for name in ("anchor", "code"))
        for layer, part in enumerate(_layers(x, shape.rows_a_layer)):
            heads = num_blocks(len(part), self.group)
            _read(part, self.group, scale[layer], anchor[:heads], half[layer], code[: len(part) - heads])
            anchor, code = anchor[heads:], code[len(part) - heads :]
        return x.view(-1)[:n]


@dataclass(frozen=True)
class _Shape:
    """What a vector of some length consists of; rows count the short one as a whole."""

    channels: int
    rows: int
    rows_a_layer: int
    layers: int
    anchors: int

    @classmethod
    def of(cls, codec: AnchorDelta, n: int) -> _Shape:
        channels = min(codec.channels, n)
        rows = num_blocks(n, codec.channels)
        rows_a_layer = max(1, num_blocks(rows, codec.layers))
        layers = num_blocks(rows, rows_a_layer)
        last = rows - max(0, layers - 1) * rows_a_layer
        anchors = max(0, layers - 1) * num_blocks(rows_a_layer, codec.group) + num_blocks(last, codec.group)
        return cls(channels, rows, rows_a_layer, layers, anchors)


def _layers(rows: Tensor, step: int) -> Iterator[Tensor]:
    return (rows[start : start + step] for start in range(0, len(rows), step))


def _write(rows: Tensor, group: int, width: float) -> dict[str, Tensor]:
    """One layer's fields.  rows [t, C]"""
    heads = rows[::group]  # [a, C]
    divisor = torch.full_like(rows[0], _LARGEST_CODE)
    # The clamp keeps 127 s finite where the division rounds up; the largest code is the same.
    scale = heads.abs().amax(dim=0).clamp_(max=(1 - 2.0**-22) * HUGE).div_(divisor)  # [C]
    scale.masked_fill_(scale < TINY, 0.0)
    anchor = (heads / _or_inf(scale)).round_().clamp_(-_LARGEST_CODE, _LARGEST_CODE).to(torch.int8)
    halves = anchor.float().mul_(scale).mul_(0.5)  # throughout: a difference of two float32 may be beyond float32
    blocks = [pair for pair in _blocks(rows, halves, group) if pair[0].shape[1] > 1]  # not an anchor that is alone
    largest = torch.zeros_like(scale)
    for block, head in blocks:
        largest = torch.maximum(largest, _deltas(block, head).abs().flatten(0, 1).amax(dim=0))
    # Squares are summed as integers, so that the sum is the same in every order, on every device.
    unit, squares = largest / torch.full_like(largest, _FINE), torch.zeros_like(scale, dtype=torch.int64)
    for block, head in blocks:
        levels = (_deltas(block, head).abs() / _or_inf(unit)).round_().to(torch.int64)
        squares += levels.square_().flatten(0, 1).sum(dim=0)
    rms = unit.double() * (squares.double() / max(1, len(rows) - len(heads))).sqrt_()
    half = torch.maximum((rms * width).float(), largest.div(divisor))  # [C]
    half.clamp_(max=(1 - 2.0**-22) * HUGE / _LARGEST_CODE)
    half.masked_fill_(half < TINY, 0.0)
    code = torch.empty(len(rows) - len(heads), rows.shape[1], dtype=torch.int8, device=rows.device)
    at = 0
    for block, head in blocks:
        delta = _deltas(block, head).div_(_or_inf(half)).round_().clamp_(-_LARGEST_CODE, _LARGEST_CODE).flatten(0, 1)
        code[at : at + len(delta)] = delta
        at += len(delta)
    return {"scale": scale, "anchor": anchor, "half": half, "code": code}


def _read(rows: Tensor, group: int, scale: Tensor, anchor: Tensor, half: Tensor, code: Tensor) -> None:
    """Write one layer's numbers into `rows`."""
    halves, at = anchor.float().mul_(scale).mul_(0.5), 0  # [a, C]
    for block, head in _blocks(rows, halves, group):
        here = code[at : at + block[:, 1:].numel() // rows.shape[1]]
        block[:, :1] = head[:, None]
        block[:, 1:] = here.float().mul_(half).view_as(block[:, 1:]).add_(head[:, None])
        at += len(here)
    rows.mul_(2).clamp_(-HUGE, HUGE)


def _blocks(rows: Tensor, heads: Tensor, group: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Groups, as many as fit a cache at once, as [g, group, C], and their heads [g, C]; last one that is not whole."""
    whole, channels = len(rows) // group, rows.shape[1]
    step = max(1, _PIECE // (group * channels))
    for start in range(0, whole, step):
        stop = min(start + step, whole)
        yield rows[start * group : stop * group].view(stop - start, group, channels), heads[start:stop]
    if len(rows) % group:
        yield rows[whole * group :].unsqueeze(0), heads[whole:]


def _deltas(block: Tensor, head: Tensor) -> Tensor:
    """Half of what the others differ from their anchor by.  [g, group - 1, C]"""
    return block[:, 1:].mul(0.5).sub_(head[:, None])


def _or_inf(step: Tensor) -> Tensor:
    """To divide by: what has no step has the code 0."""
    return step.masked_fill(step == 0, torch.inf)


def _is_bin(width: object) -> bool:
    return is_number(width) and 2.0**-10 <= width <= 2.0**10


anchor_delta = AnchorDelta
