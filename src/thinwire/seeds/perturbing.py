"""A forward pass at w + eps z that never writes to w.

Every function of PyTorch that is given a tunable parameter gets `perturbed` values instead, made as it is called and
dropped as it returns: the memory of inference and of the largest parameter, and the weights are not touched, so that
nothing has to be undone and nothing drifts. (Adding eps z, then -2 eps z, then eps z, as is usual, leaves weights in
bfloat16 off by 1.6 % of their spread after a hundred steps.) Of an embedding only the rows that are looked up are made.
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

#: Parameters of up to so many elements are made together, once a pass: most functions cost more than they do.
_SMALL, _SMALL_IN_ALL = 1 << 13, 1 << 20

#: Questions about a tensor whose answers are those of the parameter itself.
_ABOUT = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "requires_grad", "ndim", "is_leaf", "layout", "grad", "is_cuda", "grad_fn")
} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_contiguous, Tensor.is_floating_point}


@contextmanager
def perturbing(tunable: Tunable, seed: int, eps: float, noise: Noise) -> Iterator[None]:
    """Within the block the model computes with w + eps z(seed); without gradients.

    eps     exactly representable in float32
    raises  ConfigError at the end of the block if no parameter was seen: the model was compiled into something that
            hides them, or another model was called; and if a buffer was written to (running statistics)
    """
    before = tunable.buffer_versions()
    mode = _Perturbing(tunable, seed, eps, noise)
    with torch.no_grad(), mode:
        yield
    if not mode.seen:
        raise ConfigError(
            "no tunable parameter was used while the loss was computed",
            expected="a loss that calls the model's own modules, without torch.compile or TorchScript around them",
            mend="compute the loss with the model that was given to tune(), uncompiled",
        )
    written = [name for name, version in tunable.buffer_versions().items() if before.get(name, version) != version]
    if written:
        raise ConfigError(
            f"buffer {written[0]!r} changes as the loss is computed",
            expected="a loss that leaves the model as it was: running statistics would differ from member to member",
            mend="model.eval(), or eval() for the layers with running statistics",
        )


class _Perturbing(TorchFunctionMode):
    """Puts perturbed tensors where parameters are handed over."""

    def __init__(self, tunable: Tunable, seed: int, eps: float, noise: Noise) -> None:
        super().__init__()
        self._seed, self._eps, self._noise = seed, eps, noise
        self._names = {id(p): name for name, p in tunable.parameters.items()}
        self._made = self._small(tunable)
        self.seen: set[str] = set()

    def _small(self, tunable: Tunable) -> Mapping[str, Tensor]:
        small, total = [], 0
        for name, p in tunable.pairs:
            if p.numel() <= _SMALL and total + p.numel() <= _SMALL_IN_ALL:
                small.append((name, p))
                total += p.numel()
        made = perturbed_all(small, self._seed, self._eps, self._noise)
        return dict(zip((name for name, _ in small), made, strict=True))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ABOUT:
            return func(*args, **kwargs)
        if func is F.embedding and _looked_up_in(*args, **kwargs) in self._names:
            return self._embedding(*args, **kwargs)
        args, kwargs = tree_map_only(torch.nn.Parameter, self._swap, (args, kwargs))
        return func(*args, **kwargs)

    def _swap(self, p: torch.nn.Parameter) -> Tensor:
        name = self._names.get(id(p))
        if name is None:
            return p
        self.seen.add(name)
        found = self._made.get(name)
        return perturbed(p.detach(), self._seed, name, self._eps, self._noise) if found is None else found

    def _embedding(
        self, input: Tensor, weight: Tensor, *args: Any, max_norm: float | None = None, **kwargs: Any
    ) -> Any:
        """Rows that are looked up, made once each; options that are left out here change gradients alone."""
        name = self._names[id(weight)]
        if name in self._made or args or max_norm is not None:  # max_norm writes to what is looked up in
            kwargs |= {} if max_norm is None else {"max_norm": max_norm}
            return F.embedding(input, self._swap(weight), *args, **kwargs)  # type: ignore[arg-type]
        self.seen.add(name)
        rows, place = torch.unique(input, return_inverse=True)
        return F.embedding(place, perturbed_rows(weight.detach(), rows, self._seed, name, self._eps, self._noise))


def _looked_up_in(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> int:
    return id(weight)
