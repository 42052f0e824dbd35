"""A loop with Hugging Face Accelerate.

    accelerator = Accelerator()
    model, optimizer = accelerator.prepare(model, optimizer)
    with synchronize(accelerator, model, optimizer, diloco(), link) as sync:
        ...                                             # the loop as it was

`prepare`, `backward`, `accumulate`, `clip_grad_norm_`, mixed precision and schedulers stay as they are. Data is not
sharded by `prepare`, which sees one process: each member reads its own part. `accelerator.register_for_checkpointing
(sync)` puts what the method remembers into `save_state` and `load_state`, in a folder of the member's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from thinwire.inner import Optimizers
from thinwire.integrations.apart import check_apart
from thinwire.links.base import Link
from thinwire.method import Method, Phases
from thinwire.rounds import Outcome
from thinwire.synchronizer import Synchronizer
from thinwire.synchronizer import synchronize as synchronize_plainly

if TYPE_CHECKING:
    from accelerate import Accelerator


@contextmanager
def synchronize(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizers,
    method: Method | Phases,
    link: Link,
    *,
    seed: int = 0,
    observer: Callable[[Outcome], None] | None = None,
) -> Iterator[Synchronizer]:
    """thinwire.synchronize around a loop of Accelerate.

    model, optimizer  as `accelerator.prepare` returned them; of several optimizers a list
    raises            ConfigError if Accelerate sees several processes, and what thinwire.synchronize raises
    """
    check_apart(accelerator.num_processes, "Accelerate")
    around = synchronizer_of(accelerator, model, optimizer, method, link, seed=seed, observer=observer)
    with around as sync, combining_before_clipping(accelerator, sync):
        yield sync


def synchronizer_of(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizers,
    method: Method | Phases,
    link: Link,
    *,
    seed: int,
    observer: Callable[[Outcome], None] | None,
) -> Synchronizer:
    """The Synchronizer of what Accelerate has prepared: for what is inside its wrappers."""
    given = (optimizer,) if isinstance(optimizer, torch.optim.Optimizer) else optimizer
    return synchronize_plainly(
        accelerator.unwrap_model(model, keep_torch_compile=False), [_inner(each) for each in given], method, link,
        seed=seed, scaler=accelerator.scaler, observer=observer,
    )  # fmt: skip


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside Accelerate's wrappers: it steps, and is hooked, once an accumulated batch."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer


@contextmanager
def combining_before_clipping(accelerator: Any, sync: Synchronizer) -> Iterator[None]:
    """Within the block gradients are combined before `accelerator` clips them: all that clips unscales first."""
    plain = accelerator.unscale_gradients

    def unscale_gradients(optimizer: Any = None) -> None:
        plain(optimizer)
        if accelerator.sync_gradients:  # else the batch is still being accumulated
            sync.combine_gradients()

    accelerator.unscale_gradients = unscale_gradients
    try:
        yield
    finally:
        del accelerator.unscale_gradients
