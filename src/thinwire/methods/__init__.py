"""Named methods: functions that return six answers."""

from __future__ import annotations

from collections.abc import Callable

from thinwire.method import Method, Phases
from thinwire.methods.co2 import co2
from thinwire.methods.delayed import delayed
from thinwire.methods.demo import demo
from thinwire.methods.dgc import dgc
from thinwire.methods.diloco import diloco
from thinwire.methods.eager import eager
from thinwire.methods.every_step import every_step
from thinwire.methods.ferret import ferret
from thinwire.methods.flasc import flasc
from thinwire.methods.gossip import gossip
from thinwire.methods.late_merge import late_budget, late_merge
from thinwire.methods.local_sgd import fedavg, local_sgd
from thinwire.methods.muloco import muloco
from thinwire.methods.noloco import noloco
from thinwire.methods.one_bit_adam import one_bit_adam
from thinwire.methods.post_local_sgd import post_local_sgd
from thinwire.methods.sign_sgd import sign_sgd
from thinwire.methods.slowmo import slowmo
from thinwire.methods.sparse_loco import sparse_loco
from thinwire.methods.sparta import sparta
from thinwire.methods.streaming_diloco import streaming_diloco

#: Every method by the name used in configurations and on the command line.
METHODS: dict[str, Callable[..., Method | Phases]] = {
    "ddp": every_step,
    "dgc": dgc,
    "demo": demo,
    "one_bit_adam": one_bit_adam,
    "sign_sgd": sign_sgd,
    "sparta": sparta,
    "local_sgd": local_sgd,
    "fedavg": fedavg,
    "post_local_sgd": post_local_sgd,
    "diloco": diloco,
    "streaming": streaming_diloco,
    "eager": eager,
    "delayed": delayed,
    "co2": co2,
    "slowmo": slowmo,
    "ferret": ferret,
    "flasc": flasc,
    "noloco": noloco,
    "muloco": muloco,
    "sparse_loco": sparse_loco,
    "gossip": gossip,
    "late_merge": late_merge,
}

__all__ = [
    "METHODS",
    "co2",
    "delayed",
    "demo",
    "dgc",
    "diloco",
    "eager",
    "every_step",
    "fedavg",
    "ferret",
    "flasc",
    "gossip",
    "late_budget",
    "late_merge",
    "local_sgd",
    "muloco",
    "noloco",
    "one_bit_adam",
    "post_local_sgd",
    "sign_sgd",
    "slowmo",
    "sparse_loco",
    "sparta",
    "streaming_diloco",
]
