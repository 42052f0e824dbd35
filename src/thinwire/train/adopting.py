"""From a universal checkpoint into a run of other members, another method, codec or optimizer.

    anchor  the record's value, to the bit; the parameters are the anchor
    outer   kept where the outer step is the same but for its numbers
    inner   kept where the optimizer has the same name; learning rates and other settings are the run's own
    data    the first batch of the group with no sample that is behind the checkpoint: ceil(position / batch of all)

What is not kept is told. A member remembers nothing else: codecs, feedback and pacers begin as at a run's start.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thinwire.config import Run
from thinwire.errors import ConfigError
from thinwire.fragments import Fragments
from thinwire.method import Method, Phases
from thinwire.pace import Pace, Pacing
from thinwire.rounds import FragmentState
from thinwire.seeds.recipe import Recipe
from thinwire.snapshot import pack_pacing, pack_state
from thinwire.train.history import History
from thinwire.train.layerwise import Optimizers
from thinwire.train.universal import Record, Universal, roles

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def plan_from(found: Universal, path: Path, run: Run) -> Method | Phases:
    """The run's method, if the run can go on from there.

    raises  ConfigError if it has no steps left, or is by seeds and scalars
    """
    plan = run.method.build()
    if isinstance(plan, Recipe):
        raise ConfigError(
            f"--from {path} with the method {run.method.name}",
            expected="a method of six answers: a log of seeds and scalars begins at a base, not in the middle of a run",
            mend="export the weights (thinwire checkpoint convert --to weights) and begin there",
        )
    if found.step >= run.steps:
        raise ConfigError(
            f"--from {path}: it is of step {found.step}, and the run has {run.steps}",
            expected="steps left to make",
            mend=f"--steps {2 * found.step}, counted from the first step of the earlier run",
        )
    return plan


def load_parameters(model: nn.Module, found: Universal, path: Path) -> None:
    """Write the records' values into a model, rounded to its own dtypes.

    raises  ConfigError if a parameter is missing, superfluous or of another shape
    """
    own, values = roles(model), model.state_dict()
    for name, role in own.items():
        record = found.records.get(role[1:] if role.startswith("=") else name)
        if record is None:
            raise _another_model(path, f"no record of {name!r}")
        if record.value.shape != values[name].shape:
            raise _another_model(
                path, f"{name!r} is {list(record.value.shape)}, in this model {list(values[name].shape)}"
            )
    spare = sorted(found.records.keys() - own.keys())
    if spare:
        raise _another_model(path, f"a record of {spare[0]!r}, which this model does not have")
    with torch.no_grad():
        for name, value in values.items():
            if name in own and not own[name].startswith("="):
                value.copy_(found.records[name].value)


def method_state(
    fresh: Mapping[str, Any], model: nn.Module, plan: Method | Phases, found: Universal
) -> tuple[dict[str, Any], list[str]]:
    """A synchronizer's state at the checkpoint's step, and what could not be kept.

    fresh  its state before the first step
    """
    method = plan.at(max(1, found.step))
    fragments = Fragments(model, method.payload.fragments)
    keeps = _shape_of(repr(method.outer)) == _shape_of(found.outer)
    states, lost = [], set()
    for f in range(fragments.count):
        records = [found.records[name] for name in fragments.names(f)]
        memory = _memory(records) if keeps else {}
        lost |= {key for record in records for key in record.outer} - memory.keys()
        anchored = method.payload.kind != "gradient"
        anchor = torch.cat([r.value.reshape(-1).float() for r in records]) if anchored else torch.zeros(0)
        rounds = max(record.rounds for record in records)
        states.append(pack_state(FragmentState(anchor, memory, begun=rounds, committed=rounds if keeps else 0)))
    pacing = Pacing(Pace(method.schedule.period), since=found.step)
    told = (
        [f"outer state {', '.join(sorted(lost))} of {found.outer}: {method.outer!r} has no use for it"] if lost else []
    )
    if dict(found.answers) != plan.answers():
        changed = [f"{k} {a}" for k, a in plan.answers().items() if found.answers.get(k) != a]
        told.append(f"another method than before: {', '.join(changed)}")
    return {
        **fresh,
        "step": found.step,
        "made": found.step,
        "counted": [[found.step, fresh["samples"]] for _ in states],
        "pacing": pack_pacing(pacing, None, rescue=False),
        "committed": found.rounds[0],
        "skipped": found.rounds[1],
        "fragments": states,
    }, told


def load_inner(optimizers: Optimizers, model: nn.Module, found: Universal, name: str) -> list[str]:
    """Give the optimizers their state of each parameter; returns what could not be kept."""
    if not any(record.inner for record in found.records.values()):
        return []
    if name != found.optimizer:
        return [f"inner optimizer state of {found.optimizer}: {name} has no use for it"]
    for optimizer in optimizers:
        state = optimizer.state_dict()
        inner = {index: found.records[each].inner for index, each in enumerate(optimized(model, optimizer))}
        # Clones: members of a simulation read one file each, but torch keeps what it is given.
        state["state"] = {
            index: {key: value.clone() if isinstance(value, Tensor) else value for key, value in held.items()}
            for index, held in inner.items()
            if held
        }
        optimizer.load_state_dict(state)
    return []


def optimized(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of an optimizer's parameters, in the order that its state counts them in."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def batches_behind(position: int, samples: int) -> int:
    """Batches of the whole group, `samples` each, that hold `position` samples."""
    return -(-position // samples)


def share_of_history(found: Universal, rank: int, world: int) -> History:
    """The run's history so far: what was counted is shared out among the members, so that sums stay."""
    saved = dict(found.history)

    def share(whole: int) -> int:
        return whole // world + (rank < whole % world)

    saved |= {key: share(saved[key]) for key in ("samples", "tokens")}
    saved["bytes_by_purpose"] = {
        name: [share(sent), share(received)] for name, (sent, received) in saved["bytes_by_purpose"].items()
    }
    return History.from_dict(saved)


def _memory(records: list[Record]) -> dict[str, Tensor]:
    """A fragment's outer memory: what all of its parameters have."""
    found: dict[str, Tensor] = {}
    for key, value in records[0].outer.items():
        if any(key not in record.outer for record in records):
            continue
        if all(record.outer[key].shape == record.value.shape for record in records) and value.ndim:
            found[key] = torch.cat([record.outer[key].reshape(-1) for record in records])
        else:
            found[key] = max((record.outer[key] for record in records), key=float)
    return found


def _shape_of(words: str) -> str:
    """An outer step in words without its numbers."""
    return _NUMBER.sub("#", words)


def _another_model(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{path} is of another model: {why}",
        expected="a record for each parameter and buffer of the model, of the same shape",
        mend="use the task that it was made with; thinwire checkpoint inspect lists what it has",
    )
