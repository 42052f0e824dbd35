"""Train, fine-tune and run one model across many machines joined by slow, unreliable links."""

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
from thinwire.links.local import Network, run
from thinwire.links.torch import join
from thinwire.method import Method, Phases
from thinwire.methods import diloco, every_step, fedavg, local_sgd, post_local_sgd, streaming_diloco
from thinwire.synchronizer import Synchronizer, synchronize
from thinwire.version import __version__

__all__ = [
    "ConfigError",
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
    "__version__",
    "broadcast",
    "diloco",
    "every_step",
    "fedavg",
    "join",
    "local_sgd",
    "post_local_sgd",
    "run",
    "streaming_diloco",
    "synchronize",
]
