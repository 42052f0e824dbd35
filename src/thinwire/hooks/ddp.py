"""DistributedDataParallel with gradients that cross the link as a codec writes them.

    model = DistributedDataParallel(net, ...)
    state, hook = thinwire.hooks.ddp(model, "feedback(topk(1/64) | int4)")
    model.register_comm_hook(state, hook)

DDP hands gradients out in buckets: one for all parameters at first, others once it has seen in which order gradients
become ready, and others again after a resume. What error feedback remembers and what a codec takes together must not
hang on that. So the hook has units of its own, whole parameters by name, dealt once in the order of a backward pass
and cut where DDP would cut; a unit's round begins when the last bucket that it needs is there. On all members that is
the same order, because DDP launches buckets by their index. Rounds run beside the backward pass; the hook of the last
bucket waits for them, so that an error is raised in backward() as what it is.

Result  the mean of all members' gradients, the same bits on all; float32 inside, rounded to each gradient's own dtype.
        A member whose values are not finite in a unit is left out of it, and gets the others' mean; if nobody's are,
        the unit's gradients are NaN on all members, so that a GradScaler skips the step on all.
State   that of the codec's memory, and a copy of the gradients of the units under way.
Differs from torch's PowerSGD hook, which issues collectives from callbacks of others: their order is a matter of
        timing, and Gloo pairs collectives by order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from thinwire.codecs import How
from thinwire.errors import ConfigError
from thinwire.hooks.session import Session, Unit, method_of
from thinwire.links.base import Link
from thinwire.links.joining import beside
from thinwire.links.meter import Meter
from thinwire.method import Method
from thinwire.rounds import UnderWay

_FIRST_BYTES = 1 << 20  # the first bucket is small, so that the first round begins early; as DDP's


class Bucket(Protocol):
    """What DDP hands out: torch.distributed.GradBucket."""

    def index(self) -> int: ...
    def is_last(self) -> bool: ...
    def buffer(self) -> Tensor: ...
    def parameters(self) -> list[Tensor]: ...
    def gradients(self) -> list[Tensor]: ...


#: What register_comm_hook takes: called with the state and a bucket, returns a future of the bucket's new content.
Hook = Callable[["Gradients", Bucket], "Future[Tensor]"]


def ddp(
    model: DistributedDataParallel, codec: str | How = "int8", *, seed: int = 0, timeout_s: float | None = None
) -> tuple[Gradients, Hook]:
    """State and hook for `model.register_comm_hook(*ddp(model, ...))`; all members call it at the same place.

    model      the DDP module itself; its process group's members take part, over a Gloo group of the hook's own
    codec      an expression, a codec, a staged round, or feedback around one; what needs feedback is given the classic
    seed       of shared randomness (stochastic rounding); the same on all members
    timeout_s  one override for every time limit; by default they follow from what was measured
    raises     ConfigError if members differ in model, codec, seed or version
    """
    if not isinstance(model, DistributedDataParallel):
        raise ConfigError(
            f"hooks.ddp was given a {type(model).__name__}",
            expected="the DistributedDataParallel module that the hook is registered with",
            mend="model = DistributedDataParallel(model) first",
        )
    method = method_of(codec)
    named = trained(model.module, model.parameters_to_ignore)
    state = Gradients(
        beside(model.process_group, timeout_s), method, named, seed=seed, most_bytes=model.bucket_bytes_cap
    )
    return state, on_bucket


def on_bucket(state: Gradients, bucket: Bucket) -> Future[Tensor]:
    """The hook."""
    return state.take(bucket)


on_bucket.__annotations__ = {}  # DDP compares them with types, and ours are text


class Gradients:
    """The state of the hook: units, their rounds, and buckets that wait. `meter` has every byte."""

    def __init__(
        self, link: Link, method: Method, named: Mapping[str, nn.Parameter], *, seed: int = 0,
        most_bytes: int = 25 << 20,
    ) -> None:  # fmt: skip
        self._named = dict(named)
        self._names = {id(parameter): name for name, parameter in named.items()}
        self._units = deal(named, most_bytes)
        device = next(iter(named.values())).device
        self._session = Session(link, method, self._described(), seed=seed, device=device)
        self._devices: list[int | str | torch.device] = [device] if device.type == "cuda" else []
        self._clear()

    @property
    def meter(self) -> Meter:
        """Bytes of messages, by purpose."""
        return self._session.meter

    def _described(self) -> list[Unit]:
        return [
            Unit(f"unit {number} ({names[0]} ...)", tuple(tuple(self._named[name].shape) for name in names))
            for number, names in enumerate(self._units)
        ]

    # --- a backward pass -----------------------------------------------------------------------------------------

    def take(self, bucket: Bucket) -> Future[Tensor]:
        """A bucket of this pass; returns a future of its buffer, holding the members' mean."""
        if bucket.index() == 0:
            self._clear()
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            self._here[self._name_of(parameter, gradient)] = gradient
        future: Future[Tensor] = Future(devices=self._devices)
        self._waiting.append((future, bucket.buffer()))
        self._begin_what_is_here()
        if bucket.is_last():
            self._finish()
        return future

    def _clear(self) -> None:
        self._here: dict[str, Tensor] = {}
        self._waiting: list[tuple[Future[Tensor], Tensor]] = []
        self._under_way: list[UnderWay] = []
        self._ahead = list(range(len(self._units)))

    def _name_of(self, parameter: Tensor, gradient: Tensor) -> str:
        name = self._names.get(id(parameter))
        if name is None:
            raise ConfigError(
                f"a gradient of a parameter of shape {tuple(parameter.shape)} that the model did not have, or did not "
                "train, when the hook was made",
                expected="the same trainable parameters for as long as the hook lives",
                mend="wrap the model and make the hook anew after freezing or adding parameters",
            )
        if gradient.layout != torch.strided:
            raise ConfigError(
                f"the gradient of parameter {name!r} is sparse",
                expected="dense gradients",
                mend="nn.Embedding(..., sparse=False)",
            )
        return name

    def _begin_what_is_here(self) -> None:
        for unit in [unit for unit in self._ahead if all(name in self._here for name in self._units[unit])]:
            self._ahead.remove(unit)
            pieces = [self._here[name].detach().reshape(-1) for name in self._units[unit]]
            self._under_way.append(self._session.begin(unit, torch.cat([piece.float() for piece in pieces])))

    @torch.no_grad()
    def _finish(self) -> None:
        if self._ahead:
            missing = next(name for name in self._units[self._ahead[0]] if name not in self._here)
            raise ConfigError(
                f"DDP has no gradient of parameter {missing!r}",
                expected="the same trainable parameters for as long as the hook lives",
                mend="wrap the model and make the hook anew after freezing parameters",
            )
        for under_way in self._under_way:
            gradients = [self._here[name] for name in self._units[under_way.fragment]]
            update = self._session.finish(under_way)
            if update is None:
                for gradient in gradients:
                    gradient.fill_(torch.nan)
                continue
            pieces = update.split_with_sizes([gradient.numel() for gradient in gradients])
            for gradient, piece in zip(gradients, pieces, strict=True):
                gradient.copy_(piece.view_as(gradient))
        for future, buffer in self._waiting:
            future.set_result(buffer)
        self._clear()

    # --- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What the codec's memory holds, by the names of parameters; call it between steps.

        Save it beside the model's and the optimizer's, on every member: the three together resume to the bit.
        """
        shapes = {name: list(parameter.shape) for name, parameter in self._named.items()}
        return {"units": [list(names) for names in self._units], "shapes": shapes, **self._session.state_dict()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`, whatever DDP's buckets are now; all members call it, and are compared.

        A state of another member, or of a group of another size, is taken without its error memories.
        """
        shapes = {name: list(parameter.shape) for name, parameter in self._named.items()}
        if saved["shapes"] != shapes:
            odd = sorted(name for name in {*shapes, *saved["shapes"]} if shapes.get(name) != saved["shapes"].get(name))
            raise ConfigError(
                f"the saved state is of another model: parameter {odd[0]!r} has shape {saved['shapes'].get(odd[0])}",
                expected=f"shape {shapes.get(odd[0])}",
                mend="resume with the model of the checkpoint, or leave the state out to start anew",
            )
        self._units = tuple(tuple(names) for names in saved["units"])
        self._session.enter(self._described())
        self._session.load_state_dict(saved)
        self._clear()


