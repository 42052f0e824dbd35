"""Tunes all of a model while members tell each other a byte for every gradient: the loop's side of it.

    with thinwire.join() as link, thinwire.tune(model, thinwire.just_one_byte(), link) as tuner:
        for batch in loader:
            tuner.step(loss, batch, lr=1e-4)             # loss(batch) calls the model

No gradients, no optimizer, no memory beyond that of inference and one parameter. Whatever changes weights is a function
of closed rounds, which the log keeps: base and log are the model, to the bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from thinwire.errors import ConfigError, DivergedError
from thinwire.links.base import Link
from thinwire.seeds import noise
from thinwire.seeds.closed import digest_of
from thinwire.seeds.codes import float32
from thinwire.seeds.directions import apply_all_, project
from thinwire.seeds.log import Closed, Log
from thinwire.seeds.meetings import Meeting, OverLink
from thinwire.seeds.perturbing import Perturber
from thinwire.seeds.recipe import Recipe, seed_of
from thinwire.seeds.tensors import Tunable
from thinwire.version import __version__

_PATIENCE_ROUNDS = 20  # in a row in which nobody's losses were finite

Loss = Callable[..., Tensor | float]


@dataclass(frozen=True)
class Step:
    """What a call of `step` came to.

    loss     mean of the losses that this member computed; NaN if none was finite
    scalars  of this member, before they were written in a byte
    closed   the round, as all members have it
    """

    loss: float
    scalars: tuple[float, ...]
    closed: Closed


@dataclass(frozen=True)
class Spent:
    """Where a member's time went, in seconds of the tuner's clock.

    losses_s  perturbing and computing losses (or one loss and its gradient)
    wait_s    in the meeting
    apply_s   replaying everybody's scalars
    """

    losses_s: float = 0.0
    wait_s: float = 0.0
    apply_s: float = 0.0


def tune(model: nn.Module, recipe: Recipe, link: Link, *, backward: bool = False, compare_every: int = 64) -> Tuner:
    """Tune a model's trainable parameters together with the other members of a link. Use it as a context manager.

    link  of `join`; see `Tuner` for the rest. For members that come and go: Tuner(model, recipe, attend(...))
    """
    return Tuner(model, recipe, OverLink(link), backward=backward, compare_every=compare_every)


class Tuner:
    """This member's part in tuning a model; see the head of this file.

    model          any module whose loss leaves it as it was; freeze what is not to be tuned (all but adapters, say)
    recipe         of `just_one_byte`: the same on all members
    backward       compute this member's scalars from a gradient, <grad, z>, instead of from two losses: the same for
                   the others, without the error in eps; takes the memory of training. Each member may choose
    compare_every  rounds between comparisons of all members' weights; 0 for none
    clock          seconds that `spent` counts: the wall's, or a simulated link's
    raises         ConfigError on entering if members differ in model, weights (frozen ones too), recipe or version

    `rounds` counts those that took effect here, `log` has them all, `spent` says where time went.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, meeting: Meeting, *, backward: bool = False, compare_every: int = 64,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        if compare_every < 0:
            raise ConfigError(f"compare_every={compare_every}", expected="rounds, or 0 for never", mend="64")
        self.model, self.recipe = model, recipe
        self._tunable, self._meeting = Tunable(model), meeting
        self._backward, self._compare_every, self._clock = backward, compare_every, clock
        self._state = recipe.start()
        self._noise, self._eps = noise.parse(recipe.noise), float32(recipe.eps)
        self._perturber = Perturber(self._tunable, self._noise)
        self._silent = 0  # rounds in a row that nobody had a scalar for
        tunable = self._tunable
        self.log = Log.of(tunable.pairs, recipe, frozen=tunable.frozen, aliases=tunable.aliases)
        self.spent = Spent()

    # --- life ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Tuner:
        facts = {
            "version": __version__,
            "model": self._tunable.schema(),
            "recipe": repr(self.recipe),
            "base": self.log.base,
            "frozen": self.log.rest or "nothing",
        }
        own = {"rounds": str(self.rounds), "log": digest_of(self.log.rounds), "weights": self._tunable.digest()}
        for closed in self._meeting.meet({**facts, **own}):
            self._take_in(closed)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The meeting is the caller's to leave."""

    @property
    def rounds(self) -> int:
        """Rounds taken in."""
        return len(self.log.rounds)

    # --- a round -------------------------------------------------------------------------------------------------

    def step(self, loss: Loss, *batch: Any, lr: float) -> Step:
        """One round: this member's scalars, everybody's scalars, everybody's step.

        loss    called as loss(*batch), twice for each of the recipe's samples, with the model as it is at that moment.
                Random draws (dropout) are the same in both calls
        lr      learning rate; that of the lowest member counts for all
        returns  the round; where members come and go it may have closed without this one, whose scalars are then lost
        raises  PeerLost, DivergedError, StateMismatch; ConfigError if the loss does not use the model, or changes it
        """
        if not 0 <= lr < math.inf:
            raise ConfigError(f"lr={lr}", expected="a learning rate, finite and not negative", mend="1e-4, say")
        for missed in self._meeting.backlog():
            self._take_in(missed)
        number = self.rounds
        with self._timed("losses_s"):
            seeds = [seed_of(self.recipe.seed, number, self._meeting.member, s) for s in range(self.recipe.samples)]
            work = partial(loss, *batch)
            mean, scalars = self._along(work, seeds) if self._backward else self._between(work, seeds)
            codes = self.recipe.encode(scalars, self._state, number, self._meeting.member)
            self._meeting.local_step()
        with self._timed("wait_s"):
            closed = self._meeting.round(number, codes, lr)
        self._take_in(closed)
        if self._compare_every and self.rounds % self._compare_every == 0:
            self.compare()
        return Step(mean, tuple(scalars), closed)

    def compare(self) -> None:
        """Compare all members' weights now, and note their digest in the log."""
        digest = self._tunable.digest()
        self.log = self.log.checked(digest)
        with self._timed("wait_s"):
            self._meeting.compare(self.rounds, digest)

    def _between(self, loss: Loss, seeds: list[int]) -> tuple[float, list[float]]:
        """(L(w + eps z) - L(w - eps z)) / 2 eps for every direction."""
        eps, losses, scalars = self._eps, [], []
        for seed in seeds:
            plus, minus = self._perturber.sides(loss, seed, eps)
            losses += [plus, minus]
            scalars.append((plus - minus) / (2 * eps))
        finite = [each for each in losses if math.isfinite(each)]
        return sum(finite) / len(finite) if finite else math.nan, scalars

    def _along(self, loss: Loss, seeds: list[int]) -> tuple[float, list[float]]:
        """<grad L(w), z> for every direction, from one backward pass."""
        parameters = list(self._tunable.parameters.values())
        with torch.enable_grad():
            with self._tunable.left_alone():
                value = loss()
            if not isinstance(value, Tensor) or not value.requires_grad:
                raise ConfigError(
                    "the loss is no tensor with a gradient",
                    expected="a scalar tensor, for a member with backward=True",
                    mend="return the loss itself, not float(loss), and compute it without no_grad",
                )
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        total = torch.zeros(len(seeds), dtype=torch.float64)
        for name, gradient in zip(self._tunable.parameters, gradients, strict=True):
            if gradient is not None:
                total += project(gradient, name, seeds, self._noise).cpu()
        return float(value.detach()), total.tolist()

    def _take_in(self, closed: Closed) -> None:
        log = self.log.append(closed)  # raises before anything has changed
        with self._timed("apply_s"):
            recipe = self.recipe
            self._state, update = recipe.step(self._state, closed)
            apply_all_(self._tunable.pairs, [update], self._noise, rounding=recipe.rounding, key=recipe.seed)
        self.log = log
        self._silent = 0 if update.seeds else self._silent + 1
        if self._silent == _PATIENCE_ROUNDS:
            raise DivergedError(
                f"no member had a finite loss for {_PATIENCE_ROUNDS} rounds",
                expected="losses that are finite numbers, on some member",
                mend="lower the learning rate or eps; half-precision weights may need bf16 or fp32",
            )

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = self._clock()
        yield
        self.spent = replace(self.spent, **{what: getattr(self.spent, what) + self._clock() - start})

    # --- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The log, and a digest of the weights that it led to; save it beside the model's state."""
        data = torch.frombuffer(bytearray(self.log.to_bytes()), dtype=torch.uint8)
        return {"log": data, "weights": self._tunable.digest()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`, before the block; the model holds the weights of that moment.

        raises  ConfigError if the log is of another recipe or model, or the model holds other weights
        """
        log = Log.from_bytes(bytes(state["log"].numpy()))
        log.check(self._tunable.pairs, self.recipe)
        held = self._tunable.digest()
        for whose, found, due in (("tuned", held, state["weights"]), ("frozen", self.log.rest, log.rest)):
            if found != due:
                raise ConfigError(
                    f"the model's {whose} tensors have the digest {found or 'of nothing'}",
                    expected=f"digest {due or 'of nothing'}, of the model after the log's {len(log.rounds)} rounds",
                    mend="load the model's own state, saved at the same moment, before that of the tuner",
                )
        self.log, self._state = log, log.state
