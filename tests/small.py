"""A small real model on small real work, for tests: a two-layer network learns a fixed teacher's labels.

Everything is a pure function of (seed, step, rank), so any split of the same work gives comparable runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import thinwire
from thinwire.links.base import Link
from thinwire.randomness import mix

WIDTH, CLASSES, BATCH = 12, 5, 8


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, CLASSES))


def batch(step: int, rank: int, size: int = BATCH) -> tuple[Tensor, Tensor]:
    """Inputs [size, WIDTH] and labels [size] of one member's step."""
    generator = torch.Generator().manual_seed(mix(7, step, rank) >> 1)
    x = torch.randn(size, WIDTH, generator=generator)
    teacher = torch.randn(WIDTH, CLASSES, generator=torch.Generator().manual_seed(99))
    return x, (x @ teacher).argmax(dim=1)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def local_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rank: int,
    numbers: range,
    before: Callable[[int], None] | None = None,
) -> None:
    """Plain training; `before` is called between backward and step."""
    for number in numbers:
        loss_of(model, *batch(number, rank)).backward()
        if before is not None:
            before(number)
        optimizer.step()
        optimizer.zero_grad()


@dataclass
class Trained:
    live: list[Tensor]
    consensus: list[Tensor]
    outcomes: list[Any]
    sent_bytes: int
    seconds: float


def train(
    link: Link,
    method: Any,
    steps: int,
    *,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
    build: Callable[[], nn.Module] = make_model,
    finish: bool = True,
) -> Trained:
    """Train for `steps` local steps under a method; what every member has at the end."""
    model = build()
    optimizer = make_optimizer(model)
    outcomes: list[Any] = []
    with thinwire.synchronize(model, optimizer, method, link, observer=outcomes.append) as sync:
        local_steps(model, optimizer, link.rank, range(steps))
        if finish:
            sync.finish()
        consensus = [vector.clone() for vector in sync.consensus()]
    live = [p.detach().clone() for p in model.parameters()]
    return Trained(live, consensus, outcomes, link.meter.total().sent_bytes, link.now())


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
