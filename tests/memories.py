"""Rounds of a memory around a codec without links: what the collectives make of one, in a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from thinwire.codecs import Codec, Feedback
from thinwire.codecs.feedback import Place
from thinwire.codecs.stages import Exchanged, Tensors
from thinwire.randomness import mix
from written import again


@dataclass
class Members:
    """What all members hold; each round is combined by the mean, with the weights that the scheme asks for."""

    memory: Feedback
    count: int
    own: list[Tensors] = field(default_factory=list)
    shared: Tensors = field(default_factory=dict)
    stages: Tensors = field(default_factory=dict)
    rounds: int = 0
    sent: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.own = self.own or [{} for _ in range(self.count)]

    def place(self, rank: int) -> Place:
        return Place(rank, tuple(range(self.count)))

    def round(self, x: Sequence[Tensor | None]) -> Tensor:
        """The update; a member whose vector is None is left out."""
        present = [rank for rank in range(self.count) if x[rank] is not None]
        own, rows, weights, stages = list(self.own), [], [], self.stages
        for rank in present:
            target, held = self.memory.prepare(x[rank], self.own[rank], self.shared, self.place(rank))
            sent, stages = self._through(target, mix(self.rounds, rank))
            own[rank] = self.memory.commit(target, held, sent)
            weight = self.memory.weight(self.place(rank))
            rows.append(sent)
            weights.append(1.0 if weight is None else weight)
        total = sum(weights)
        combined = torch.stack([row * (weight / total) for row, weight in zip(rows, weights, strict=True)]).sum(dim=0)
        if self.memory.weight(self.place(0)) is None:
            combined = torch.stack(rows).sum(dim=0) / len(rows)
        share = self.memory.share(tuple(present), tuple(range(self.count)))
        update, self.shared = self.memory.receive(combined, self.shared, share)
        self.own, self.stages, self.rounds, self.sent = own, stages, self.rounds + 1, rows
        return update

    def _through(self, target: Tensor, key: int) -> tuple[Tensor, Tensors]:
        """What others read of a target, and what stages remember."""
        codec = self.memory.codec
        if isinstance(codec, Codec):
            return again(codec, target, key), self.stages
        run = codec.run(target, self.stages, key)
        stage = next(run)
        while True:
            sent = again(stage.codec, stage.vector, key)
            try:
                stage = run.send(Exchanged(sent, sent))
            except StopIteration as end:
                return end.value.sent, end.value.shared


def vectors(count: int, n: int, number: int = 0) -> list[Tensor]:
    """One for each member."""
    return list(torch.randn(count, n, generator=torch.Generator().manual_seed(1000 * number + n)))
