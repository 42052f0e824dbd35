"""A member of a FedKSeed run (pool.py): its own steps, what it tells, what it adds up, and the model built from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from thinwire.errors import ConfigError, DivergedError
from thinwire.fragments import digest
from thinwire.handshake import agree
from thinwire.links.base import Link
from thinwire.packet import Header, Packet
from thinwire.randomness import mix
from thinwire.seeds import noise
from thinwire.seeds.codes import float32
from thinwire.seeds.directions import apply_all_
from thinwire.seeds.log import Log
from thinwire.seeds.perturbing import Perturber
from thinwire.seeds.pool import UNIT, FedKSeed, Pool, require, units
from thinwire.seeds.recipe import Recipe
from thinwire.seeds.spread import spread
from thinwire.seeds.tensors import Tunable
from thinwire.seeds.updates import Update
from thinwire.version import __version__

_CODEC = "kseed"
_ROUNDING = 0x726F756E  # purpose of a key: "roun"


@dataclass(frozen=True)
class Turn:
    """What a round came to.

    members  that took part
    loss     mean over this member's steps; NaN if it took no part, or had no finite loss
    scalars  g of its steps, as they count
    """

    members: tuple[int, ...]
    loss: float = math.nan
    scalars: tuple[float, ...] = field(default=())


class PoolTuner:
    """A member of a FedKSeed run. Use it as a context manager; the model is rebuilt at the end of the block.

        with PoolTuner(model, FedKSeed(lr=1e-4), link) as tuner:
            for _ in range(40):
                tuner.round(lambda step: loss_of(model, *batches[step]))

    model   as all members have it before the first round: its tunable tensors are kept as the base
    raises  ConfigError on entering if members differ in model, weights, options, version or what they have added up

    During rounds the model holds what this member's own steps made of it: `rebuild` before looking at it.
    """

    def __init__(self, model: nn.Module, options: FedKSeed, link: Link) -> None:
        self.options, self.pool = options, Pool.empty(options.seeds)
        self._model, self._tunable, self._link = model, Tunable(model), link
        self._base = [w.clone() for _, w in self._tunable.pairs]
        tunable, recipe = (
            self._tunable,
            Recipe(seed=options.seed, eps=options.eps, noise=options.noise, rounding="nearest"),
        )
        self._log = Log.of(tunable.pairs, recipe, frozen=tunable.frozen, aliases=tunable.aliases)
        self._noise = noise.parse(options.noise)
        self._perturber = Perturber(self._tunable, self._noise)
        self._built: int | None = 0  # rounds in the model's weights; None: something else
        self._context = 0

    def __enter__(self) -> PoolTuner:
        facts = {"version": __version__, "model": self._tunable.schema(), "weights": self._log.base}
        facts["frozen"] = self._log.rest or "nothing"
        told = {name: repr(value) for name, value in asdict(self.options).items()}
        self._context = agree(self._link, {**facts, **told, "state": digest(*self._state()).hex()})
        self._channel = self._link.open("pool")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.rebuild()

    def round(self, loss: Callable[[int], Tensor | float], factor: float = 1.0) -> Turn:
        """A round; all members call it, those that take no part just add up.

        loss    called twice as loss(step) for each of the member's steps, from 0, with the model as it then is; random
                draws on the CPU (dropout) are the same in both calls
        factor  of the learning rate in this round, in [0, 1]; that of the lowest member that takes part counts
        raises  PeerLost, PacketError; DivergedError
        """
        require("factor", factor, 0 <= factor <= 1, "a share of the learning rate in [0, 1]")
        number, link, tau = self.pool.rounds, self._link, self.options.steps
        members = self.options.members(link.members, number)
        turn, own = Turn(members), None
        context = mix(self._context, int.from_bytes(digest(self.pool.sums), "little"))
        header = Header(sender=link.rank, round=number, context=context, weight=factor)
        if link.rank in members:
            k, g, mean = self._walk(loss, factor, number)
            turn = Turn(members, mean, tuple(g.tolist()))
            own = Packet(_CODEC, tau, {"seed": k.short(), "scalar": g}, header)
        layout = {"seed": (torch.int16, tau), "scalar": (torch.float32, tau)}
        told = spread(link, self._channel, members, own, header, layout, _CODEC, tau, f"round {number}")
        k = torch.cat([packet.fields["seed"] for packet in told.values()]).long()
        g = torch.cat([packet.fields["scalar"] for packet in told.values()])
        self._check(k, g, number)
        weight = self.options.lr * told[members[0]].header.weight / len(members)
        pool = self.pool.add(k, g, weight)
        self.pool = Pool(pool.sums, pool.sizes, pool.picks, number + 1)
        return turn

    def rebuild(self) -> None:
        """Make the model what it is after the rounds so far: the same bits on all members."""
        if self._built == self.pool.rounds:
            return
        pairs = self._tunable.pairs
        for (_, w), base in zip(pairs, self._base, strict=True):
            w.copy_(base)
        apply_all_(pairs, [self.options.sums(self.pool).update()], self._noise, rounding="nearest")
        self._built = self.pool.rounds

    def log(self) -> Log:
        """The fine-tune so far as a log of sums, for `thinwire import`; the model is rebuilt for its digest."""
        self.rebuild()
        return replace(self._log, sums=self.options.sums(self.pool)).checked(self._tunable.digest())

    def _walk(self, loss: Callable[[int], Tensor | float], factor: float, number: int) -> tuple[Tensor, Tensor, float]:
        """This member's steps: k int64 [tau], g [tau], and the mean loss."""
        self.rebuild()
        self._built = None
        options, rank, losses = self.options, self._link.rank, list[float]()
        sums = options.sums(self.pool)
        k = options.picks(self.pool, number, rank)
        g = torch.empty(options.steps)
        for step, index in enumerate(k.tolist()):
            direction = sums.direction(index)
            plus, minus = self._perturber.sides(partial(loss, step), direction, options.eps)
            losses += [each for each in (plus, minus) if math.isfinite(each)]
            g[step] = options.told((plus - minus) / (2 * options.eps))
            self._step(direction, g[step], factor, mix(options.seed, _ROUNDING, number, rank, step))
            self._link.local_step()
        return k, g, sum(losses) / len(losses) if losses else math.nan

    def _step(self, direction: int, g: Tensor, factor: float, key: int) -> None:
        if g.isfinite():
            update = Update((direction,), (float32(int(units(g, self.options.lr * factor)) * UNIT),))
            apply_all_(self._tunable.pairs, [update], self._noise, rounding="stochastic", key=key)

    def _check(self, k: Tensor, g: Tensor, number: int) -> None:
        """What was told must be what can be told."""
        inside = g[g.isfinite()]
        if int(k.min()) < 0 or int(k.max()) >= self.options.seeds or bool((inside.abs() > self.options.clip).any()):
            raise DivergedError(
                f"round {number}: a member told of seeds or scalars that there are not",
                expected=f"seeds below {self.options.seeds}, scalars up to {self.options.clip:g}",
                mend="have all members run the same version of thinwire",
            )

    # --- state ---------------------------------------------------------------------------------------------------

    def _state(self) -> tuple[Tensor, ...]:
        return self.pool.sums, self.pool.sizes, self.pool.picks

    def state_dict(self) -> dict[str, Any]:
        """What is added up so far, and which base it goes with; the base itself is the caller's to keep."""
        sums, sizes, picks = self._state()
        return {"sums": sums, "sizes": sizes, "picks": picks, "rounds": self.pool.rounds, "base": self._log.base}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`, before the block; the model was made with the base weights.

        raises  ConfigError for another base or another number of seeds
        """
        if state["base"] != self._log.base:
            raise ConfigError(
                f"the base weights have the digest {self._log.base}",
                expected=f"digest {state['base']}, of the weights that the state goes with",
                mend="make the model with the run's base before the tuner, not with what it was tuned to",
            )
        if len(state["sums"]) != self.options.seeds:
            raise ConfigError(
                f"FedKSeed: seeds={self.options.seeds}",
                expected=f"{len(state['sums'])} seeds, as in the state",
                mend=f"FedKSeed(seeds={len(state['sums'])}), or begin anew",
            )
        self.pool = Pool(state["sums"], state["sizes"], state["picks"], state["rounds"])
        self._built = None if self.pool.rounds else 0
        self.rebuild()
