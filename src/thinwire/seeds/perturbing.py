"""A forward pass at w + eps z that never writes to w.

Every function of PyTorch that is given a tunable parameter gets perturbed values instead, made as it is called: weights
are not touched, so nothing has to be undone and nothing drifts. (Adding eps z, then -2 eps z, then eps z, as is usual,
leaves weights in bfloat16 off by 1.6 % of their spread after a hundred steps.) Of an embedding only the rows that are
looked up are made.

Making a tensor has a price of its own beside that of its elements, and fresh memory has another. So parameters are made
some at a time, in the order of the model, into memory that is used again, where it is certain that the function keeps
nothing of them; for all others, which may return views, each is made by itself.

Memory  that of inference, a buffer for the largest parameter (4 MiB at least) and, within a function, its parameters
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from thinwire.errors import ConfigError
from thinwire.seeds.directions import perturbed, perturbed_all, perturbed_rows
from thinwire.seeds.noise import Noise
from thinwire.seeds.tensors import Tunable

#: Parameters of up to so many elements are made together, once a pass, as long as they are no more in all.
_SMALL, _SMALL_IN_ALL = 1 << 13, 1 << 20

#: Elements of the parameters that are made at a time; a larger one is made alone.
_TOGETHER = 1 << 20

#: Functions whose results are memory of their own: what they were given may be written over afterwards.
_CONSUMERS = {
    F.linear, F.layer_norm, F.group_norm, F.conv1d, F.conv2d, F.conv3d, torch.addmm, torch.matmul,
    torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.__matmul__,
}  # fmt: skip

#: Questions about a tensor whose answers are those of the parameter itself.
_ABOUT = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "requires_grad", "ndim", "is_leaf", "layout", "grad", "is_cuda", "grad_fn")
} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_contiguous, Tensor.is_floating_point}


class Perturber:
    """Perturbs a model's parameters again and again; keeps the memory that they are made in."""

    def __init__(self, tunable: Tunable, noise: Noise) -> None:
        self.tunable, self.noise = tunable, noise
        self.names = {id(p): name for name, p in tunable.parameters.items()}
        self.small, large = _sorted_out(tunable)
        self.together = {name: part for part in _parts(large) for name, _ in part}
        self._memory: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    @torch.inference_mode(mode=False)  # a loss may be computed in it; what is kept must do for others as well
    def room(self, part: list[tuple[str, Tensor]]) -> list[Tensor]:
        """Memory for some parameters of one dtype and device: the same for all parts."""
        first, total = part[0][1], sum(p.numel() for _, p in part)
        held = self._memory.get((first.dtype, first.device))
        if held is None or held.numel() < total:
            held = self._memory[first.dtype, first.device] = first.new_empty(total)
        pieces = torch.split(held[:total], [p.numel() for _, p in part])
        return [piece.view(p.shape) for piece, (_, p) in zip(pieces, part, strict=True)]

    def sides(self, loss: Callable[[], Tensor | float], seed: int, eps: float) -> tuple[float, float]:
        """The losses at w + eps z and at w - eps z, with the same random draws (dropout) in both."""
        draws = _Draws(self.tunable)
        with self.at(seed, eps):
            plus = float(loss())
        draws.again()
        with self.at(seed, -eps):
            return plus, float(loss())

    @contextmanager
    def at(self, seed: int, eps: float) -> Iterator[None]:
        """Within the block the model computes with w + eps z(seed); without gradients.

        eps     exactly representable in float32
        raises  ConfigError at the end of the block if no parameter was seen: the model was compiled into something that
                hides them, or another model was called; and if a buffer was written to (running statistics)
        """
        mode = _Perturbing(self, seed, eps)
        with self.tunable.left_alone():
            with torch.no_grad(), mode:
                yield
            if not mode.seen:
                raise ConfigError(
                    "no tunable parameter was used while the loss was computed",
                    expected="a loss that calls the model's own modules, without torch.compile or TorchScript",
                    mend="compute the loss with the model that was given to tune(), uncompiled",
                )


