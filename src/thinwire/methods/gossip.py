"""Gossip: many local steps, then each member averages its model with its neighbours' alone.

    theta_i <- sum_j W_ij theta_j    every H local steps; W doubly stochastic: who talks to whom is the topology

Error   mixing keeps the mean of all models, to rounding; how far members are from it is `Synchronizer.spread()`. Where
        all are neighbours of all it is local SGD.
Size    4n bytes with fp32 to each neighbour and round: 2 in a ring, 4 in a torus, 1 in pairs or on one_peer graphs.
State   none. Optimizers' moments stay local. There is no common model: what is evaluated is the members' mean.
Source  Lian et al. 2017, arXiv:1705.09056 (H = 1); Boyd et al. 2006 (pairs); thinwire.graphs names those of each graph.
Differs a step is made before models are mixed, not beside it. A neighbour without finite values, or whose packet was
        damaged, is left out of the round, and its weight goes to the member itself: such a round moves the mean.
"""

from __future__ import annotations

from thinwire.codecs import Codec, fp32
from thinwire.graphs import Ring
from thinwire.method import Method
from thinwire.outer import Average
from thinwire.payloads import Parameters
from thinwire.routes import Topology
from thinwire.schedules import Every


def gossip(*, every: int = 20, topology: Topology = Ring(), codec: Codec = fp32) -> Method:  # noqa: B008 (frozen)
    """Average with neighbours every `every` local steps (H).

    codec  lossless: members have no model in common that a change could be sent against
    """
    return Method(schedule=Every(every), payload=Parameters(), codec=codec, topology=topology, outer=Average())
