"""And then? What the combined vector does to the anchor, and how the live parameters take the new anchor in."""

from collections.abc import Callable, Mapping

from thinwire.outer.base import (
    SGD,
    Adam,
    Around,
    Average,
    Memory,
    Mine,
    Mix,
    Nesterov,
    NoStep,
    Now,
    Outer,
    Patch,
    Rebase,
)
from thinwire.outer.clipped import ClippedMomentum, Gap, Penalty
from thinwire.outer.eager import Eager
from thinwire.outer.groups import PerGroup, per_group
from thinwire.outer.restart import Restart
from thinwire.outer.scheduled import Scheduled
from thinwire.outer.slowmo import SlowMo
from thinwire.outer.towards import Towards

#: Every outer step by the name used in expressions: "scheduled(nesterov(0.7, 0.9), warmup=5)".
OUTERS: Mapping[str, Callable[..., Outer]] = {
    "average": Average,
    "sgd": SGD,
    "nesterov": Nesterov,
    "adam": Adam,
    "slowmo": SlowMo,
    "clipped_momentum": ClippedMomentum,
    "patch": Patch,
    "mix": Mix,
    "rebase": Rebase,
    "towards": Towards,
    "eager": Eager,
    "scheduled": Scheduled,
    "per_group": per_group,
    "restart": Restart,
}

__all__ = [
    "OUTERS",
    "SGD",
    "Adam",
    "Around",
    "Average",
    "ClippedMomentum",
    "Eager",
    "Gap",
    "Memory",
    "Mine",
    "Mix",
    "Nesterov",
    "NoStep",
    "Now",
    "Outer",
    "Patch",
    "Penalty",
    "PerGroup",
    "Rebase",
    "Restart",
    "Scheduled",
    "SlowMo",
    "Towards",
    "per_group",
]
