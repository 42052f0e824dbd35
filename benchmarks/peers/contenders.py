"""Who takes part, as data: a line each. The order is that of the tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: What tune.py found (the table of trials is in results/peers.md): for contenders that send whole models or deltas, the
#: local steps between rounds that 20 Mbit/s asks for, and an outer step that is plain averaging, since a run has few
#: rounds; momentum where a sparse codec with error memory damps it.
EVERY = 20
AVERAGE, OWN = {"outer_lr": 1.0, "momentum": 0.0}, {"outer_lr": 0.7, "momentum": 0.9}
SPARSE = {"codec": "topk(1/64) | int4", "outer_lr": 1.0, "momentum": 0.5}


@dataclass(frozen=True)
class Contender:
    """One line of the tables.

    name      as shown
    family    "torch", "peers" or "ours": how it is coloured, and what --families chooses
    member    the script beside this file that a host runs
    slow      whether it sends whole gradients at every step: such runs wait for the link, take next to no processor,
              and get the ten minutes that the comparison is about (run.py says what at which rate)
    seconds   how long a run lasts, at every rate, if it is not slow
    setting   the virtual environment it runs in: "" is the one the runner runs in, else benchmarks/cache/SETTING
    options   for the script
    """

    name: str
    family: str
    member: str
    options: Mapping[str, Any] = field(default_factory=dict)
    slow: bool = False
    setting: str = ""
    seconds: float = 60


def _ddp(name: str, *, slow: bool = False, seconds: float = 60, **options: Any) -> Contender:
    return Contender(name, "torch", "member_ddp.py", options, slow, seconds=seconds)


def _ours(name: str, method: str, *, slow: bool = False, **options: Any) -> Contender:
    return Contender(name, "ours", "member_thinwire.py", {"method": method, **options}, slow, seconds=45)


def _torchft(name: str, algorithm: str, *, seconds: float = 90, **options: Any) -> Contender:
    words = {"algorithm": algorithm, **options}
    return Contender(name, "peers", "member_torchft.py", words, setting="torchft", seconds=seconds)


def _hivemind(name: str, **options: Any) -> Contender:
    return Contender(name, "peers", "member_hivemind.py", options, setting="hivemind")


def _exogym(name: str, **options: Any) -> Contender:
    return Contender(name, "peers", "member_exogym.py", options, setting="exogym")


CONTENDERS = (
    _ddp("torch DDP", slow=True, hook="none"),
    _ddp("torch DDP, fp16 hook", slow=True, hook="fp16"),
    _ddp("torch DDP, PowerSGD hook", seconds=120, hook="powersgd", rank=1, start=10),
    _ddp("torch DDP, PowerSGD hook, early", hook="powersgd", rank=1, start=2),
    Contender("Accelerate LocalSGD", "peers", "member_accelerate.py", {"every": EVERY}, seconds=90),
    _torchft("torchft LocalSGD", "local_sgd", every=EVERY),
    _torchft("torchft DiLoCo, 0.7 and 0.9", "diloco", every=EVERY, fragments=1, delay=0, alpha=0.0, **OWN),
    _torchft("torchft DiLoCo, tuned", "diloco", every=EVERY, fragments=1, delay=0, alpha=0.0, **AVERAGE),
    _torchft(
        "torchft DiLoCo, streaming, tuned", "diloco", seconds=60, every=EVERY, fragments=2, delay=9, alpha=0.5,
        **AVERAGE,
    ),
    _hivemind("hivemind, local updates", local=True, every=50),
    _hivemind("hivemind, global batches", local=False, every=4, delay=True),
    _exogym("exogym DiLoCo", strategy="diloco", every=EVERY),
    _exogym("exogym SPARTA", strategy="sparta", p=0.005),
    _exogym("exogym DeMo", strategy="demo"),
    _ours("thinwire ddp", "ddp", slow=True),
    _ours("thinwire ddp, topk(1/64) | int4", "ddp", codec=SPARSE["codec"]),
    _ours("thinwire local_sgd", "local_sgd", every=EVERY),
    _ours("thinwire diloco, int8", "diloco", every=10, codec="int8", **AVERAGE),
    _ours("thinwire diloco, int4", "diloco", every=10, codec="int4", **AVERAGE),
    _ours("thinwire diloco, topk(1/64) | int4", "diloco", every=10, **SPARSE),
    _ours("thinwire diloco, topk(1/64) | int4, every 5", "diloco", every=5, **SPARSE),
    _ours("thinwire sparse_loco", "sparse_loco", every=10),
    _ours(
        "thinwire streaming, int4", "streaming", every=10, fragments=2, overlap=3, codec="int4", outer_lr=1.0,
        momentum=0.5,
    ),
)  # fmt: skip