def trained(module: nn.Module, ignored: Iterable[str] = ()) -> dict[str, nn.Parameter]:
    """Parameters that have gradients, by name; tied ones once.

    raises  ConfigError if there is none, or one that float32 vectors would not do justice
    """
    without = set(ignored)
    named = {name: p for name, p in module.named_parameters() if p.requires_grad and name not in without}
    if not named:
        raise ConfigError(
            "the model has no trainable parameter",
            expected="at least one parameter with requires_grad",
            mend="unfreeze what should be trained before the hook is made",
        )
    for name, parameter in named.items():
        if parameter.dtype == torch.float64 or parameter.is_complex():
            raise ConfigError(
                f"parameter {name!r} is {parameter.dtype}",
                expected="float32 or narrower: rounds work on float32 vectors and would lose the rest",
                mend="model.float() before DistributedDataParallel(model)",
            )
    return named


def deal(named: Mapping[str, nn.Parameter], most_bytes: int) -> tuple[tuple[str, ...], ...]:
    """Parameters in the order in which a backward pass comes to them, cut like DDP's buckets: the first one is small.

    most_bytes  of gradients, after which a unit is closed
    """
    units: list[list[str]] = [[]]
    limit, size = min(_FIRST_BYTES, most_bytes), 0
    for name, parameter in reversed(list(named.items())):
        units[-1].append(name)
        size += parameter.numel() * parameter.element_size()
        if size >= limit:
            units.append([])
            limit, size = most_bytes, 0
    return tuple(tuple(names) for names in units if names)
