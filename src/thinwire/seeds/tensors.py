"""The parameters that are tuned, by name: what directions are drawn for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from thinwire.errors import ConfigError
from thinwire.seeds.digests import digest
from thinwire.seeds.philox import tensor_id
from thinwire.sharding import is_dtensor

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Tunable:
    """A model's trainable parameters in the order of the model, tied ones once under their first name.

    Adapters are tuned alone by freezing the rest. Nothing is copied: `pairs` are the parameters' own memory.

    raises  ConfigError for parameters that no direction can be added to, parts in TorchScript, or two names with one
            number
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._every_name = dict(model.named_parameters(remove_duplicate=False))
        self._state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
        self._buffers = dict(model.named_buffers())
        _check_scripts(model)
        _check(self.parameters)

    @property
    def pairs(self) -> list[tuple[str, Tensor]]:
        """Names and the tensors behind them, to be read or written in place."""
        return [(name, p.detach()) for name, p in self.parameters.items()]

    @property
    def elements(self) -> int:
        """Numbers that are tuned."""
        return sum(p.numel() for p in self.parameters.values())

    def schema(self) -> str:
        """Digest of names, shapes and dtypes."""
        told = repr([(name, tuple(p.shape), str(p.dtype)) for name, p in self.parameters.items()])
        return hashlib.blake2b(told.encode(), digest_size=8).hexdigest()

    def digest(self) -> str:
        """Digest of the values, as logs have it."""
        return digest(self.pairs)

    @property
    def frozen(self) -> list[tuple[str, Tensor]]:
        """What else belongs to the model: parameters that are not tuned, and persistent buffers."""
        taken = {*self.aliases, *self.parameters}
        return [(name, value) for name, value in self._state.items() if name not in taken]

    @property
    def aliases(self) -> dict[str, str]:
        """Other names of tied parameters -> the name they are tuned under."""
        names = {id(p): name for name, p in self.parameters.items()}
        found = {name: names.get(id(p)) for name, p in self._every_name.items() if name not in self.parameters}
        return {name: tuned for name, tuned in found.items() if tuned is not None}

    @contextmanager
    def left_alone(self) -> Iterator[None]:
        """A loss is computed in the block.

        raises  ConfigError at its end if a buffer was written to: running statistics
        """
        before = {name: buffer._version for name, buffer in self._buffers.items()}
        yield
        for name, buffer in self._buffers.items():
            if buffer._version != before[name]:
                raise ConfigError(
                    f"buffer {name!r} changes as the loss is computed",
                    expected="a loss that leaves the model as it was: running statistics would differ between members",
                    mend="model.eval(), or eval() for the layers with running statistics",
                )


def _check_scripts(model: nn.Module) -> None:
    """A scripted part computes where nobody can put other values: it would move at random."""
    for name, part in model.named_modules():
        if isinstance(part, torch.jit.ScriptModule) and any(p.requires_grad for p in part.parameters()):
            raise ConfigError(
                f"{name or 'the model'!r} is TorchScript",
                expected="modules in Python: perturbed parameters are put where they are used as it runs",
                mend="give the module that was scripted or traced, or freeze this part",
            )


def _check(parameters: dict[str, nn.Parameter]) -> None:
    if not parameters:
        raise ConfigError(
            "the model has no trainable parameter",
            expected="at least one parameter with requires_grad",
            mend="unfreeze what should be tuned",
        )
    for name, p in parameters.items():
        if p.dtype not in _DTYPES or p.layout != torch.strided or is_dtensor(p):
            raise ConfigError(
                f"parameter {name!r} is {p.dtype}, {p.layout}{', in shards' if is_dtensor(p) else ''}",
                expected="dense float32, float16 or bfloat16 that this member holds whole",
                mend="freeze it, or convert the model: model.float()",
            )
    numbers: dict[int, str] = {}
    for name in parameters:
        other = numbers.setdefault(tensor_id(name), name)
        if other != name:
            raise ConfigError(
                f"parameters {other!r} and {name!r} have one number, {tensor_id(name)}",
                expected="names that are told apart by 32 bits of their hash: directions are drawn by it",
                mend=f"rename one of the modules that {name!r} goes through",
            )
