"""Local SGD and federated averaging: many local steps, then the mean of the models.

    theta <- sum_i (n_i / sum_j n_j) theta_i    every H local steps; n_i alike (local SGD) or samples seen (FedAvg)

Error   members' models drift apart between rounds; H=1 with plain SGD is every-step data parallel training.
Size    2 (N-1)/N * 4n bytes sent per member and round with fp32.
State   none beside the anchor; optimizers' moments stay local.
Source  Stich 2019, arXiv:1805.09767, Alg. 1; McMahan et al. 2017, arXiv:1602.05629, Alg. 1.
Differs with a lossy codec the change since the last round is sent instead of the model, which is the same average
        (outer SGD with lr 1) but for rounding. FedAvg here samples no clients and keeps the inner optimizer's state.
"""

from __future__ import annotations

from thinwire.aggregators import Aggregator, Mean, WeightedMean
from thinwire.codecs import Codec, How, fp32
from thinwire.method import Method
from thinwire.outer import SGD, Average
from thinwire.payloads import Delta, Parameters
from thinwire.schedules import Every


def local_sgd(*, every: int = 20, codec: How = fp32) -> Method:
    """Average the models every `every` local steps (H in the papers)."""
    return _averaging(every, codec, Mean())


def fedavg(*, every: int = 20, codec: How = fp32) -> Method:
    """Average the models in proportion to the samples each member has seen (Synchronizer.count)."""
    return _averaging(every, codec, WeightedMean())


def _averaging(every: int, codec: How, aggregator: Aggregator) -> Method:
    if isinstance(codec, Codec) and codec.traits.lossless:
        payload, outer = Parameters(), Average()
        return Method(schedule=Every(every), payload=payload, codec=codec, aggregator=aggregator, outer=outer)
    return Method(schedule=Every(every), payload=Delta(), codec=codec, aggregator=aggregator, outer=SGD(1.0))
