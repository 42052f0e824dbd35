"""Rounds on vectors that another engine hands out: what every hook has in common.

A hook names its vectors once (a unit: so many whole parameters, or what a module sends). Each has its rounds, numbered
on its own, and its memories, so that the order in which the engine comes with them means nothing. Rounds begin in one
order on all members, since channels pair up by the order of opening; no more than two are under way at a time.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from thinwire import rounds
from thinwire.aggregators import Mean, WeightedMean
from thinwire.codecs import Feedback, How, parse
from thinwire.codecs.base import Shapes
from thinwire.collectives import NOBODY_FINITE, OVERFLOW
from thinwire.errors import ConfigError, DivergedError, LinkError
from thinwire.fragments import digest
from thinwire.handshake import agree
from thinwire.hooks.scatter import scatter_mean
from thinwire.links.base import Channel, Handle, Link
from thinwire.links.meter import Meter
from thinwire.method import Method
from thinwire.rounds import Committed, FragmentState, Skipped, Terms, UnderWay
from thinwire.snapshot import pack_state, unpack_state, what_is_ours
from thinwire.version import __version__

T = TypeVar("T")
_log = logging.getLogger("thinwire")

_BESIDE = 2  # rounds under way at a time: one is written while the other travels, and no more memory is taken
_PATIENCE_ROUNDS = 40  # in a row without finite values: a GradScaler looks for its scale by halving, 2^16 to 2^-24


@dataclass(frozen=True)
class Unit:
    """A vector that has rounds of its own.

    name    for messages
    shapes  of the parameters that it holds, one after the other
    """

    name: str
    shapes: Shapes


def method_of(codec: str | How) -> Method:
    """Every step, the mean of gradients; what cannot go with that is refused by the method itself."""
    how = parse(codec) if isinstance(codec, str) else codec
    weighs = isinstance(how, Feedback) and how.weighs
    return Method(codec=how, aggregator=WeightedMean() if weighs else Mean())


class Session:
    """The rounds of all units of one hook, and what they remember."""

    def __init__(
        self, link: Link, method: Method, units: Sequence[Unit], *, seed: int, device: torch.device,
        facts: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.method, self.meter, self.device = method, link.meter, device
        self._seed, self._facts = seed, facts or {}
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._link = _InOrder(link, stream)
        self.enter(units)
        self._agree({})

    @property
    def states(self) -> Sequence[FragmentState]:
        """What is remembered, one state a unit."""
        return self._states

    def enter(self, units: Sequence[Unit]) -> None:
        """Begin with these units, and with nothing remembered."""
        self._units = tuple(units)
        self._how = [self.method.codec.fit(unit.shapes) for unit in self._units]
        self._states = [FragmentState(torch.zeros(0)) for _ in self._units]

    def _agree(self, facts: Mapping[str, str]) -> None:
        model = repr((self._units, sorted(self._facts.items()))).encode()
        told = {
            "version": __version__,
            "method.codec": self.method.codec.spec,
            "seed": str(self._seed),
            "model": digest(torch.frombuffer(bytearray(model), dtype=torch.uint8)).hex(),
        }
        self._terms = Terms(agree(self._link, {**told, **facts}), self._seed)

    # --- rounds --------------------------------------------------------------------------------------------------

    def begin(self, unit: int, x: Tensor) -> UnderWay:
        """Start a round beside the caller; all members begin their rounds in one order.

        x  float32 [n] this member's, not to be changed until the round is finished
        """
        under_way, self._states[unit] = rounds.begin(
            self.method, self._terms, self._link, unit, self._states[unit].begun + 1, x, x, 1.0,
            self._states[unit], how=self._how[unit], shared=None, counted=(0, 0),
        )  # fmt: skip
        return under_way

    def finish(self, under_way: UnderWay) -> Tensor | None:
        """Wait for a round and take in what it leaves.

        returns  float32 [n], the same bits on all members; None if nothing finite came of it, on all members
        raises   PeerLost, StateMismatch; LinkError if packets were damaged again and again; DivergedError
        """
        combined = under_way.result.wait()
        unit, members = under_way.fragment, self._link.members
        before, outer = self._states[unit], self.method.outer
        state, outcome = rounds.finish(outer, under_way, combined, under_way.due, before, members, lr=1.0)
        self._states[unit] = state
        if isinstance(outcome, Committed):
            self._tell_who_was_left_out(unit, outcome.round, outcome.ranks)
            update = combined.update
            if update is not None and update.is_cuda:  # made on the jobs' stream, read on the caller's
                update.record_stream(torch.cuda.current_stream(update.device))
            return update
        self._on_skipped(unit, outcome)
        return None

    def scatter(self, unit: int, x: Tensor) -> Tensor | None:
        """A round at once in which every member gets the mean of its own shard alone (scatter.py).

        x        float32 [members * m] this member's, a row of m for every member
        returns  float32 [m]; None if nobody's values are finite
        raises   PeerLost, PacketError, DivergedError
        """
        state, members = self._states[unit], self._link.members
        exchange = rounds.opened(self.method, self._terms, self._link, unit, state.begun, self._how[unit])
        shard, own, ranks = scatter_mean(exchange, x, state.carried.own)
        idle = {rank: 0 if rank in ranks else state.idle.get(rank, 0) + 1 for rank in members}
        carried = replace(state.carried, own=own)
        self._states[unit] = replace(state, carried=carried, begun=state.begun + 1, idle=idle)
        if ranks:
            self._tell_who_was_left_out(unit, state.begun, ranks)
        else:
            self._on_skipped(unit, Skipped(0, unit, state.begun, NOBODY_FINITE))
        return shard

    def _tell_who_was_left_out(self, unit: int, number: int, present: tuple[int, ...]) -> None:
        where = f"round {number} of {self._units[unit].name}"
        for rank in sorted(set(self._link.members) - set(present)):
            _log.warning("%s: member %d had no finite gradients and was left out", where, rank)
            self._lose_patience(where, rank, self._states[unit])

    def _on_skipped(self, unit: int, outcome: Skipped) -> None:
        where = f"round {outcome.round} of {self._units[unit].name}"
        if outcome.reason not in (NOBODY_FINITE, OVERFLOW):
            raise LinkError(
                f"{where}: {outcome.reason}",
                expected="all members' gradients",
                mend="look for a faulty network card or memory on the member named; resume from the last checkpoint",
            )
        _log.warning("%s: %s; the gradients are NaN on all members", where, outcome.reason)
        self._lose_patience(where, self._link.rank, self._states[unit])

    def _lose_patience(self, where: str, rank: int, state: FragmentState) -> None:
        if state.idle.get(rank, 0) >= _PATIENCE_ROUNDS:
            raise DivergedError(
                f"{where}: member {rank} had no finite gradients {state.idle[rank]} times in a row",
                expected="finite gradients",
                mend="lower its learning rate, clip its gradients, or look at its data",
            )

    # --- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain nested values."""
        return {
            "codec": self.method.codec.spec,
            "rank": self._link.rank,
            "members": len(self._link.members),
            "states": [pack_state(state) for state in self._states],
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; all members call it, and are compared. Enter the saved units before.

        A state of another member, or of a group of another size, is taken without its error memories.
        """
        if saved["codec"] != self.method.codec.spec:
            raise ConfigError(
                f"the saved state is of another codec: {saved['codec']}",
                expected=f"codec {self.method.codec.spec}",
                mend="make the hook with the codec of the checkpoint, or leave the state out to start anew",
            )
        taken = what_is_ours(saved, self.method, self._link)
        states = [unpack_state(state, self.device) for state in saved["states"]]
        self._states = [replace(state, carried=taken(state.carried)) for state in states]
        memories = [held for state in self._states for held in (state.carried.shared, state.carried.stages)]
        shared = digest(*(value for held in memories for _, value in sorted(held.items())))
        self._agree({"state": f"{shared.hex()} before rounds {[state.begun for state in self._states]}"})


@dataclass(frozen=True)
class _InOrder:
    """A link whose jobs start when the one given `_BESIDE` before has ended, and on GPUs on their stream.

    So there are `_BESIDE` lanes, and in each of them members cannot wait for each other in a circle: the earliest job
    that anybody has not ended has begun on every member, since all before it in its lane have ended there.
    """

    link: Link
    stream: torch.cuda.Stream | None
    _given: deque[Handle[Any]] = field(default_factory=lambda: deque(maxlen=_BESIDE), init=False, repr=False)

    @property
    def rank(self) -> int:
        return self.link.rank

    @property
    def members(self) -> tuple[int, ...]:
        return self.link.members

    @property
    def meter(self) -> Meter:
        return self.link.meter

    def open(self, purpose: str) -> Channel:
        return self.link.open(purpose)

    def spawn(self, job: Callable[[], T], name: str) -> Handle[T]:
        before = self._given[0] if len(self._given) == _BESIDE else None
        placed = job if self.stream is None else _beside_the_stream(job, self.stream)

        def in_order() -> T:
            if before is not None:
                with suppress(Exception):  # whoever waits for that job is told
                    before.wait()
            return placed()

        handle = self.link.spawn(in_order, name)
        self._given.append(handle)
        return handle

    def now(self) -> float:
        return self.link.now()

    def local_step(self) -> None:
        self.link.local_step()

    def close(self) -> None:
        self.link.close()


def _beside_the_stream(job: Callable[[], T], stream: torch.cuda.Stream) -> Callable[[], T]:
    """The job on a stream of its own: after what the caller has queued so far, and ended when it returns."""
    stream.wait_stream(torch.cuda.current_stream(stream.device))

    def placed() -> T:
        with torch.cuda.stream(stream):
            result = job()
        stream.synchronize()
        return result

    return placed
