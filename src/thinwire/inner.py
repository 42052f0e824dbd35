"""A member's inner optimizers: one or several around one model, whose turns, rates and memories a round asks for.

A local step is made once each has stepped, in whatever order. With a GradScaler members look at overflown gradients
together (`Synchronizer` decides; here is what it needs of the scaler).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from thinwire.errors import ConfigError
from thinwire.method import Method, Phases
from thinwire.sharding import inner_state

_log = logging.getLogger("thinwire")

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


class Inner:
    """See above.

    raises  ConfigError for optimizers that do not fit the model, each other or the method
    """

    def __init__(
        self, model: nn.Module, optimizers: Optimizers, plan: Method | Phases, scaler: torch.amp.GradScaler | None
    ) -> None:
        self.all = (optimizers,) if isinstance(optimizers, torch.optim.Optimizer) else tuple(optimizers)
        self.scaler = scaler
        self._model = model
        self._stepped: list[torch.optim.Optimizer] = []  # of this iteration
        _check_parameters(model, self.all)
        for each in self.all:
            _check_momentum(each, plan)

    # --- turns ---------------------------------------------------------------------------------------------------

    def count(self, optimizer: torch.optim.Optimizer) -> bool:
        """One has stepped. Returns whether a local step is made: all have."""
        self._stepped.append(optimizer)
        if len(self._stepped) < len(self.all):
            return False
        self._stepped = []
        return True

    @property
    def stepped(self) -> int:
        """How many have stepped in this local step."""
        return len(self._stepped)

    def check_turn(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Raises ConfigError if it has stepped already in local step `step`."""
        if any(each is optimizer for each in self._stepped):
            raise self._uneven(f"{type(optimizer).__name__} is to step twice", step)

    def check_between_steps(self, step: int) -> None:
        """Raises ConfigError in the middle of local step `step`."""
        if self._stepped:
            raise self._uneven("training ended, or its state was asked for, in the middle of a local step", step)

    def _uneven(self, what: str, step: int) -> ConfigError:
        stepped = [any(each is optimizer for each in self._stepped) for optimizer in self.all]
        waiting = [type(each).__name__ for each, done in zip(self.all, stepped, strict=True) if not done]
        return ConfigError(
            f"local step {step}: {what}, and {', '.join(waiting)} has not stepped",
            expected="one step of every optimizer in a local step, in any order",
            mend="step all that were handed over in every iteration; one with a learning rate of 0 changes nothing",
        )

    # --- what they hold ------------------------------------------------------------------------------------------

    @property
    def lr(self) -> float:
        """Learning rate of the first one's first group."""
        return float(self.all[0].param_groups[0]["lr"])

    def rates(self, names: Iterable[str]) -> list[float]:
        """Learning rates of parameters; 1 for those that no optimizer has."""
        groups = [group for optimizer in self.all for group in optimizer.param_groups]
        rate_of = {id(p): float(group["lr"]) for group in groups for p in group["params"]}
        named = dict(self._model.named_parameters())
        return [rate_of.get(id(named[name]), 1.0) for name in names]

    def forget(self, names: Iterable[str]) -> None:
        """Begin anew with some parameters."""
        named = dict(self._model.named_parameters())
        for name in names:
            for optimizer in self.all:
                inner_state(optimizer).pop(named[name], None)

    def state(self) -> list[dict[str, Any]]:
        """What each remembers, with its class; hyper-parameters are each member's own."""
        return [{"class": type(each).__name__, "state": each.state_dict()["state"]} for each in self.all]

    def take(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Remember what another member's do, where they are of the same class."""
        for each, given in zip(self.all, states, strict=True):
            if given["class"] == type(each).__name__:
                each.load_state_dict({**each.state_dict(), "state": given["state"]})

    def classes(self) -> str:
        """Their names."""
        return ", ".join(type(each).__name__ for each in self.all)

    def settings(self) -> str:
        """Classes and hyper-parameters, group by group."""
        return "; ".join(map(_settings, self.all))

    # --- scaled gradients ----------------------------------------------------------------------------------------

    @property
    def scales(self) -> bool:
        """Whether gradients are scaled."""
        return self.scaler is not None and self.scaler.is_enabled()

    def unscale(self) -> None:
        """Take the scale out of all gradients, if the loop has not done it to clip them: once a step is enough."""
        if self.scaler is None:
            return
        for optimizer in self.all:
            try:
                self.scaler.unscale_(optimizer)
            except RuntimeError as error:
                if "already been called" not in str(error):
                    raise

    def plain_step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """The scaler's own step, which skips the optimizer's where gradients have overflown."""
        assert self.scaler is not None
        return type(self.scaler).step(self.scaler, optimizer, *args, **kwargs)


def _settings(optimizer: torch.optim.Optimizer) -> str:
    groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    return f"{type(optimizer).__name__} {groups}"


def _check_parameters(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    if not optimizers:
        raise ConfigError(
            "no optimizer was handed over",
            expected="an optimizer, or several over disjoint parameters",
            mend="synchronize(model, [muon, adamw], method, link)",
        )
    ours = {id(p) for p in model.parameters()}
    held = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    strangers = [p for p in held if id(p) not in ours]
    if strangers:
        raise ConfigError(
            f"the optimizer holds {len(strangers)} parameter(s) that the model does not have, "
            f"the first of shape {tuple(strangers[0].shape)}",
            expected="an optimizer over parameters of the model that is synchronised",
            mend="put all trained modules into one nn.ModuleList and synchronise that",
        )
    sets = [{id(p) for group in optimizer.param_groups for p in group["params"]} for optimizer in optimizers]
    twice = sum(map(len, sets)) - len(set().union(*sets))
    if twice:
        names = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
        raise ConfigError(
            f"{twice} parameter(s) of more than one of {names}",
            expected="optimizers over disjoint parameters",
            mend="give each parameter to one of them",
        )


def _check_momentum(optimizer: torch.optim.Optimizer, plan: Method | Phases) -> None:
    """Feedback with a momentum of its own feeds an optimizer that has none, or it would be applied twice."""
    name = type(optimizer).__name__
    for method in (plan.first, plan.then) if isinstance(plan, Phases) else (plan,):
        feedback = method.feedback
        if method.payload.kind != "gradient" or feedback is None or not feedback.accelerates:
            continue
        if any(group.get("betas") for group in optimizer.param_groups):
            _log.warning("%s has moments of its own behind %s, which is made for plain SGD", name, feedback.spec)
        if any(group.get("momentum") for group in optimizer.param_groups):
            raise ConfigError(
                f"{name} with momentum behind {feedback.spec}, which has a momentum of its own",
                expected="one momentum: where gradients wait to be sent, it is theirs",
                mend="set momentum=0 in the optimizer, or use feedback(...)",
            )