class _Draws:
    """What torch's generators will draw next, to draw it again."""

    def __init__(self, tunable: Tunable) -> None:
        self._devices = {p.device for p in tunable.parameters.values() if p.device.type == "cuda"}
        self._cpu = torch.get_rng_state()
        self._cuda = {device: torch.cuda.get_rng_state(device) for device in self._devices}

    def again(self) -> None:
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)


def _sorted_out(tunable: Tunable) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
    """Small parameters and others, in order."""
    small: list[tuple[str, Tensor]] = []
    large: list[tuple[str, Tensor]] = []
    total = 0
    for name, p in tunable.pairs:
        if p.numel() <= _SMALL and total + p.numel() <= _SMALL_IN_ALL:
            small.append((name, p))
            total += p.numel()
        else:
            large.append((name, p))
    return small, large


def _parts(pairs: list[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    """Neighbours of one dtype and device, of `_TOGETHER` elements together."""
    part: list[tuple[str, Tensor]] = []
    for name, p in pairs:
        alike = not part or (part[0][1].dtype, part[0][1].device) == (p.dtype, p.device)
        if part and not (alike and sum(other.numel() for _, other in part) + p.numel() <= _TOGETHER):
            yield part
            part = []
        part.append((name, p))
    if part:
        yield part


class _Perturbing(TorchFunctionMode):
    """Puts perturbed tensors where parameters are handed over."""

    def __init__(self, perturber: Perturber, seed: int, eps: float) -> None:
        super().__init__()
        self._perturber, self._seed, self._eps = perturber, seed, eps
        self._names = perturber.names
        made = perturbed_all(perturber.small, seed, eps, perturber.noise)
        self._small = {name: tensor for (name, _), tensor in zip(perturber.small, made, strict=True)}
        self._room: Mapping[str, Tensor] = {}
        self._lent = False  # whether the call being made has something out of the room
        self.seen: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ABOUT:
            return func(*args, **kwargs)
        if func is F.embedding and _looked_up_in(*args, **kwargs) in self._names:
            return self._embedding(*args, **kwargs)
        swap, self._lent = self._lend if func in _CONSUMERS else self._make, False
        args = tuple(_swapped(each, swap) for each in args)
        return func(*args, **{name: _swapped(each, swap) for name, each in kwargs.items()})

    def _make(self, p: torch.nn.Parameter) -> Tensor:
        """A tensor that may be kept."""
        name = self._names.get(id(p))
        if name is None:
            return p
        self.seen.add(name)
        if name in self._small:
            return self._small[name]
        return perturbed(p.detach(), self._seed, name, self._eps, self._perturber.noise)

    def _lend(self, p: torch.nn.Parameter) -> Tensor:
        """A tensor for the time of a call."""
        name = self._names.get(id(p))
        if name is None or name in self._small:
            return self._make(p)
        if name not in self._room:
            if self._lent:  # the room is taken, by another argument
                return self._make(p)
            part = self._perturber.together[name]
            room = self._perturber.room(part)
            perturbed_all(part, self._seed, self._eps, self._perturber.noise, room)
            self._room = {each: tensor for (each, _), tensor in zip(part, room, strict=True)}
        self.seen.add(name)
        self._lent = True
        return self._room[name]

    def _embedding(
        self, input: Tensor, weight: torch.nn.Parameter, *args: Any, max_norm: float | None = None, **kwargs: Any
    ) -> Any:
        """Rows that are looked up, made once each; options that are left out here change gradients alone."""
        name = self._names[id(weight)]
        if name in self._small or args or max_norm is not None:  # max_norm writes to what is looked up in
            kwargs |= {} if max_norm is None else {"max_norm": max_norm}
            return F.embedding(input, self._make(weight), *args, **kwargs)
        self.seen.add(name)
        rows, place = torch.unique(input, return_inverse=True)
        made = perturbed_rows(weight.detach(), rows, self._seed, name, self._eps, self._perturber.noise)
        return F.embedding(place, made)


def _swapped(value: Any, swap: Callable[[torch.nn.Parameter], Tensor]) -> Any:
    """An argument with its parameters replaced, in whatever it holds."""
    if isinstance(value, torch.nn.Parameter):
        return swap(value)
    return tree_map_only(torch.nn.Parameter, swap, value) if isinstance(value, list | tuple | dict) else value


def _looked_up_in(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> int:
    return id(weight)
