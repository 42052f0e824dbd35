"""FSDP2 with gradients that cross the link as a codec writes them.

    for block in net.blocks:
        fully_shard(block)
    fully_shard(net)
    gradients = thinwire.hooks.fsdp(net, "int8")                  # the reduce-scatter itself
    gradients = thinwire.hooks.fsdp(net, "int8", across=group)    # or what follows it, between islands

The first takes the place of the reduce-scatter of every module that is sharded. The second leaves that to PyTorch, over
the fast links within an island, and combines the shards of equal rank across islands: each island shards on its own
(a one-dimensional mesh of its members), and `group` holds the members of equal rank, one of each island.

Result  as of plain FSDP2: the mean (or the sum, where FSDP asks for one) of all members' gradients; float32 inside,
        rounded to the reduce dtype. A member whose values are not finite is left out; if nobody's are, it is NaN.
State   error feedback keeps what it owes of all that it sends: float32 of the whole gradient of every module for the
        reduce-scatter, of the own shard for `across`. Codecs alone keep nothing.
Size    one exchange of shards if the codec and its memory need no more (scatter.py); rounds of several stages, and
        memories of what all members hold, take the whole all-reduce and keep the own shard of its result.
Differs from FSDP's own collectives: a round is carried out at once, on GPUs as well, and not hidden behind compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from thinwire.codecs import How, Staged
from thinwire.errors import ConfigError
from thinwire.hooks.scatter import scatters
from thinwire.hooks.session import Session, Unit, method_of
from thinwire.links.base import Link
from thinwire.links.joining import beside
from thinwire.links.meter import Meter
from thinwire.method import Method


def fsdp(
    model: nn.Module, codec: str | How = "int8", *, across: dist.ProcessGroup | None = None, seed: int = 0,
    timeout_s: float | None = None,
) -> Shards:  # fmt: skip
    """Write the gradients of all sharded modules of a model with a codec; all members call it at the same place.

    model      what fully_shard() was called with, after it
    codec      an expression, a codec, a staged round, or feedback around one; what needs feedback is given the classic
    across     members that hold the same shard, one of each island; None takes the reduce-scatter's place instead
    seed       of shared randomness; the same on all members
    timeout_s  one override for every time limit; by default they follow from what was measured
    returns    the state of the hooks, to be saved and resumed
    raises     ConfigError for a model without sharded modules, or if members differ in it, in codec, seed or version
    """
    method = method_of(codec)
    bare = method.bare_codec
    if isinstance(bare, Staged) and bare.needs_shapes:
        raise ConfigError(
            f"hooks.fsdp with {bare.spec}: what FSDP sends are slices of parameters, in which it finds no matrix",
            expected="a codec of vectors: int8, topk, dct, tagc",
            mend=f"use one of these, or {bare.spec} with hooks.ddp, which has whole parameters",
        )
    from torch.distributed.fsdp import FSDPModule  # here, since it takes a while to load

    setter = "set_custom_reduce_scatter" if across is None else "set_all_reduce_hook"
    if setter not in dir(FSDPModule):
        raise ConfigError(
            f"PyTorch {torch.__version__} has no FSDPModule.{setter}",
            expected="a version of PyTorch whose FSDP2 lets its collectives be replaced",
            mend="pip install -U torch",
        )
    modules = {name or "the root": module for name, module in model.named_modules() if isinstance(module, FSDPModule)}
    if not modules:
        raise ConfigError(
            f"no module of this {type(model).__name__} is sharded",
            expected="a model after fully_shard(model)",
            mend="call fully_shard on its blocks and on the model itself first",
        )
    link = beside(_shard_group(model) if across is None else across, timeout_s)
    device = next(model.parameters()).device
    shards = Shards(link, method, tuple(modules), _told(model), seed=seed, device=device)
    for unit, module in enumerate(modules.values()):
        if across is None:
            module.set_custom_reduce_scatter(_ReduceScatter(partial(shards.reduce_scatter, unit)))  # type: ignore[arg-type]
        else:
            module.set_all_reduce_hook(partial(shards.all_reduce, unit))
    return shards


class Shards:
    """The state of the hooks of one model: a module's vector is a unit. `meter` has every byte."""

    def __init__(
        self, link: Link, method: Method, modules: Sequence[str], told: str, *, seed: int = 0,
        device: torch.device | None = None,
    ) -> None:  # fmt: skip
        self._modules = tuple(modules)
        self._sizes: dict[int, int] = {}
        self._members, self._place = len(link.members), link.members.index(link.rank)
        self._scatters = scatters(method.codec)
        # Shapes are not the codec's business here: a vector holds a slice of each parameter, row by row.
        units = [Unit(f"module {name}", ()) for name in modules]
        self._session = Session(
            link, method, units, seed=seed, device=device or torch.device("cpu"), facts={"model": told}
        )

    @property
    def meter(self) -> Meter:
        """Bytes of messages, by purpose."""
        return self._session.meter

    @torch.no_grad()
    def reduce_scatter(self, unit: int, output: Tensor, x: Tensor, op: object) -> None:
        """Write the mean, or the sum, of this member's row into `output` [m].  x: [members * m]"""
        factor = self._factor(op)
        if x.numel() != self._members * output.numel():
            raise ConfigError(
                f"module {self._modules[unit]} is sharded in {x.numel() // max(1, output.numel())} parts",
                expected=f"{self._members}, as the first sharded parameter of the model",
                mend="call fully_shard with one mesh for all modules, and hooks.fsdp for each part of the model if not",
            )
        self._check_size(unit, x.numel())
        vector = x.reshape(-1).float()
        if self._scatters:
            shard = self._session.scatter(unit, vector)
        else:
            whole = self._session.finish(self._session.begin(unit, vector.clone()))
            shard = None if whole is None else whole.view(self._members, -1)[self._place]
        if shard is None:
            output.fill_(torch.nan)
        else:
            output.copy_((shard if factor == 1 else shard * factor).view_as(output))

    @torch.no_grad()
    def all_reduce(self, unit: int, output: Tensor) -> None:
        """Replace a shard [m] by its mean over the members that hold it."""
        self._check_size(unit, output.numel())
        update = self._session.finish(self._session.begin(unit, output.detach().reshape(-1).float().clone()))
        if update is None:
            output.fill_(torch.nan)
        else:
            output.copy_(update.view_as(output))

    def _factor(self, op: object) -> int:
        if op == dist.ReduceOp.AVG:
            return 1
        if op == dist.ReduceOp.SUM:
            return self._members
        raise ConfigError(
            f"FSDP asks for the reduction {op}",
            expected="the mean or the sum of gradients",
            mend="leave set_gradient_divide_factor out, and scale the loss",
        )

    def _check_size(self, unit: int, n: int) -> None:
        known = self._sizes.setdefault(unit, n)
        if n == known:
            return
        carried = self._session.states[unit].carried
        if carried.own or carried.shared or carried.stages or carried.dropped:
            raise ConfigError(
                f"module {self._modules[unit]} now has {n} gradient elements to send, and had {known}",
                expected="gradients of the same parameters in every step, for a codec that remembers what it owes them",
                mend="model.set_reduce_scatter_unused_params(True), or a codec without memory such as int8",
            )
        self._sizes[unit] = n

    def state_dict(self) -> dict[str, Any]:
        """What the codec's memory holds of each module; call it between steps, on every member."""
        sizes = {str(unit): n for unit, n in self._sizes.items()}
        return {"modules": list(self._modules), "sizes": sizes, **self._session.state_dict()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; all members call it, and are compared.

        A state of another member, or of a group of another size, is taken without its error memories.
        """
        if tuple(saved["modules"]) != self._modules:
            raise ConfigError(
                f"the saved state is of a model sharded at {', '.join(saved['modules'])}",
                expected=f"one sharded at {', '.join(self._modules)}",
                mend="call fully_shard on the same modules as before, or leave the state out to start anew",
            )
        self._session.load_state_dict(saved)
        self._sizes = {int(unit): n for unit, n in saved["sizes"].items()}


@dataclass(frozen=True)
class _ReduceScatter:
    """FSDP's protocol of a custom reduce-scatter."""

    reduce: Callable[[Tensor, Tensor, object], None]

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: object, async_op: bool = False
    ) -> None:
        self.reduce(output_tensor, input_tensor, op)


def _shard_group(model: nn.Module) -> dist.ProcessGroup:
    """The members that a model is sharded over, as its parameters say."""
    from torch.distributed.tensor import DTensor

    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            for dimension, placement in enumerate(parameter.placements):
                if placement.is_shard():
                    return parameter.device_mesh.get_group(dimension)
    raise ConfigError(
        "no parameter of this model is sharded",
        expected="a model after fully_shard(model)",
        mend="call fully_shard on its blocks and on the model itself first",
    )


def _told(model: nn.Module) -> str:
    return repr([(name, tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()])
