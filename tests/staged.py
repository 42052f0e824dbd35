"""Rounds of a staged codec among members of one process, over real packets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from test_collectives import exchange
from thinwire.aggregators import Aggregator, Mean
from thinwire.codecs import How, Staged
from thinwire.codecs.stages import Exchanged, Result, Stage, Tensors
from thinwire.collectives import Carried, Combined, combine
from thinwire.links.local import run


def rounds(
    how: How, given: Sequence[Sequence[Tensor]], *, rule: Aggregator | None = None, weights: Sequence[float] = ()
) -> list[list[Combined]]:
    """What each member has after each round, [member][round]; given [round][member]. All updates are the same."""

    def member(link):
        carried, done = Carried(), []
        for number, vectors in enumerate(given):
            ex = exchange(link, how, rule or Mean(), number=number)
            weight = weights[link.rank] if weights else 1.0
            done.append(combine(ex, vectors[link.rank], weight, carried, None))
            carried = done[-1].carried
        return done

    results = run(len(given[0]), member)
    for done in results[1:]:
        for one, other in zip(results[0], done, strict=True):
            assert one.update is not None, one.reason
            assert torch.equal(one.update, other.update)
            assert sorted(one.carried.stages) == sorted(other.carried.stages)
            assert all(torch.equal(value, other.carried.stages[name]) for name, value in one.carried.stages.items())
    return results


def run_alone(how: Staged, x: Tensor, shared: Tensors) -> tuple[Result, list[Stage]]:
    """A round of one member, every stage written and read once."""
    run, stages = how.run(x, shared, 5), []
    stage = next(run)
    while True:
        stages.append(stage)
        read = stage.codec.decode(stage.codec.encode(stage.vector, 3), len(stage.vector), 3)
        try:
            stage = run.send(Exchanged(read, read))
        except StopIteration as end:
            return end.value, stages
