"""The parameters that are tuned, by name: what directions are drawn for."""

from __future__ import annotations

import hashlib

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

    raises  ConfigError for parameters that no direction can be added to, or two names with one number
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._every_name = dict(model.named_parameters(remove_duplicate=False))
        self._state = model.state_dict()
        self._buffers = dict(model.named_buffers())
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

    def buffer_versions(self) -> dict[str, int]:
        """A count for each buffer that goes up when it is written to."""
        return {name: buffer._version for name, buffer in self._buffers.items()}


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
