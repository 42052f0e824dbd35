"""Small real parts for the tests of hooks: a bucket, and a round whose second stage follows from its first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from thinwire.codecs import Staged, int8
from thinwire.codecs.stages import Result, Stage, Stages, Tensors


class Bucket:
    """What DDP hands a hook: gradients of some parameters in one buffer, in an order of DDP's choice."""

    def __init__(self, index: int, last: bool, parameters: list[nn.Parameter], gradients: list[Tensor]) -> None:
        self._index, self._last, self._parameters = index, last, parameters
        self._buffer = torch.cat([gradient.reshape(-1) for gradient in gradients])
        pieces = self._buffer.split([gradient.numel() for gradient in gradients])
        self._gradients = [piece.view(g.shape) for piece, g in zip(pieces, gradients, strict=True)]

    def index(self) -> int:
        return self._index

    def is_last(self) -> bool:
        return self._last

    def buffer(self) -> Tensor:
        return self._buffer

    def parameters(self) -> list[nn.Parameter]:
        return self._parameters

    def gradients(self) -> list[Tensor]:
        return self._gradients


@dataclass(frozen=True)
class ScaleFirst(Staged):
    """Members agree on the mean of their largest entries, then send what is no larger, in 8 bits: two exchanges."""

    wants_feedback = False

    @property
    def spec(self) -> str:
        return "scalefirst"

    def run(self, x: Tensor, shared: Tensors, key: int) -> Stages:
        largest = x.abs().amax().view(1)
        scale = (yield Stage(largest)).combined
        combined, sent = yield Stage(x.clamp(-scale, scale), int8())
        seen = shared.get("rounds", torch.zeros(1)) + 1
        return Result(combined, sent, {"rounds": seen, "scale": scale})
