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
    family    "torch", "peers" or "ours": how it is coloured, and what --families chooses
    member    the script beside this file that a host runs
    slow      whether it sends whole gradients at every step: such runs wait for the link, take next to no processor,
              and get the ten minutes that the comparison is about
    setting   the virtual environment it runs in: "" is the one the runner runs in, else benchmarks/cache/SETTING
    options   for the script
    """

    name: str
    family: str
    member: str
    options: Mapping[str, Any] = field(default_factory=dict)
    slow: bool = False
    setting: str = ""


def _ddp(name: str, *, slow: bool = False, **options: Any) -> Contender:
    return Contender(name, "torch", "member_ddp.py", options, slow)


def _ours(name: str, method: str, *, slow: bool = False, **options: Any) -> Contender:
    return Contender(name, "ours", "member_thinwire.py", {"method": method, **options}, slow)


def _torchft(name: str, algorithm: str, **options: Any) -> Contender:
    return Contender(name, "peers", "member_torchft.py", {"algorithm": algorithm, **options}, setting="torchft")


def _hivemind(name: str, **options: Any) -> Contender:
    return Contender(name, "peers", "member_hivemind.py", options, setting="hivemind")


CONTENDERS = (
    _ddp("torch DDP", slow=True, hook="none"),
    _ddp("torch DDP, fp16 hook", slow=True, hook="fp16"),
    _ddp("torch DDP, PowerSGD hook", hook="powersgd", rank=1, start=10),
    _ddp("torch DDP, PowerSGD hook, early", hook="powersgd", rank=1, start=2),
    Contender("Accelerate LocalSGD", "peers", "member_accelerate.py", {"every": EVERY}),
    _torchft("torchft LocalSGD", "local_sgd", every=EVERY),
    _torchft("torchft DiLoCo", "diloco", every=EVERY, fragments=1, delay=0, alpha=0.0, **OUTER),
    _torchft("torchft DiLoCo, streaming", "diloco", every=EVERY, fragments=2, delay=5, alpha=0.5, **OUTER),
    _hivemind("hivemind, local updates", local=True, every=EVERY),
    _hivemind("hivemind, global batches", local=False, every=4, delay=True),
    _ours("thinwire ddp", "ddp", slow=True),
    _ours("thinwire diloco", "diloco", every=EVERY, **OUTER),
    _ours("thinwire diloco, int8", "diloco", every=EVERY, codec="int8", **OUTER),
    _ours("thinwire diloco, int4", "diloco", every=EVERY, codec="int4", **OUTER),
    _ours("thinwire diloco, topk(1/64) | int4", "diloco", every=EVERY, codec="topk(1/64) | int4", **OUTER),
    _ours("thinwire streaming", "streaming", every=EVERY, fragments=2, overlap=5, codec="int4", **OUTER),
)
