"""Named parameters to flat float32 vectors and back: what codecs, aggregators and outer steps see of a model.

Trainable parameters only; tied ones once; frozen ones not at all. A fragment is a list of whole parameters. Layers
(parameters whose names share a prefix ending in a number, "blocks.3.") stay together: layer l goes to fragment
l mod F, the strided pattern of arXiv:2501.18512; what belongs to no layer goes where least is.

Inside an island the vectors of a member hold its shards of the parameters alone (sharding.py). Which parameters make a
fragment follows from their whole shapes, so that all members of an island mean the same by a fragment's number.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from thinwire.errors import ConfigError
from thinwire.sharding import Share, dealt, is_dtensor, like, local, resharder, share_of

_LAYER = re.compile(r"^(.*?\.?\d+)\.")


class Fragments:
    """A model's trainable parameters in `count` flat vectors; with a `share`, what one member of an island has of them.

    share  of parameters that all members of the island hold; whoever writes to these calls it with all the others
    """

    def __init__(self, model: nn.Module, count: int, share: Share | None = None) -> None:
        self._reshard, self._share = resharder(model), share
        self._reshard()
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        _check(named, count)
        self.count = count
        self._parts = _deal(named, count)
        self._dtypes = {p.dtype for _, p in named}
        self.device = named[0][1].device

    @property
    def sizes(self) -> tuple[int, ...]:
        """Elements of each fragment."""
        return tuple(sum(self.lengths(fragment)) for fragment in range(self.count))

    def lengths(self, fragment: int) -> tuple[int, ...]:
        """Elements held of each of a fragment's parameters, in the order of its vector."""
        return tuple(self._held(p).numel() for _, p in self._parts[fragment])

    @property
    def is_shared(self) -> bool:
        """Whether writing means to gather the shares of other members of the island."""
        return any(self._is_cut(p) for part in self._parts for _, p in part)

    def shapes(self, fragment: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of what is held of a fragment's parameters, in the order of its vector."""
        return tuple(tuple(held.shape) for _, p in self._parts[fragment] if (held := self._held(p)).numel())

    def names(self, fragment: int) -> tuple[str, ...]:
        """Parameters of a fragment, in the order of its vector."""
        return tuple(name for name, _ in self._parts[fragment])

    def gather(self, fragment: int) -> Tensor:
        """A copy of the parameters.  float32 [n]"""
        return self._flat([self._held(p) for _, p in self._parts[fragment]])

    @torch.no_grad()
    def scatter(self, fragment: int, vector: Tensor) -> None:
        """Write a vector into the parameters.  float32 [n], rounded to each parameter's own dtype"""
        self._reshard()
        for (_, p), piece in zip(self._parts[fragment], self._whole(fragment, vector), strict=True):
            held = local(p)
            held.copy_(piece.view_as(held))

    def gather_gradients(self, fragment: int) -> Tensor:
        """A copy of the gradients; absent ones are zero.  float32 [n]"""
        for name, p in self._parts[fragment]:
            _check_dense(name, p.grad)
        return self._flat(
            [
                torch.zeros_like(self._held(p)) if p.grad is None else self._held(p, p.grad)
                for _, p in self._parts[fragment]
            ]
        )

    @torch.no_grad()
    def scatter_gradients(self, fragment: int, vector: Tensor) -> None:
        """Write a vector into the gradients; one that was absent stays so if the vector is zero there."""
        for (_, p), piece in zip(self._parts[fragment], self._whole(fragment, vector), strict=True):
            if p.grad is not None:
                local(p.grad).copy_(piece.view_as(local(p)))
            elif bool(piece.any()):
                p.grad = like(p, piece.view_as(local(p)).to(p.dtype, copy=True))

    def rounded(self, fragment: int, vector: Tensor) -> Tensor:
        """The vector as the parameters would hold it: a delta must not contain their rounding.  float32 [n]"""
        if self._dtypes == {torch.float32}:
            return vector
        pieces = zip(self._parts[fragment], self._pieces(fragment, vector), strict=True)
        return torch.cat([piece.to(p.dtype).float() for (_, p), piece in pieces])

    def matrices(self, fragment: int, vector: Tensor) -> dict[str, Tensor]:
        """Views of a vector in the shapes of what is held of the parameters, by name."""
        pieces = zip(self._parts[fragment], self._pieces(fragment, vector), strict=True)
        return {name: piece.view(self._held(p).shape) for (name, p), piece in pieces}

    def spread(self, fragment: int, values: Sequence[float]) -> Tensor:
        """One value a parameter, for each of its elements.  float32 [n]"""
        sizes = zip(self.lengths(fragment), values, strict=True)
        return torch.cat([torch.full((size,), value, device=self.device) for size, value in sizes])

    def schema(self) -> str:
        """Digest of names, shapes, dtypes and their order: equal on members whose vectors mean the same."""
        told = [[(name, tuple(p.shape), str(p.dtype)) for name, p in part] for part in self._parts]
        return hashlib.blake2b(repr(told).encode(), digest_size=8).hexdigest()

    def _flat(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([tensor.reshape(-1).to(self.device, torch.float32) for tensor in tensors])

    def _pieces(self, fragment: int, vector: Tensor) -> tuple[Tensor, ...]:
        return vector.split_with_sizes(self.lengths(fragment))

    def _held(self, p: nn.Parameter, of: Tensor | None = None) -> Tensor:
        """What the vectors hold of a parameter, or of its gradient: a view."""
        held = local(p if of is None else of).detach()
        return share_of(held, self._share.rank, self._share.of) if self._share and self._is_cut(p) else held

    def _is_cut(self, p: nn.Parameter) -> bool:
        return self._share is not None and self._share.of > 1 and not is_dtensor(p)

    def _whole(self, fragment: int, vector: Tensor) -> list[Tensor]:
        """What a vector says of each parameter as this process holds it: shares are gathered in the island."""
        pieces, parts = list(self._pieces(fragment, vector)), self._parts[fragment]
        cut = [index for index, (_, p) in enumerate(parts) if self._is_cut(p)]
        if self._share is None or not cut:
            return pieces
        of = self._share.of
        sizes = [_shares(parts[index][1], of) for index in cut]  # by parameter, then by rank
        told = torch.cat([pieces[index] for index in cut])
        arrived = self._share.gather(told, [sum(each[rank] for each in sizes) for rank in range(of)])
        split = [row.split_with_sizes([each[rank] for each in sizes]) for rank, row in enumerate(arrived)]
        for place, index in enumerate(cut):
            pieces[index] = torch.cat([split[rank][place] for rank in range(of)])
        return pieces


def digest(*tensors: Tensor) -> bytes:
    """64 bits of the raw bytes: what members compare to know that they hold the same. Of a DTensor, its own shard."""
    state = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        state.update(local(tensor).detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return state.digest()


def _shares(p: nn.Parameter, of: int) -> list[int]:
    """Elements of each member's share."""
    rows = len(p) if p.ndim else 1
    return [(end - begin) * (p.numel() // max(1, rows)) for begin, end in dealt(rows, of)]


def _check_dense(name: str, gradient: Tensor | None) -> None:
    if gradient is not None and gradient.layout != torch.strided:
        raise ConfigError(
            f"the gradient of parameter {name!r} is sparse",
            expected="dense gradients, for a method that sends gradients",
            mend="nn.Embedding(..., sparse=False), or a method that sends deltas (diloco, local_sgd)",
        )


def _check(named: list[tuple[str, nn.Parameter]], count: int) -> None:
    if not named:
        raise ConfigError(
            "the model has no trainable parameter",
            expected="at least one parameter with requires_grad",
            mend="unfreeze what should be trained before synchronize()",
        )
    wide = [name for name, p in named if p.dtype == torch.float64 or p.is_complex()]
    if wide:
        raise ConfigError(
            f"parameter {wide[0]!r} is {dict(named)[wide[0]].dtype}",
            expected="float32 or narrower: rounds work on float32 vectors and would lose the rest",
            mend="model.float() before synchronize()",
        )
    if count > len(named):
        raise ConfigError(
            f"{count} fragments of a model with {len(named)} parameters",
            expected="at least one parameter for each fragment",
            mend=f"fragments={len(named)} or fewer",
        )


def _deal(named: list[tuple[str, nn.Parameter]], count: int) -> list[list[tuple[str, nn.Parameter]]]:
    """Layers by their number, the rest to the smallest; parameters one by one where layers are too few."""
    layers: dict[str, list[int]] = {}
    for index, (name, _) in enumerate(named):
        found = _LAYER.match(name)
        layers.setdefault(found.group(1) if found else f"={name}", []).append(index)
    numbered = [indices for key, indices in layers.items() if not key.startswith("=")]
    others = [indices for key, indices in layers.items() if key.startswith("=")]
    if len(numbered) < count:
        numbered, others = [], [[index] for index in range(len(named))]
    parts: list[list[int]] = [[] for _ in range(count)]
    for place, indices in enumerate(numbered):
        parts[place % count] += indices

    def size(indices: list[int]) -> int:
        return sum(named[index][1].numel() for index in indices)

    for indices in sorted(others, key=size, reverse=True):
        min(parts, key=size).extend(indices)
    return [[named[index] for index in sorted(part)] for part in parts]
