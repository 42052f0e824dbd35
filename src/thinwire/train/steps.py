"""What loops of fixed and of changing groups do alike: a local step, the files of a run, what a device is called."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from thinwire.config import Run
from thinwire.errors import ConfigError, ThinwireError
from thinwire.synchronizer import Synchronizer
from thinwire.train.layerwise import Optimizers
from thinwire.train.tasks import Batch, Task


def local_step(
    run: Run, task: Task, model: nn.Module, optimizers: Optimizers, sync: Synchronizer, batches: Iterable[Batch],
    *, parts: int, device: torch.device,
) -> Tensor:  # fmt: skip
    """One optimizer step on the mean over `parts` micro-batches, with whatever the method does around it.

    batches  `parts` of them, on the device; none at all is a step that changes nothing
    returns  [] the mean loss
    """
    run.optimizer.set_lr(optimizers, sync.step, steps=run.steps)
    total = torch.zeros((), device=device)
    for batch in batches:
        with precision(run, device):
            loss = task.loss(model, batch) / parts
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
        sync.count(batch.samples)
    if run.optimizer.clip_norm:
        sync.clip_grad_norm_(run.optimizer.clip_norm)
    for optimizer in optimizers:
        optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad()
    return total


def precision(run: Run, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The run's number format for forward and backward passes."""
    if run.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def load_optimizers(optimizers: Optimizers, saved: Sequence[Mapping[str, Any]]) -> None:
    """Load inner states; options stay the run's own: what was asked for now holds, not what held then."""
    for optimizer, state in zip(optimizers, saved, strict=True):
        options = [{key: group[key] for key in group if key != "params"} for group in optimizer.param_groups]
        optimizer.load_state_dict(dict(state))
        for group, given in zip(optimizer.param_groups, options, strict=True):
            group.update(given)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Where torch's generators stand."""
    random = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(device)
    return random


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """The inverse of `random_state`."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def consensus_tensors(model: nn.Module, sync: Any) -> dict[str, Tensor]:
    """The consensus model's state, copied to the CPU."""
    with sync.evaluating():
        return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def keep(folder: Path, name: str, write: Callable[[Path], None]) -> None:
    """A file of the run's folder, whole or not at all.

    raises  ThinwireError if it cannot be written
    """
    path, partial = folder / name, folder / f"{name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(partial)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise not_written(path, error) from error


def device_of(run: Run) -> torch.device:
    """The device the run names, as it is on this machine.

    raises  ConfigError if it is not there
    """
    if run.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device cuda: this machine has no GPU that torch can use",
            expected="a CUDA device, or another choice",
            mend="use --device cpu, or install a build of torch with CUDA",
        )
    name = "cuda" if run.device == "cuda" or (run.device == "auto" and torch.cuda.is_available()) else "cpu"
    if name == "cuda":
        torch.cuda.set_device(torch.cuda.current_device())
    return torch.device(name)


def not_written(path: Path, error: Exception) -> ThinwireError:
    """The error for a result that could not be kept."""
    return ThinwireError(
        f"{path} could not be written: {error}",
        expected="room on the disk, and permission to write there",
        mend=f"make room, then end the run from its last checkpoint: thinwire train --resume {path.parent}",
    )
