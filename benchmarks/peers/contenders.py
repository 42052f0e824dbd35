"""Who takes part, as data: a line each. The order is that of the tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: Local steps between rounds, and the outer step; tune.py found them, the same for everybody (results/peers_tuning.md).
EVERY, OUTER = 20, {"outer_lr": 0.7, "momentum": 0.9}


@dataclass(frozen=True)
class Contender:
    """One line of the tables.

    name      as shown
    family    "every step": all members wait for the link at every step, which takes few processors and many minutes;
              "local": whole rounds of local steps; "ours": thinwire's
    member    the script beside this file that a host runs
    setting   the virtual environment it runs in: "" is the one the runner runs in, else benchmarks/cache/SETTING
    options   for the script
    """

    name: str
    family: str
    member: str
    options: Mapping[str, Any] = field(default_factory=dict)
    setting: str = ""


def _ddp(name: str, **options: Any) -> Contender:
    return Contender(name, "every step", "member_ddp.py", options)


def _ours(name: str, method: str, **options: Any) -> Contender:
    return Contender(name, "ours", "member_thinwire.py", {"method": method, **options})


def _torchft(name: str, algorithm: str, **options: Any) -> Contender:
    return Contender(name, "local", "member_torchft.py", {"algorithm": algorithm, **options}, setting="torchft")


def _hivemind(name: str, **options: Any) -> Contender:
    return Contender(name, "local", "member_hivemind.py", options, setting="hivemind")


CONTENDERS = (
    _ddp("torch DDP", hook="none"),
    _ddp("torch DDP, fp16 hook", hook="fp16"),
    _ddp("torch DDP, PowerSGD hook", hook="powersgd", rank=1, start=10),
    Contender("Accelerate LocalSGD", "local", "member_accelerate.py", {"every": EVERY}),
    _torchft("torchft LocalSGD", "local_sgd", every=EVERY),
    _torchft("torchft DiLoCo", "diloco", every=EVERY, fragments=1, delay=0, alpha=0.0, **OUTER),
    _torchft("torchft DiLoCo, streaming", "diloco", every=EVERY, fragments=2, delay=5, alpha=0.5, **OUTER),
    _hivemind("hivemind, local updates", local=True, every=EVERY),
    _hivemind("hivemind, global batches", local=False, every=4, delay=True),
    _ours("thinwire ddp", "ddp"),
    _ours("thinwire diloco", "diloco", every=EVERY, **OUTER),
    _ours("thinwire diloco, int8", "diloco", every=EVERY, codec="int8", **OUTER),
    _ours("thinwire diloco, int4", "diloco", every=EVERY, codec="int4", **OUTER),
    _ours("thinwire diloco, topk(1/64) | int4", "diloco", every=EVERY, codec="topk(1/64) | int4", **OUTER),
    _ours("thinwire streaming", "streaming", every=EVERY, fragments=2, overlap=5, codec="int4", **OUTER),
)
