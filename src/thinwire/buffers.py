"""Buffers of a model, such as batch-norm statistics: what rule they follow, and how they travel."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from thinwire.collectives import gather_packets
from thinwire.links.base import Handle, Link
from thinwire.packet import Header, Layout, Packet

#: Buffers of the members that combine: rank -> (float32 or float64 [k], int64 [c]).
BufferRows = dict[int, tuple[Tensor, Tensor]]


class Buffers:
    """A model's persistent buffers, such as the statistics of batch normalisation.

    The rule: with every round of fragment 0, floating-point buffers become the mean over the members that take part
    and integer buffers (counters) the maximum. Always at full precision, whatever the codec. In a graph that is over
    the member's neighbours, and the mean is weighted as that of the parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._kept = model, frozenset(model.state_dict(keep_vars=True))

    def __bool__(self) -> bool:
        return bool(self._floats or self._counts)

    def persistent(self) -> list[Tensor]:
        """All of them, as they are now: a module may have put another tensor in a buffer's place."""
        return [buffer for name, buffer in self._model.named_buffers() if name in self._kept and buffer.numel()]

    @property
    def _floats(self) -> list[Tensor]:
        return [buffer for buffer in self.persistent() if buffer.is_floating_point()]

    @property
    def _counts(self) -> list[Tensor]:
        return [b for b in self.persistent() if not b.is_floating_point() and not b.is_complex()]

    def gather(self) -> tuple[Tensor, Tensor]:
        """Copies: float32 [k] (float64 if one of them is) and int64 [c], on the CPU."""
        floats = self._floats
        wide = torch.float64 if any(buffer.dtype == torch.float64 for buffer in floats) else torch.float32
        return _joined(floats, wide), _joined(self._counts, torch.int64)

    @torch.no_grad()
    def scatter(self, floats: Tensor, counts: Tensor) -> None:
        """Write them back."""
        for buffers, values in ((self._floats, floats), (self._counts, counts)):
            for buffer, piece in zip(buffers, values.split_with_sizes([b.numel() for b in buffers]), strict=True):
                buffer.copy_(piece.view_as(buffer))

    def exchange(
        self, link: Link, ranks: tuple[int, ...], header: Header, *, to: tuple[int, ...] | None = None
    ) -> Handle[BufferRows]:
        """Tell them to `ranks` (or to `to`) and hear those of `ranks`, beside the compute."""
        floats, counts = self.gather()
        packet = Packet("buffers", 0, {"floats": floats, "counts": counts}, header)
        layout: Layout = {"floats": (floats.dtype, floats.numel()), "counts": (torch.int64, counts.numel())}
        channel, what = link.open("buffers"), f"buffers of round {header.round}"

        def job() -> BufferRows:
            found = gather_packets(channel, link.rank, ranks, packet, layout, what, to=to)
            # Copies: fields are views of one buffer, and torch.save refuses views of unlike types.
            return {
                rank: (each.fields["floats"].clone(), each.fields["counts"].clone()) for rank, each in found.items()
            }

        return link.spawn(job, what)


def average(rows: BufferRows, weights: Mapping[int, float]) -> tuple[Tensor, Tensor]:
    """Weighted means, and maxima, over the members that took part, in ascending order of rank."""
    ranks = sorted(weights)
    # In float64 a sum of equal float32 values is exact: a buffer that is a constant stays what it is.
    floats = torch.stack([rows[rank][0].double() * weights[rank] for rank in ranks])
    counts = torch.stack([rows[rank][1] for rank in ranks])
    mean = floats.sum(dim=0) / sum(weights[rank] for rank in ranks)
    return mean, counts.amax(dim=0) if counts.numel() else counts[0]


def _joined(buffers: list[Tensor], dtype: torch.dtype) -> Tensor:
    if not buffers:
        return torch.zeros(0, dtype=dtype)
    return torch.cat([b.detach().reshape(-1).to("cpu", dtype) for b in buffers])
