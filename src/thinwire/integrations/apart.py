"""Every member a program of one process: what a framework may know of the group, and what members check beforehand."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from thinwire.errors import ConfigError
from thinwire.handshake import agree, tell
from thinwire.links.base import Link
from thinwire.links.joining import join as join_group
from thinwire.method import Method, Phases

#: What torchrun tells a process. Accelerate, and with it the Trainer, takes it as an order to average every step.
_LAUNCHERS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_FAMILIES = ("LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_")
_DEVICES = "CUDA_VISIBLE_DEVICES"


@contextmanager
def join(
    address: str | None = None,
    *,
    rank: int | None = None,
    world: int | None = None,
    backend: str = "gloo",
    timeout_s: float | None = None,
) -> Iterator[Link]:
    """thinwire.join, and within the block this member looks to frameworks like a program of one process.

    They ask two places whether there are others: the variables of torchrun, by which they would average every step,
    and torch.distributed, by which all but member 0 would leave their weights out of their checkpoints. Both are
    hidden; of several GPUs of its machine a member sees the one that torchrun means it to have. Build the framework's
    objects inside the block. Options and errors are those of thinwire.join.
    """
    with (
        join_group(address, rank=rank, world=world, backend=backend, timeout_s=timeout_s) as link,
        _hidden_group(),
        _hidden_launcher(),
    ):
        yield link


@contextmanager
def _hidden_group() -> Iterator[None]:
    group = dist.group.WORLD
    dist.group.WORLD = None
    try:
        yield
    finally:
        dist.group.WORLD = group


@contextmanager
def _hidden_launcher() -> Iterator[None]:
    before = dict(os.environ)
    hidden = [name for name in before if name in _LAUNCHERS or name.startswith(_FAMILIES)]
    shown = _own_device(before, torch.cuda.device_count())
    try:
        for name in hidden:
            del os.environ[name]
        os.environ.update(shown)
        yield
    finally:
        for name in shown:
            os.environ.pop(name, None)
        os.environ.update({name: before[name] for name in (*hidden, *shown) if name in before})


def _own_device(environment: Mapping[str, str], devices: int) -> dict[str, str]:
    """The one GPU of several that is this member's, where a launcher started several members on the machine."""
    local = int(environment.get("LOCAL_RANK", "-1"))
    if local < 0 or devices < 2 or int(environment.get("LOCAL_WORLD_SIZE", "1")) < 2:
        return {}
    visible = environment.get(_DEVICES) or ",".join(map(str, range(devices)))
    return {_DEVICES: visible.split(",")[local % devices]}


def check_apart(processes: int, framework: str) -> None:
    """Refuse a framework that sees a group: it would average every step, or save the weights of member 0 alone."""
    seen = max(processes, dist.get_world_size() if dist.is_initialized() else 1)
    if seen != 1:
        raise ConfigError(
            f"{framework} sees {seen} processes and would synchronise or save as one of them",
            expected="a framework that sees one process: between members there is thinwire alone",
            mend=f"build {framework}'s objects inside `with thinwire.integrations.join() as link:`",
        )


def check_length(link: Link, steps: float) -> None:
    """Refuse members that would not end together; all members call it.

    steps  optimizer steps of this member's training
    """
    agree(link, {"training.steps": f"{steps:g}"})


def check_folders(link: Link, folder: str | Path) -> None:
    """Refuse one folder for several members: each has weights, an optimizer and memories of its own. All call it."""
    mine = f"{socket.gethostname()}:{Path(folder).resolve()}"
    everyone = {rank: facts["folder"] for rank, facts in tell(link, {"folder": mine}).items()}
    shared = [rank for rank, theirs in everyone.items() if theirs == mine]
    if len(shared) > 1:
        raise ConfigError(
            f"members {' and '.join(map(str, shared))} write their checkpoints into one folder, {folder}",
            expected="a folder for every member: between rounds each has weights and an optimizer of its own",
            mend="put the member's number into the name, as in f'runs/member-{link.rank}'",
        )


def sends_gradients(method: Method | Phases) -> bool:
    """Whether a method combines gradients, at any time: it has to do so before they are clipped."""
    phases = (method.first, method.then) if isinstance(method, Phases) else (method,)
    return any(phase.payload.kind == "gradient" for phase in phases)


def samples_in(batch: Any) -> int:
    """Length of the first tensor of a batch, however it is nested: its samples."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 1
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return next((found for part in parts if (found := samples_in(part))), 0)


def missing(module: str, extra: str, error: ImportError) -> ConfigError:
    """What to say where a framework is not installed."""
    return ConfigError(
        f"{module} needs {error.name}, which cannot be imported: {error}",
        expected=f"thinwire installed with its extra {extra!r}",
        mend=f"pip install 'thinwire[{extra}]'",
    )
