"""Train, fine-tune and run one model across many machines joined by slow, unreliable links."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from thinwire.version import __version__

if TYPE_CHECKING:
    from thinwire import hooks
    from thinwire.elastic.joining import join_elastic
    from thinwire.errors import (
        ConfigError,
        DivergedError,
        LinkError,
        PacketError,
        PeerLost,
        StateMismatch,
        ThinwireError,
    )
    from thinwire.handshake import broadcast
    from thinwire.links.joining import join
    from thinwire.links.local import run
    from thinwire.links.network import Network
    from thinwire.method import Method, Phases
    from thinwire.methods import (
        co2,
        delayed,
        demo,
        dgc,
        diloco,
        eager,
        every_step,
        fedavg,
        ferret,
        flasc,
        gossip,
        late_budget,
        late_merge,
        local_sgd,
        muloco,
        noloco,
        one_bit_adam,
        post_local_sgd,
        sign_sgd,
        slowmo,
        sparse_loco,
        sparta,
        streaming_diloco,
    )
    from thinwire.pushes import Asynchronous, DelayedNesterov, asynchronous
    from thinwire.seeds import just_one_byte
    from thinwire.seeds.tuner import Tuner, tune
    from thinwire.synchronizer import Synchronizer, synchronize

#: Public names and where they live; loaded when they are asked for, so that `thinwire --version` need not load torch.
_PLACES = {
    "pushes": ["Asynchronous", "DelayedNesterov", "asynchronous"],
    "errors": [
        "ConfigError",
        "DivergedError",
        "LinkError",
        "PacketError",
        "PeerLost",
        "StateMismatch",
        "ThinwireError",
    ],
    "handshake": ["broadcast"],
    "links.local": ["run"],
    "links.network": ["Network"],
    "links.joining": ["join"],
    "elastic.joining": ["join_elastic"],
    "method": ["Method", "Phases"],
    "methods": [
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
        "sparta",
        "sparse_loco",
        "streaming_diloco",
    ],
    "seeds": ["just_one_byte"],
    "seeds.tuner": ["Tuner", "tune"],
    "synchronizer": ["Synchronizer", "synchronize"],
}
#: Rooms that are public as they are: thinwire.hooks.ddp.
_ROOMS = ("hooks",)
_MODULES = {name: module for module, names in _PLACES.items() for name in names}

__all__ = [
    "Asynchronous",
    "ConfigError",
    "DelayedNesterov",
    "DivergedError",
    "LinkError",
    "Method",
    "Network",
    "PacketError",
    "PeerLost",
    "Phases",
    "StateMismatch",
    "Synchronizer",
    "ThinwireError",
    "Tuner",
    "__version__",
    "asynchronous",
    "broadcast",
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
    "hooks",
    "join",
    "join_elastic",
    "just_one_byte",
    "late_budget",
    "late_merge",
    "local_sgd",
    "muloco",
    "noloco",
    "one_bit_adam",
    "post_local_sgd",
    "run",
    "sign_sgd",
    "slowmo",
    "sparse_loco",
    "sparta",
    "streaming_diloco",
    "synchronize",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"thinwire.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module 'thinwire' has no attribute {name!r}")
    return getattr(import_module(f"thinwire.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
