"""What this machine has, and what to do about what it lacks. Looks only; nothing outside the machine is contacted."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import psutil
import torch
import torch.distributed as dist

from thinwire.lab import Abilities, abilities

#: Extra of the installation -> modules it brings.
EXTRAS: dict[str, tuple[str, ...]] = {
    "accelerate": ("accelerate",),
    "decentralized": ("scipy", "cvxpy"),
    "entropy": ("constriction",),
    "images": ("sklearn",),
    "hf": ("transformers", "peft", "datasets", "tokenizers"),
    "lightning": ("lightning",),
}
_LEAST_FREE_BYTES = 2 << 30
_LIKELY_EPOCH_S = datetime(2025, 1, 1, tzinfo=UTC).timestamp()


@dataclass(frozen=True)
class Versions:
    """What is compared between two hosts."""

    thinwire: str
    torch: str
    python: str
    system: str

    @classmethod
    def here(cls) -> Versions:
        """This machine's."""
        return cls(installed("thinwire"), torch.__version__, platform.python_version(), platform.platform(terse=True))


@dataclass(frozen=True)
class Extra:
    """An optional part of the installation; `missing` are the modules it lacks."""

    name: str
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Devices:
    """What computes. GPUs by name."""

    processors: int
    usable_processors: int
    torch_threads: int
    cuda: tuple[str, ...]
    mps: bool


@dataclass(frozen=True)
class Report:
    """This machine.

    backends         of torch.distributed, that this torch was built with
    memory_bytes     in all, and what is free or can be freed
    utc              the wall clock; members need not agree on it, certificates and logs do
    advice           sentences; empty if nothing is in the way
    """

    versions: Versions
    extras: tuple[Extra, ...]
    devices: Devices
    backends: tuple[str, ...]
    memory_bytes: int
    free_memory_bytes: int
    lab: Abilities
    utc: str
    advice: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return asdict(self)


def examine() -> Report:
    """Look at this machine. Takes a moment: what the lab needs is found out by trying (as root only)."""
    memory = psutil.virtual_memory()
    extras, devices, backends, lab = _extras(), _devices(), _backends(), abilities()
    return Report(
        versions=Versions.here(),
        extras=extras,
        devices=devices,
        backends=backends,
        memory_bytes=memory.total,
        free_memory_bytes=memory.available,
        lab=lab,
        utc=datetime.now(UTC).isoformat(timespec="seconds"),
        advice=(
            *_advice_on_parts(extras, backends),
            *_advice_on_devices(devices, free_bytes=memory.available),
            *_advice_on_lab(lab),
            *_advice_on_clock(time.time()),
        ),
    )


def installed(package: str) -> str:
    """Its version, or "not installed" (run from a source tree)."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _extras() -> tuple[Extra, ...]:
    return tuple(
        Extra(name, tuple(module for module in modules if importlib.util.find_spec(module) is None))
        for name, modules in EXTRAS.items()
    )


def _devices() -> Devices:
    cuda = tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    usable = len(psutil.Process().cpu_affinity()) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    mps = torch.backends.mps.is_available()
    return Devices(os.cpu_count() or 1, usable or 1, torch.get_num_threads(), cuda, mps)


def _backends() -> tuple[str, ...]:
    if not dist.is_available():
        return ()
    built = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available(), "mpi": dist.is_mpi_available()}
    return tuple(name for name, there in built.items() if there)


def _advice_on_parts(extras: tuple[Extra, ...], backends: tuple[str, ...]) -> list[str]:
    advice = [
        f"for the extra {extra.name!r} ({', '.join(extra.missing)} missing): pip install 'thinwire[{extra.name}]'"
        for extra in extras
        if extra.missing
    ]
    if "gloo" not in backends:
        advice.append("this torch has no Gloo backend, so no link between machines: install a build that has it")
    return advice


def _advice_on_devices(devices: Devices, *, free_bytes: int) -> list[str]:
    advice = []
    if devices.torch_threads > devices.usable_processors:
        advice.append(
            f"torch uses {devices.torch_threads} threads on {devices.usable_processors} usable processors: "
            f"set OMP_NUM_THREADS={devices.usable_processors}"
        )
    if not devices.cuda and not devices.mps:
        advice.append("no GPU was found: everything runs on the processor, which is fine for a first look")
    if free_bytes < _LEAST_FREE_BYTES:
        advice.append(
            f"only {free_bytes / 2**30:.1f} GiB of memory are free: a model takes about 16 bytes a parameter to train "
            f"with Adam, so this is enough for {free_bytes / 16e6:.0f} M parameters at most"
        )
    return advice


def _advice_on_lab(lab: Abilities) -> list[str]:
    return [f"`thinwire lab` cannot run here: {lab.obstacle}; {lab.mend}"] if lab.obstacle else []


def _advice_on_clock(now_s: float) -> list[str]:
    early = now_s < _LIKELY_EPOCH_S
    return ["the clock is years behind: set it, or certificates will be refused"] if early else []
