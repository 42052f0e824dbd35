"""Rounds of error-feedback schemes without links, and codecs for float64, which rounds over links have not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from thinwire.codecs import Codec, Feedback, Staged, Traits
from thinwire.codecs.feedback import Place
from thinwire.codecs.stages import Exchanged, Tensors
from thinwire.packet import Fields, Layout
from thinwire.randomness import mix


@dataclass
class Members:
    """What members of a group remember; `round` takes them through one."""

    scheme: Feedback
    count: int
    own: list[Tensors] = field(default_factory=list)
    shared: Tensors = field(default_factory=dict)
    stages: Tensors = field(default_factory=dict)
    rounds: int = 0
    sent: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.own = [{} for _ in range(self.count)]

    def round(self, given: Sequence[Tensor], present: Sequence[int] | None = None) -> Tensor:
        """The update of a round; those not in `present` give nothing and remember what they did."""
        ranks, key = tuple(range(self.count)), mix(3, self.rounds)
        present = ranks if present is None else tuple(present)
        rows, after, self.sent = [], self.stages, []
        for rank in present:
            target, held = self.scheme.prepare(given[rank], self.own[rank], self.shared, Place(rank, ranks))
            sent, after = self._through(target, mix(key, rank))
            self.own[rank] = self.scheme.commit(target, held, sent)
            self.sent.append(sent)
            rows.append(sent)
        self.stages, self.rounds = after, self.rounds + 1
        share = self.scheme.share(present, ranks)
        update, self.shared = self.scheme.receive(torch.stack(rows).mean(dim=0), self.shared, share)
        return update

    def _through(self, target: Tensor, key: int) -> tuple[Tensor, Tensors]:
        codec = self.scheme.codec
        if isinstance(codec, Codec):
            return codec.decode(codec.encode(target, key), len(target), key), self.stages
        assert isinstance(codec, Staged)
        run = codec.run(target, self.stages, key)
        stage = next(run)
        while True:
            sent = stage.codec.decode(stage.codec.encode(stage.vector, key), len(target), key)
            try:
                stage = run.send(Exchanged(sent, sent))
            except StopIteration as end:
                return end.value.sent, end.value.shared


@dataclass(frozen=True)
class Largest(Codec):
    """topk for float64 vectors, without a wire."""

    share: float
    values = "value"

    @property
    def spec(self) -> str:
        return f"largest({self.share!r})"

    @property
    def traits(self) -> Traits:
        return Traits(wants_feedback=True, reencodes=False)

    def layout(self, n: int) -> Layout:
        raise NotImplementedError

    def encode(self, x: Tensor, key: int) -> Fields:
        index = x.abs().topk(max(1, round(self.share * len(x)))).indices
        return {"value": x[index], "index": index}

    def decode(self, fields: Fields, n: int, key: int) -> Tensor:
        return fields["value"].new_zeros(n).index_copy_(0, fields["index"], fields["value"])

    def contraction(self, n: int) -> float | None:
        return self.share


@dataclass(frozen=True)
class Chosen(Largest):
    """Random entries in the place of the largest, scaled to be right in the mean: omega = 1 / share - 1."""

    @property
    def spec(self) -> str:
        return f"chosen({self.share!r})"

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=True)

    def encode(self, x: Tensor, key: int) -> Fields:
        index = torch.randperm(len(x), generator=torch.Generator().manual_seed(key >> 1))
        index = index[: max(1, round(self.share * len(x)))]
        return {"value": x[index] / self.share, "index": index}

    def contraction(self, n: int) -> float | None:
        return None

    def variance(self, n: int) -> float | None:
        return 1 / self.share - 1
