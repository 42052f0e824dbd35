"""Going on: what members must have in common, which step they go on from, and whether a checkpoint is of this run."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from thinwire.config import Run, dump
from thinwire.errors import ConfigError
from thinwire.handshake import agree
from thinwire.links.base import Link
from thinwire.train import checkpoint
from thinwire.train.history import gather_json


def shared_settings(run: Run, resume: bool) -> dict[str, str]:
    """What must be the same on all members for their loops to keep step; data, devices and folders need not be."""
    settings = {
        name: str(getattr(run, name)) for name in ("steps", "max_time", "seed", "eval_every", "checkpoint_every")
    }
    tables = tomllib.loads(dump(run))
    optimizer = {f"optimizer.{name}": str(value) for name, value in tables["optimizer"].items()}
    return settings | optimizer | {"task": tables["task"]["name"], "resume": "yes" if resume else "no"}


def common_step(link: Link, folder: Path) -> tuple[int, int]:
    """The step to resume from, and whose file this member takes.

    The newest step that any member has counts: after a loss, survivors have one more than the member that was lost,
    which then takes a survivor's. raises ConfigError if there is none, or it cannot be read from here
    """
    told = gather_json(link, {"steps": sorted(checkpoint.steps(folder, link.rank))}, "the checkpoints")
    owners = {rank: set(facts["steps"]) for rank, facts in told.items()}
    everything = set().union(*owners.values())
    if not everything:
        raise ConfigError(
            f"no checkpoint in {folder}",
            expected="a folder that an earlier run has written checkpoints into",
            mend="name that run's folder, or start anew without --resume",
        )
    step = max(everything)
    if step in owners[link.rank]:
        owner, found = link.rank, True
    else:
        owner = min(rank for rank, steps in owners.items() if step in steps)
        found = step in checkpoint.steps(folder, owner)
    agree(link, {"checkpoint can be read": "yes" if found else f"no: copy member {owner}'s step-{step:08d} here"})
    return step, owner


def load_model(model: nn.Module, state: Mapping[str, Any], run: Run, members: int) -> None:
    """Load the model's part of a checkpoint.

    raises  ConfigError if the checkpoint is of another run than this
    """
    name, folder = run.optimizer.name, run.out
    if state["members"] != members:
        raise ConfigError(
            f"the checkpoint in {folder} is of {state['members']} members, this run has {members}",
            expected=f"{state['members']} members, as before",
            mend="start as many as then; or start anew, with another --out",
        )
    if state["optimizer_name"] != name:
        raise ConfigError(
            f"the checkpoint in {folder} was made with the optimizer {state['optimizer_name']}, not {name}",
            expected=f"optimizer {state['optimizer_name']}: another one has no use for its state",
            mend=f"resume with --optimizer {state['optimizer_name']}; or start anew, with another --out",
        )
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:  # torch's way to say what does not fit, a line each after the first
        why = " ".join(str(error).splitlines()[1:2]).strip() or str(error)
        raise ConfigError(
            f"the checkpoint in {folder} is of another model: {why}",
            expected="the task and the model it was made with",
            mend="resume without changing [task]; or start anew, with another --out",
        ) from error
