"""Real tensors for the other benchmarks: what members of a group want to send while a small GPT learns.

    python benchmarks/tensors.py [DATA.txt] [--seed 0] [--size 0.9M]

A byte-level GPT (context 64, batch 8 a member, AdamW 2e-3) on two members, once with the gradients combined in every
step and once with DiLoCo, a round every 20. What member 0 hands to the codec at steps 20, 100 and 400 is kept: the
gradient of its batch, and anchor minus parameters after 20 local steps. One safetensors file each, a tensor a
parameter, in benchmarks/cache/; equal seeds and data give equal files on one machine. About a minute and a half on one
core, once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import thinwire
from thinwire.fragments import Fragments
from thinwire.links.base import Link
from thinwire.method import Method
from thinwire.payloads import Kind, Payload
from thinwire.train.corpus import REFERENCE, documents
from thinwire.train.text import TextOptions

CACHE = Path(__file__).with_name("cache")
STEPS = (20, 100, 400)
_EVERY = 20
_MEMBERS = 2


@dataclass(frozen=True)
class Sample:
    """A vector that a member wanted to send.

    kind    "gradient" or "delta"
    step    local steps made before
    vector  float32 [n], the parameters' pieces one after the other
    names   of the parameters
    shapes  of the parameters: what a codec may be fitted to
    """

    kind: str
    step: int
    vector: Tensor
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Recording:
    """A payload that keeps what it selects in some rounds, counted from 1."""

    payload: Payload
    wanted: Set[int]
    kept: list[Tensor] = field(default_factory=list, repr=False, compare=False)
    _round: Iterator[int] = field(default_factory=partial(count, 1), repr=False, compare=False)

    @property
    def kind(self) -> Kind:
        return self.payload.kind

    @property
    def fragments(self) -> int:
        return self.payload.fragments

    @property
    def in_steps(self) -> bool:
        return self.payload.in_steps

    def select(self, live: Tensor, anchor: Tensor) -> Tensor:
        vector = self.payload.select(live, anchor)
        if next(self._round) in self.wanted:
            self.kept.append(vector.clone())
        return vector


def load(data: str = REFERENCE, *, seed: int = 0, size: str = "0.9M") -> list[Sample]:
    """The samples, gradients first, by ascending step; made if they are not there yet."""
    folder = _folder(data, seed, size)
    if not (folder / "made").exists():
        make(data, seed=seed, size=size)
    return [_read(folder / f"{kind}-{step}.safetensors") for kind in ("gradient", "delta") for step in STEPS]


def make(data: str = REFERENCE, *, seed: int = 0, size: str = "0.9M") -> Path:
    """Train and save, whatever there is already; returns the folder."""
    folder = _folder(data, seed, size)
    folder.mkdir(parents=True, exist_ok=True)
    text = TextOptions(data=data, size=size, context=64, batch_size=8)
    for kind, method, every in (
        ("gradient", thinwire.every_step(), 1),
        ("delta", thinwire.diloco(every=_EVERY), _EVERY),
    ):
        vectors, named = _trained(text, seed, method, {step // every for step in STEPS})
        for step, vector in zip(STEPS, vectors, strict=True):
            pieces = vector.split([torch.Size(shape).numel() for shape in named.values()])
            tensors = {
                name: piece.reshape(shape).contiguous()
                for (name, shape), piece in zip(named.items(), pieces, strict=True)
            }
            about = {"kind": kind, "step": str(step), "order": json.dumps(list(named))}  # the file sorts its tensors
            save_file(tensors, folder / f"{kind}-{step}.safetensors", metadata=about)
    (folder / "made").touch()
    return folder


def _trained(
    text: TextOptions, seed: int, method: Method, wanted: Set[int]
) -> tuple[list[Tensor], dict[str, tuple[int, ...]]]:
    """What member 0 selects in the rounds `wanted`, and the shapes of the parameters in the order of those vectors."""
    task = text.build(seed=seed)

    def member(link: Link) -> tuple[list[Tensor], dict[str, tuple[int, ...]]]:
        torch.manual_seed(seed)
        model = task.model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        payload = Recording(method.payload, wanted)
        with thinwire.synchronize(model, optimizer, method.but(payload=payload), link, seed=seed):
            for step in range(STEPS[-1]):
                task.loss(model, task.batch(step, link.rank, len(link.members))).backward()
                optimizer.step()
                optimizer.zero_grad()
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        return payload.kept, {name: shapes[name] for name in Fragments(model, 1).names(0)}

    return thinwire.run(_MEMBERS, member)[0]


def _read(file: Path) -> Sample:
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
        names = tuple(json.loads(about["order"]))
        tensors = [opened.get_tensor(name) for name in names]
    vector = torch.cat([tensor.flatten() for tensor in tensors])
    return Sample(about["kind"], int(about["step"]), vector, names, tuple(tuple(tensor.shape) for tensor in tensors))


def _folder(data: str, seed: int, size: str) -> Path:
    digest = hashlib.sha256("\n".join(documents(data)).encode()).hexdigest()[:8]
    return CACHE / f"{size}-{digest}-{seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default=REFERENCE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", default="0.9M")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    print(make(args.data, seed=args.seed, size=args.size), f"in {time.perf_counter() - start:.0f} s")
    for sample in load(args.data, seed=args.seed, size=args.size):
        x = sample.vector
        kurtosis = float(((x - x.mean()) / x.std()).double().pow(4).mean())
        print(f"{sample.kind:8} step {sample.step:3}: {len(x)} elements, norm {x.norm():.3g}, kurtosis {kurtosis:.0f}")


if __name__ == "__main__":
    main()
