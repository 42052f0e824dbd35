"""Named methods: functions that return six answers."""

from __future__ import annotations

from collections.abc import Callable

from thinwire.method import Method, Phases
from thinwire.methods.dgc import dgc
from thinwire.methods.diloco import diloco
from thinwire.methods.every_step import every_step
from thinwire.methods.local_sgd import fedavg, local_sgd
from thinwire.methods.post_local_sgd import post_local_sgd
from thinwire.methods.streaming_diloco import streaming_diloco

#: Every method by the name used in configurations and on the command line.
METHODS: dict[str, Callable[..., Method | Phases]] = {
    "ddp": every_step,
    "dgc": dgc,
    "local_sgd": local_sgd,
    "fedavg": fedavg,
    "post_local_sgd": post_local_sgd,
    "diloco": diloco,
    "streaming": streaming_diloco,
}

__all__ = ["METHODS", "dgc", "diloco", "every_step", "fedavg", "local_sgd", "post_local_sgd", "streaming_diloco"]
