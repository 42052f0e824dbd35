"""Tuning an offloaded model, alone or with others who share every direction: what crosses the wire is losses.

    g = mean over groups of (L(w + eps z) - L(w - eps z)) / (2 eps)      the round's scalar, the same on all members

    data     every member is a group: both sides, on a batch of its own
    sides    members 2i and 2i+1 are a group: one side each, on one batch (perturbation parallel; of more pairs, in 2D)

One direction and the mean of g: that is g on the groups' batches together, so more members lower the noise of the
batch, not that of the direction. Members with directions of their own (tuner.py) lower both, but replay all of them.

Error   sides: none, losses cross as the float32 that they are rounded to on one machine too. It needs both machines to
        compute alike: a difference of theirs enters g divided by 2 eps.
Size    (N-1) (4 bytes for each loss, one or two a sample, + about 92 of the frame) a member and step
State   closed rounds, as in any log: one member, number 0, whose scalars all agree on
Source  Wang et al. 2025, arXiv:2507.03211 (DistZO2): PertP, DDP and 2D
Differs a code of the recipe may round g ("whole" writes it as it is), so that the log is like any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from thinwire.collectives import gather_packets
from thinwire.errors import ConfigError, DivergedError
from thinwire.handshake import agree
from thinwire.links.base import Link
from thinwire.links.local import alone
from thinwire.packet import Header, Packet
from thinwire.seeds.codes import float32
from thinwire.seeds.log import Closed, Log
from thinwire.seeds.offload import Offloaded
from thinwire.seeds.recipe import Recipe, seed_of
from thinwire.version import __version__

_PATIENCE_ROUNDS = 20  # in a row in which no group's losses were finite


@dataclass(frozen=True)
class Sided:
    """What a step came to.

    loss     mean of the finite losses of all members; NaN if there are none
    scalars  g, one a sample, before it was written in the recipe's code; NaN where no group had finite losses
    closed   the round
    """

    loss: float
    scalars: tuple[float, ...]
    closed: Closed


class SidedTuner:
    """Steps of an offloaded model; use it as a context manager, at whose end nothing waits any more.

    model   its stages and shelf, alike on all members
    recipe  the one that the model was given: the same on all members
    link    to the others; none for one machine
    sides   share the two sides of a direction among pairs of members; otherwise each computes both on its own batch
    raises  ConfigError if pairs are asked of an odd number, and on entering if members differ
    """

    def __init__(self, model: Offloaded, recipe: Recipe, link: Link | None = None, *, sides: bool = False) -> None:
        self._link = link or alone()
        count = len(self._link.members)
        if sides and count % 2:
            raise ConfigError(
                f"two sides among {count} members", expected="an even number: one member for each side",
                mend="add or leave out a member, or sides=False: both sides on every member's own batch",
            )  # fmt: skip
        self.model, self._recipe, self._sides = model, recipe, sides
        place = self._link.members.index(self._link.rank)
        self._signs: tuple[int, ...] = ((1, -1)[place % 2],) if sides else (1, -1)
        self._channel = self._link.open("losses")
        self._eps = float32(recipe.eps)  # what is added to weights is a product of float32 numbers
        self._state, self._silent, self._context = recipe.start(), 0, 0
        frozen = model.frozen
        rest = model.digest(tuple(frozen)) if frozen else ""
        self.log = Log(recipe, model.specs, model.digest(), frozen=frozen, rest=rest)

    def __enter__(self) -> SidedTuner:
        facts = {"version": __version__, "recipe": repr(self._recipe), "sides": str(self._sides)}
        self._context = agree(
            self._link,
            {**facts, "model": repr(self.model.specs), "base": self.log.base, "frozen": self.log.rest or "nothing"},
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.model.flush()
            self.log = self.log.checked(self.model.digest())

    def step(self, inputs: Any, loss: Callable[[Any], Tensor | float], *, lr: float) -> Sided:
        """One step.

        inputs  of the first stage; the same for both members of a pair
        loss    of what the last stage returned
        lr      that of the lowest member counts
        raises  PeerLost; DivergedError if nobody's losses are finite, again and again
        """
        recipe, number = self._recipe, len(self.log.rounds)
        seeds = [seed_of(recipe.seed, number, 0, sample) for sample in range(recipe.samples)]
        probes = [(seed, sign * self._eps) for seed in seeds for sign in self._signs]
        losses = torch.tensor([float(loss(output)) for output in self.model.probe(inputs, probes)]).tolist()  # float32
        told, lr = self._gather(losses, number, lr)
        scalars = [self._scalar(told, sample) for sample in range(recipe.samples)]
        closed = Closed(number, lr, {0: bytes(recipe.encode(scalars, self._state, number, 0).numpy())})
        self._state, update = recipe.step(self._state, closed)
        self.model.apply(update)
        self.log = self.log.append(closed)
        self._silent = 0 if update.seeds else self._silent + 1
        if self._silent == _PATIENCE_ROUNDS:
            raise DivergedError(
                f"no member had finite losses for {_PATIENCE_ROUNDS} rounds",
                expected="losses that are finite numbers, of some group's",
                mend="lower the learning rate or eps; half-precision weights may need bf16 or fp32",
            )
        finite = [value for each in told.values() for value in each if math.isfinite(value)]
        return Sided(sum(finite) / len(finite) if finite else math.nan, tuple(scalars), closed)

    def _gather(self, losses: Sequence[float], number: int, lr: float) -> tuple[dict[int, list[float]], float]:
        """Everybody's losses by rank, and the learning rate that counts."""
        link = self._link
        link.local_step()
        header = Header(sender=link.rank, round=number, context=self._context, weight=lr)
        packet = Packet("losses", len(losses), {"loss": torch.tensor(losses)}, header)
        layout = {"loss": (torch.float32, len(losses))}
        found = gather_packets(self._channel, link.rank, link.members, packet, layout, f"losses of step {number}")
        return {rank: each.fields["loss"].tolist() for rank, each in found.items()}, found[min(found)].header.weight

    def _scalar(self, told: Mapping[int, Sequence[float]], sample: int) -> float:
        """The mean of the groups' g; a group without finite losses is left out."""
        rows = list(told.values())
        if self._sides:
            pairs = [(plus[sample], minus[sample]) for plus, minus in zip(rows[::2], rows[1::2], strict=True)]
        else:
            pairs = [(row[2 * sample], row[2 * sample + 1]) for row in rows]
        found = [(plus - minus) / (2 * self._eps) for plus, minus in pairs]
        finite = [g for g in found if math.isfinite(g)]
        return sum(finite) / len(finite) if finite else math.nan
