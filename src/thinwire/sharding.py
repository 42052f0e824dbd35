"""What of a model a process holds: shards of DTensors (FSDP2), shares of what every member of an island holds.

    sharded      a DTensor's own shard: rows [b, e) of the parameter under fully_shard
    replicated   the share that torch.chunk would deal of its rows, so that a member sends as much as of a shard

torch.distributed.tensor takes a while to load, and nobody can hand over a DTensor without having loaded it: hence the
looks into sys.modules.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Share:
    """A member's share of what all members of its island hold.

    gather  float32 [any], the most elements that another member's has -> everybody's, by rank; all members call it
    """

    rank: int
    of: int
    gather: Callable[[Tensor, Sequence[int]], list[Tensor]]


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: a DTensor's shard, which writes go through to, or all of it."""
    shard: Tensor = tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
    return shard


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is spread over processes."""
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def like(tensor: Tensor, values: Tensor) -> Tensor:
    """Values as another tensor is held: a DTensor of the same shards, or as they are."""
    if not is_dtensor(tensor):
        return values
    from torch.distributed.tensor import DTensor

    spread: DTensor = tensor  # type: ignore[assignment]
    return DTensor.from_local(
        values, spread.device_mesh, spread.placements, run_check=False, shape=spread.shape, stride=spread.stride()
    )


def dealt(rows: int, of: int) -> list[tuple[int, int]]:
    """[begin, end) of each member's rows, as torch.chunk and fully_shard deal them; the last may have fewer, or none.

    >>> dealt(5, 2), dealt(2, 3)
    ([(0, 3), (3, 5)], [(0, 1), (1, 2), (2, 2)])
    """
    size = -(-rows // of)
    return [(min(rows, size * rank), min(rows, size * (rank + 1))) for rank in range(of)]


def share_of(held: Tensor, rank: int, of: int) -> Tensor:
    """A member's rows of a tensor that all members hold: a view.  [rows, ...]"""
    rows = held if held.ndim else held.view(1)
    begin, end = dealt(len(rows), of)[rank]
    return rows[begin:end]


def layout(model: nn.Module) -> str:
    """Which shards of its parameters this process holds, in words that differ where the shards do; "" if it has all."""
    found, shapes = {}, []
    for parameter in model.parameters():
        if is_dtensor(parameter):
            shapes.append(tuple(local(parameter).shape))
            mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
            place = tuple(at + 1 for at in mesh.get_coordinate() or ())
            placements = ", ".join(map(repr, parameter.placements))  # type: ignore[attr-defined]
            found[f"part {_by(place)} of {_by(tuple(mesh.shape))} by {placements}"] = True
    told = hashlib.blake2b(repr(shapes).encode(), digest_size=4).hexdigest()
    return "; ".join([*found, f"shapes {told}"]) if found else ""


def _by(numbers: tuple[int, ...]) -> str:
    return " x ".join(map(str, numbers))


def resharder(model: nn.Module) -> Callable[[], None]:
    """What gives parameters of FSDP2 back to their shards, where a forward pass without a backward has left them whole.

    Until then shards that are written to are not what the next forward pass reads.
    """
    loaded = sys.modules.get("torch.distributed.fsdp")
    engines = [] if loaded is None else [m for m in model.modules() if isinstance(m, loaded.FSDPModule)]

    def reshard() -> None:
        for engine in engines:
            engine.reshard()

    return reshard


@torch.no_grad()
def clip_grad_norm_(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """torch's, of gradients that may be spread over processes; the norm is the whole model's, on every one of them."""
    with_gradient = [p for p in parameters if p.grad is not None]
    spread: dict[Any, list[nn.Parameter]] = {}
    for p in with_gradient:
        spread.setdefault(p.device_mesh if is_dtensor(p) else None, []).append(p)  # type: ignore[attr-defined]
    norms = []
    for alike in spread.values():
        norm: Any = torch.nn.utils.get_total_norm([p.grad for p in alike if p.grad is not None])
        norms.append(norm.full_tensor() if is_dtensor(norm) else norm)
    total = norms[0] if len(norms) == 1 else torch.nn.utils.get_total_norm(norms)
    torch.nn.utils.clip_grads_with_norm_(with_gradient, max_norm, total)
    return total


def inner_state(optimizer: torch.optim.Optimizer) -> Any:
    """What an optimizer keeps by parameter: of ZeroRedundancyOptimizer, what this process keeps of it."""
    loaded = sys.modules.get("torch.distributed.optim")
    if loaded is not None and isinstance(optimizer, loaded.ZeroRedundancyOptimizer):
        return optimizer.optim.state
    return optimizer.state
