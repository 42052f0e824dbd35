"""Runs a method around anybody's training loop: the only place that knows the order of things, and the only keeper of
state.

    with thinwire.join() as link, thinwire.synchronize(model, optimizer, diloco(), link) as sync:
        for batch in loader:
            loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()

It hooks the optimizer's step. Gradients are combined before the step, everything else after it. Gradient accumulation
needs nothing: only steps count. Mixed precision: autocast needs nothing; hand a GradScaler over as `scaler`, so that
members skip steps together. Clipping: `sync.clip_grad_norm_` clips what the step will use (the combined gradient, if
the method sends gradients); torch's own clips the member's. Several optimizers, each over parameters of its own (Muon
for matrices, AdamW for the rest): a list of them; gradients are combined before the first one's step, and a local step
is made once each has stepped, in whatever order.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from thinwire import rounds, stability
from thinwire.buffers import BufferRows, Buffers, average
from thinwire.collectives import NO_SAMPLES, NOBODY_FINITE, OVERFLOW, Carried, Combined, finite, gather_packets
from thinwire.elastic.handing import State
from thinwire.elastic.link import ElasticLink
from thinwire.elastic.settle import FragmentWord, Word
from thinwire.errors import ConfigError, DivergedError, LinkError, PeerLost, ThinwireError
from thinwire.fragments import Fragments, digest
from thinwire.handshake import agree
from thinwire.inner import Inner, Optimizers
from thinwire.island import Island
from thinwire.links.base import Handle, Link
from thinwire.links.islands import within
from thinwire.method import Method, Phases
from thinwire.outer import Mine, Now
from thinwire.pace import Clock, Pace, Pacer, Pacing, Told
from thinwire.packet import Header, Layout, Packet
from thinwire.regroup import MENDABLE, Regrouping, Settled
from thinwire.rounds import Committed, FragmentState, Outcome, Skipped, Terms, UnderWay
from thinwire.routes import Neighbours, shares
from thinwire.schedules import Paced, back_to_back
from thinwire.sharding import Share, clip_grad_norm_, is_dtensor, layout, resharder
from thinwire.snapshot import (
    Arrived,
    carrying,
    is_ours,
    owing,
    pack_pacing,
    pack_state,
    pack_under_way,
    unpack_pacing,
    unpack_state,
    unpack_under_way,
    what_is_ours,
    without_own,
)
from thinwire.topologies import Islands
from thinwire.version import __version__

_log = logging.getLogger("thinwire")

_PATIENCE_ROUNDS = 3  # a member may contribute nothing finite this often in a row
_PATIENCE_SCALED = 40  # the same with a GradScaler, which looks for its scale by halving: 2^16 to 2^-24
_COMPARE_GRADIENT_STEPS = 16  # parameters are compared this often when gradients are sent: they are not free to read
_COMPARE_ELEMENTS = 1 << 22  # anchors above this size are compared less often, in proportion
_MEET_GRADIENT_STEPS = 16  # members that come are let in this often when gradients are sent
_NOTHING = torch.zeros(0)


@dataclass(frozen=True)
class Timing:
    """Where a member's time went beside its compute, in seconds of its link's clock.

    wait_s    stood still for a round's result: communication that was not hidden
    encode_s  stood still while its own encoding, decoding and merging ran
    apply_s   gathered and wrote parameters, took outer steps
    hidden_s  rounds that ran beside the compute; part of no other figure
    """

    wait_s: float = 0.0
    encode_s: float = 0.0
    apply_s: float = 0.0
    hidden_s: float = 0.0

    def __add__(self, other: Timing) -> Timing:
        return Timing(
            self.wait_s + other.wait_s,
            self.encode_s + other.encode_s,
            self.apply_s + other.apply_s,
            self.hidden_s + other.hidden_s,
        )


def synchronize(
    model: nn.Module,
    optimizer: Optimizers,
    method: Method | Phases,
    link: Link,
    *,
    seed: int = 0,
    scaler: torch.amp.GradScaler | None = None,
    observer: Callable[[Outcome], None] | None = None,
) -> Synchronizer:
    """Keep a model in step with the other members'. Use it as a context manager.

    model      any module; its trainable parameters are synchronised, tied ones once, frozen ones not. Persistent
               buffers become the members' mean (integers: the maximum) with every round of fragment 0
    optimizer  any torch optimizer over parameters of the model, or several over disjoint ones
    link       of `join`; with `join(across=..., within=...)` the model is one of an island: FSDP2's, DDP's, or with
               ZeroRedundancyOptimizer. Each member then sends its part of it, and all of the island's call what waits
    seed       of shared randomness (random pairs, stochastic rounding); the same on all members
    scaler     the GradScaler, if there is one
    observer   called with the outcome of every round
    raises     ConfigError if members differ in model, initial weights, method, seed or version
    """
    return Synchronizer(model, optimizer, method, link, seed=seed, scaler=scaler, observer=observer)


class Synchronizer:
    """See `synchronize`. `step` counts the optimizer's steps; `timing` says where time went."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizers,
        method: Method | Phases,
        link: Link,
        *,
        seed: int,
        scaler: torch.amp.GradScaler | None,
        observer: Callable[[Outcome], None] | None,
    ) -> None:
        resharder(model)()
        self._inner = Inner(model, optimizer, method, scaler)
        if link.rank == link.members[0]:
            for phase in (method.first, method.then) if isinstance(method, Phases) else (method,):
                stability.warn(phase, len(link.members))
        inner = within(link)
        self._island = None if inner is None else Island(inner)
        self._share = None if inner is None else Share(inner.rank, len(inner.members), Island(inner).gather)
        _check_island(model, method, self._island)
        self._shards = "" if inner is None else _shards(model, inner)
        self.step = 0
        self.committed = 0
        self.skipped = 0
        self.timing = Timing()
        self._model, self._link = model, link
        self._plan, self._seed, self._observer = method, seed, observer
        self._buffers = Buffers(model)
        self._terms = Terms(0, seed)
        self._samples = 0
        self._counts_samples = False
        self._gradients_are_combined = False
        self._all_overflown = False
        self._made = 0
        self._resumed = False
        self._clock = Clock(link.now)
        self._under_way: list[tuple[UnderWay, Handle[BufferRows] | None]] = []
        self._hooks: list[Any] = []
        self._group = Regrouping(link, self) if isinstance(link, ElasticLink) else None
        self._redo: dict[int, int] = {}
        self._met = self._void = self._ended = False
        self._enter_phase(method.at(1))

    # --- life ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Synchronizer:
        if self._group is None:
            self._agree_within({})
            self._terms = Terms(agree(self._link, self._facts()), self._seed)
        else:
            self._regroup(None)
            self._met = self._ended = False  # in a round that the others did again: they meet after the next one
        for optimizer in self._inner.all:
            self._hooks.append(optimizer.register_step_pre_hook(self._before_step))
            self._hooks.append(optimizer.register_step_post_hook(self._after_step))
        if self._inner.scaler is not None:
            self._inner.scaler.step = self._scaled_step  # type: ignore[method-assign]
        self._clock.resume()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._inner.check_between_steps(self.step + 1)
                self.finish()
        finally:
            for hook in self._hooks:
                hook.remove()
            if self._inner.scaler is not None and "step" in vars(self._inner.scaler):
                del self._inner.scaler.step
            self._hooks = []

    def finish(self) -> None:
        """Wait for the rounds under way and apply them now; all members call it at the same step."""
        unsettled = bool(self._under_way)
        if self._method.payload.kind == "gradient":
            unsettled = bool(self._made) and self.step % _MEET_GRADIENT_STEPS > 0
        self._carry_out((), due=None)
        if self._group is not None and unsettled and not self._met:
            self._regroup(None)  # whoever is in doubt about the last round can still ask
        self._met = False

    def _facts(self) -> dict[str, str]:
        answers = {f"method.{name}": answer for name, answer in self._plan.answers().items()}
        facts = {"version": __version__, "model": self._fragments.schema(), "seed": str(self._seed)}
        if not self._resumed:  # else anchors were compared, and every member has weights of its own
            facts["weights"] = digest(*self._model.parameters(), *self._buffers.persistent()).hex()
        if self._method.payload.kind == "gradient":  # members take the same steps; after deltas each takes its own
            facts["optimizer"] = self._inner.settings()
        if self._island is not None:
            facts["shards"] = self._shards
        return facts | answers

    def _agree_within(self, facts: Mapping[str, str]) -> None:
        """Members of an island mean the same method, and hold the same of what is not sharded."""
        if self._island is not None:
            if not self._island.all_of(self._holds_of_all()):
                raise ConfigError(
                    f"a fragment of which one of {len(self._island.link.members)} members of the island holds nothing",
                    expected="rows of some parameter on every member, for every fragment",
                    mend="use fewer fragments, or smaller islands",
                )
            whole = [p for p in self._model.parameters() if not is_dtensor(p)]
            told = {f"method.{name}": answer for name, answer in self._plan.answers().items()}
            own = {"version": __version__, "weights": digest(*whole).hex(), "seed": str(self._seed)}
            agree(self._island.link, {**own, **told, **facts})

    def _holds_of_all(self) -> bool:
        plan = self._plan
        methods = (plan.first, plan.then) if isinstance(plan, Phases) else (plan,)
        counts = {method.payload.fragments for method in methods}
        return all(min(Fragments(self._model, count, self._share).sizes) > 0 for count in counts)

    def _enter_phase(self, method: Method) -> None:
        """Begin a method with fresh state; the parameters are its anchor, equal on all members but after gossip."""
        self._method = method
        plan = self._plan
        self._apart = isinstance(plan, Phases) and method is plan.then and not plan.first.consensus
        self._fragments = Fragments(self._model, method.payload.fragments, self._share)
        anchored = method.payload.kind != "gradient"
        self._states = [
            FragmentState(self._fragments.gather(f) if anchored else torch.zeros(0))
            for f in range(self._fragments.count)
        ]
        self._counted = [(self._made, self._samples)] * self._fragments.count
        self._last: list[tuple[tuple[int, ...], str]] = [((), "")] * self._fragments.count
        self._pacer = method.schedule.pacer if isinstance(method.schedule, Paced) else None
        self._pacing = Pacing(Pace(method.schedule.period), since=self.step)
        self._asked: Handle[dict[int, Told]] | None = None
        self._how = [method.codec.fit(self._fragments.shapes(f)) for f in range(self._fragments.count)]
        method.outer.check_names(tuple(name for f in range(self._fragments.count) for name in self._fragments.names(f)))
        self._outers = [
            method.outer.fit(self._fragments.names(f), self._fragments.lengths(f)) for f in range(self._fragments.count)
        ]

    # --- what a loop may call ------------------------------------------------------------------------------------

    def count(self, samples: int) -> None:
        """Samples of the batch just seen; they weigh this member's contributions. Without it, local steps do."""
        self._samples += samples
        self._counts_samples = True

    def combine_gradients(self) -> None:
        """Combine gradients now rather than in optimizer.step(); nothing for methods that do not send gradients."""
        if self._method_ahead().payload.kind == "gradient" and not self._gradients_are_combined:
            self._inner.unscale()
            self._exchange_gradients()
            self._gradients_are_combined = True

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip the gradient that the step will use, and return its norm from before; a scaler's scale is taken out.

        The norm is the whole model's, also where it is sharded: then all members of the island call it.
        """
        self._inner.unscale()
        self.combine_gradients()
        return clip_grad_norm_(list(self._model.parameters()), max_norm)

    @property
    def common_step(self) -> int:
        """The newest step that all members have passed alike: `step`, or if paced the one the last round began at."""
        return self.step if self._pacer is None else self._pacing.since

    @property
    def parts(self) -> int | None:
        """Micro-batches to make before the next optimizer step; None leaves it to the loop."""
        return self._pacing.pace.parts.get(self._link.rank)

    @property
    def has_consensus(self) -> bool:
        """Whether all members agree on one model with every round; without, each has its own (gossip)."""
        return self._method.consensus and all(map(self._is_common, self._states))

    def _is_common(self, state: FragmentState) -> bool:
        """Whether a fragment's anchor is all members' own: where gossip came before, from the first round on."""
        return state.committed > 0 or not self._apart

    def consensus(self) -> list[Tensor]:
        """The model as all members have it, one float32 vector a fragment.

        Anchors if there are any, else the parameters. If every member has a model of its own (gossip), their mean:
        all members must call it then. Within an island, this member's part of each.
        """
        if not self.has_consensus:
            return [self._of_all(f).mean(dim=0).to(self._fragments.device) for f in range(self._fragments.count)]
        if self._method.payload.kind == "gradient":
            return [self._fragments.gather(f) for f in range(self._fragments.count)]
        return [state.anchor.clone() for state in self._states]

    def spread(self) -> float:
        """How far apart the members' models are, 0 if they are one; all members call it.

        sqrt(sum_i |theta_i - mean|^2 / sum_i |theta_i|^2)
        """
        apart = size = 0.0
        for f in range(self._fragments.count):
            rows = self._of_all(f).double()
            apart += float((rows - rows.mean(dim=0)).square().sum())
            size += float(rows.square().sum())
        return math.sqrt(apart / size) if size else 0.0

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within the block the model holds `consensus()`, which is what should be evaluated and shipped.

        Within an island all its members enter and leave it together.
        """
        live = [self._fragments.gather(f) for f in range(self._fragments.count)]
        self.take_consensus()
        try:
            yield
        finally:
            for f, vector in enumerate(live):
                self._fragments.scatter(f, vector)

    def take_consensus(self) -> None:
        """Leave the model holding `consensus()`, for good; local steps since the last round are given up."""
        for f, vector in enumerate(self.consensus()):
            self._fragments.scatter(f, vector)

    def _of_all(self, fragment: int) -> Tensor:
        """All members' parameters of a fragment, in order of rank.  float32 [members, n], on the CPU"""
        vector = self._fragments.gather(fragment)
        header = Header(sender=self._link.rank, context=self._terms.context)
        packet = Packet("fp32", vector.numel(), {"value": vector}, header)
        layout: Layout = {"value": (torch.float32, vector.numel())}
        found = gather_packets(
            self._link.open("consensus"), self._link.rank, self._link.members, packet, layout, "the consensus model"
        )
        return torch.stack([packet.fields["value"].cpu() for packet in found.values()])

    # --- state ---------------------------------------------------------------------------------------------------

    def state_dict(self, *, rescue: bool = False) -> dict[str, Any]:
        """Everything the method remembers; waits for rounds under way to arrive, without applying them.

        Save it beside the model's and the optimizer's: the three together resume to the bit.

        rescue  after a PeerLost: leave out rounds that will not arrive. What they carried goes with the next ones.
        """
        if not rescue:
            self._inner.check_between_steps(self.step + 1)
        under_way, states = [], list(self._states)
        for entry in sorted(self._under_way, key=_order):
            try:
                under_way.append(pack_under_way(*entry))
            except PeerLost:
                if not rescue:
                    raise
                if back_to_back(self._method.schedule):
                    states[entry[0].fragment] = owing(states[entry[0].fragment], entry[0])
        return {
            "answers": dict(self._plan.answers()),
            "rank": self._link.rank,
            "members": len(self._link.members),
            "shards": self._shards,
            "step": self.step,
            "epoch": 0 if self._group is None else self._group.epoch,
            "made": self._made,
            "pacing": pack_pacing(self._pacing, self._asked, rescue=rescue),
            "samples": self._samples,
            "counts_samples": self._counts_samples,
            "counted": [list(pair) for pair in self._counted],
            "committed": self.committed,
            "skipped": self.skipped,
            "fragments": [pack_state(state) for state in states],
            "layout": [list(self._fragments.names(f)) for f in range(self._fragments.count)],
            "kind": self._method.payload.kind,
            "outer": repr(self._method.outer),
            "consensus": self.has_consensus,
            "under_way": under_way,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; all members call it, and are compared. Load model and optimizer beside it.

        Call it before entering the block if the model holds this member's weights by then, else within the block.
        A state of another member, or of a group of another size, is taken without its error memories.
        """
        if state["answers"] != self._plan.answers():
            wrong = [name for name, answer in self._plan.answers().items() if state["answers"].get(name) != answer]
            raise ConfigError(
                f"the saved state is of another method: its {wrong[0]} is {state['answers'].get(wrong[0])}",
                expected=f"{wrong[0]} {self._plan.answers()[wrong[0]]}",
                mend="resume with the method of the checkpoint, or start anew from its weights",
            )
        if state.get("shards", "") != self._shards:
            raise ConfigError(
                f"the saved state is of {state.get('shards') or 'a whole model'}",
                expected=self._shards or "a state of a whole model",
                mend="give every member the state that it saved, on as many members an island, sharded as before",
            )
        self._resumed = True
        self.step = state["step"]
        if self._group is not None:
            self._group.epoch = state.get("epoch", 0)
        self._enter_phase(self._plan.at(max(1, self.step)))
        self._samples, self._counts_samples = state["samples"], state["counts_samples"]
        self._made = state["made"]
        self._pacing, self._asked = unpack_pacing(state["pacing"])
        self._counted = [(pair[0], pair[1]) for pair in state["counted"]]
        self.committed, self.skipped = state["committed"], state["skipped"]
        self._states = [unpack_state(saved, self._fragments.device) for saved in state["fragments"]]
        self._under_way = [unpack_under_way(saved, self._fragments.device) for saved in state["under_way"]]
        self._carry(what_is_ours(state, self._method, self._link))
        if self._island is not None and not self._island.all_of(self._asked is not None):
            self._asked = None  # lost with a member, by some parts of the island
        self._agree_within({"step": str(self.common_step), "state.committed": str(self.committed)})
        if not is_ours(state, self._link):
            self._states = [without_own(state) for state in self._states]
        context = agree(self._link, {**self._shared_facts(), "step": str(self.common_step)})
        self._terms = replace(self._terms, context=context)
        self._clock.resume()

    def _carry(self, change: Callable[[Carried], Carried]) -> None:
        """Change what is remembered, and what rounds under way will bring."""
        self._states = [replace(state, carried=change(state.carried)) for state in self._states]
        self._under_way = [(carrying(under_way, change), rows) for under_way, rows in self._under_way]

    def _shared_facts(self) -> dict[str, str]:
        """What all members must hold alike to go on together; who was lost in mid-round may be a round behind."""
        if not (self._method.topology.consensus and all(map(self._is_common, self._states))):
            return {}
        gradient = self._method.payload.kind == "gradient"
        facts = {}
        for f, state in enumerate(self._states):
            model = self._fragments.gather(f) if gradient else state.anchor
            memories = [state.memory, state.carried.shared]
            if not isinstance(self._method.topology, Islands):  # there, only leaders go through stages
                memories.append(state.carried.stages)
            memory = digest(model, *(value for held in memories for _, value in sorted(held.items())))
            facts[f"state.fragment {f}"] = f"{memory.hex()} before round {state.begun}"
        for under_way, _ in sorted(self._under_way, key=_order):
            update = under_way.result.wait().update
            told = "nothing" if update is None else digest(update).hex()
            facts[f"state.round under way of fragment {under_way.fragment}"] = f"{told} due at step {under_way.due}"
        return facts

    # --- a group that changes: what thinwire.regroup asks for --------------------------------------------------------

    def _regroup(self, broken: ThinwireError | None) -> tuple[int, ...]:
        """Meet the others, and go on with them; returns fragments whose rounds are to begin again."""
        assert self._group is not None
        settled = self._group.meet(broken)
        if settled is None:
            return ()
        self._met = True
        if self._method.payload.kind == "gradient":
            if settled.healed and broken is not None:
                self._void = True  # the step under way is of a model that is no more
                for optimizer in self._inner.all:
                    optimizer.zero_grad(set_to_none=True)
            return tuple(f for f, number in self._redo.items() if number == self._states[f].begun)
        if broken is None:
            self._carry_out([(fragment, self.step) for fragment in settled.redo], self.step)
        return settled.redo

    def word(self, epoch: int, founds: bool) -> Word:
        """See thinwire.regroup.Keeper."""
        facts = self._facts()
        facts.pop("weights", None)
        places = []
        for f, state in enumerate(self._states):
            entry, (present, last) = self._last_of(f), self._last[f]
            word = FragmentWord(state.begun, present, last)
            if entry is not None:
                try:
                    combined = entry[0].result.wait()
                    word = FragmentWord(state.begun, combined.ranks, combined.digest.hex())
                except MENDABLE:
                    word = FragmentWord(entry[0].round, present, last, entry[0].doubt.digest.hex())
            places.append(word)
        model_step = self.step if self._method.payload.kind == "gradient" else 0
        return Word(facts, epoch, self.step, tuple(places), self._redo, model_step, self.has_consensus, founds)

    def conclude(self, certain: Mapping[int, tuple[int, ...]]) -> None:
        """See thinwire.regroup.Keeper."""
        self._asked = None
        arrived = []
        for under_way, rows in self._under_way:
            fragment = under_way.fragment
            if fragment in certain:
                assert under_way.doubt.end is not None
                arrived.append((replace(under_way, result=Arrived(under_way.doubt.end(certain[fragment]))), rows))
                continue
            try:
                under_way.result.wait()
                arrived.append((under_way, rows))
            except MENDABLE:
                state = replace(self._states[fragment], begun=under_way.round)
                self._states[fragment] = owing(state, under_way) if back_to_back(self._method.schedule) else state
        self._under_way = [(under_way, _heard(rows)) for under_way, rows in arrived]
        for entry in sorted(self._under_way, key=_order):
            self._finish(entry)

    def common_digest(self) -> str:
        """See thinwire.regroup.Keeper."""
        return json.dumps(self._shared_facts(), sort_keys=True)

    def common(self, step: int) -> State:
        """See thinwire.regroup.Keeper."""
        values = self._values() if self.has_consensus else []
        trained = {id(p) for p in self._model.parameters() if p.requires_grad}
        frozen = {name: p.detach() for name, p in self._model.named_parameters() if id(p) not in trained}
        return {"step": step, "values": values, "frozen": frozen}

    def _values(self) -> list[State]:
        """The model and what is remembered of it alike, by fragment."""
        gradient, values = self._method.payload.kind == "gradient", list[State]()
        for f, state in enumerate(self._states):
            packed = pack_state(without_own(replace(state, owed=_NOTHING, idle={})))
            packed["carried"] |= {"own": {}, "dropped": {}}
            values.append({"state": packed, "model": self._fragments.gather(f) if gradient else _NOTHING})
        return values

    def lent(self) -> State:
        """See thinwire.regroup.Keeper."""
        return {
            "values": [] if self.has_consensus else self._values(),
            "buffers": dict(self._model.named_buffers()),
            "inner": self._inner.state(),
            "rounds": [self.committed, self.skipped],
        }

    def take(self, common: State, lent: State) -> None:
        """See thinwire.regroup.Keeper."""
        self.step = common["step"]
        named = dict(self._model.named_parameters()) | dict(self._model.named_buffers())
        with torch.no_grad():
            for name, value in {**common["frozen"], **lent["buffers"]}.items():
                named[name].copy_(value)
        self._under_way, self._asked = [], None
        self._enter_phase(self._plan.at(max(1, self.step)))
        for f, value in enumerate(common["values"] or lent["values"]):
            state = self._states[f] = unpack_state(value["state"], self._fragments.device)
            model = value["model"].to(self._fragments.device)
            self._fragments.scatter(f, model if model.numel() else state.anchor)
        self._inner.take(lent["inner"])
        self.committed, self.skipped = lent["rounds"]

    def go_on(self, settled: Settled) -> None:
        """See thinwire.regroup.Keeper."""
        self.step = settled.step
        self._terms = Terms(settled.context, self._seed)
        self._pacing = Pacing(Pace(self._method.schedule.period), since=self.step)
        self._states = [replace(s, begun=n) for s, n in zip(self._states, settled.ended, strict=True)]
        if not settled.same:
            method = self._method
            forgotten = {"dropped"} | ({"own", "shared"} if method.feedback and method.feedback.tracks else set())
            forgotten |= {"stages"} if isinstance(method.topology, Islands) else set()
            self._carry(lambda carried: replace(carried, **{name: {} for name in forgotten}))
            self._states = [replace(state, idle={}) for state in self._states]
        self._clock.resume()

    # --- hooks ---------------------------------------------------------------------------------------------------

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inner.check_turn(optimizer, self.step + 1)
        if self._method_ahead().payload.kind == "gradient":
            closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
            if closure is not None:
                raise ConfigError(
                    f"{type(optimizer).__name__}.step was given a closure: it computes gradients inside the step",
                    expected="gradients that are there before the step, for a method that sends gradients",
                    mend="use a method that sends deltas (diloco, local_sgd), or an optimizer without a closure",
                )
            self.combine_gradients()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._count_step(optimizer)

    def _count_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._inner.count(optimizer):
            if self._void:
                self._void = self._met = self._gradients_are_combined = False
            else:
                self._tick()

    def _scaled_step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """GradScaler.step that keeps members together: a member with overflown gradients abstains, and none waits.

        Gradients: the combined gradient is finite, so all take the step, unless all have overflown: then none does.
        Deltas: a step that the scaler skips counts as a local step all the same.
        """
        inner = self._inner
        if all(optimizer is not each for each in inner.all):
            return inner.plain_step(optimizer, *args, **kwargs)
        inner.check_turn(optimizer, self.step + 1)
        if self._method_ahead().payload.kind != "gradient":
            before = (self.step, inner.stepped)
            result = inner.plain_step(optimizer, *args, **kwargs)
            if (self.step, inner.stepped) == before:
                self._count_step(optimizer)
            return result
        self.combine_gradients()
        if self._all_overflown or self._void:
            self._count_step(optimizer)
            return None
        return optimizer.step(*args, **kwargs)

    # --- the order of things -------------------------------------------------------------------------------------

    def _method_ahead(self) -> Method:
        """The method of the step about to be taken; a change of phase takes effect here."""
        ahead = self._plan.at(self.step + 1)
        if ahead is not self._method:
            self._enter_phase(ahead)
        return ahead

    def _exchange_gradients(self) -> None:
        self._all_overflown = False
        for _ in range(self.parts or 1):
            self._link.local_step()
        self._clock.pause()
        begins = self._method.schedule.begins(self.step + 1, self._fragments.count)
        self._carry_out([(fragment, self.step + 1) for fragment in begins], due=None)

    def _carry_out(self, begins: Sequence[tuple[int, int]], due: int | None) -> None:
        """Begin rounds, (fragment, step) each, and finish all that are due by a step, or all.

        In a group that changes: again among those who are left, if a member is lost in one of them.
        """
        while True:
            self._redo = {fragment: self._states[fragment].begun for fragment, _ in begins}
            try:
                for fragment, step in begins:
                    self._begin(fragment, step)
                for entry in sorted(self._under_way, key=_order):
                    if due is None or entry[0].due <= due:
                        self._finish(entry)
                return
            except MENDABLE as error:
                if self._group is None:
                    raise
                redo = self._regroup(error)
            if self._void:
                return
            ahead = self.step + 1 if self._method.payload.kind == "gradient" else self.step
            begins, due = [(fragment, ahead) for fragment in redo], None if due is None else self.step

    def _tick(self) -> None:
        """A local step was made: begin the rounds that are due, then apply those that are."""
        method = self._method_ahead()
        before, self.step = self.step, self._step_after()
        self._made += 1
        self._gradients_are_combined = False
        if method.payload.kind != "gradient":
            self._link.local_step()
            self._clock.pause()
            self._correct_local_step()
            begins = [(f, step) for step in range(before + 1, self.step + 1) for f in self._beginning(step)]
            self._carry_out(begins if self._pacer is None else begins[:1], self.step)
        self._meet_if_due()
        if self._pacing.local == 0:
            self._pacing = self._pacing.adopted()
        self._clock.resume()

    def _meet_if_due(self) -> None:
        """In a group that changes: look who is there, after a round of fragment 0 or every few steps of gradients."""
        due, self._ended = self._ended and not self._met, False
        if self._method.payload.kind == "gradient":
            due = self.step % _MEET_GRADIENT_STEPS == 0
        if self._group is not None and due:
            self._regroup(None)
        self._met = False

    def _step_after(self) -> int:
        """The shared step that this local step ends at: those of a slower member count for several."""
        if self._pacer is None or self._method.payload.kind == "gradient":
            return self.step + 1
        self._pacing = self._pacing.moved()
        return self._pacing.step(self._link.rank)

    def _beginning(self, step: int) -> tuple[int, ...]:
        """Fragments whose round begins after a shared step."""
        if self._pacer is None:
            return self._method.schedule.begins(step, self._fragments.count)
        return (0,) if step >= self._pacing.since + self._pacing.pace.steps else ()

    def _correct_local_step(self) -> None:
        """Add to the parameters what feedback says that local steps drift by (client and server corrections)."""
        feedback = self._method.feedback
        if feedback is None:
            return
        for fragment, state in enumerate(self._states):
            drift = feedback.drift(state.carried.own, state.carried.shared)
            if drift is not None:
                live = self._fragments.gather(fragment)
                self._fragments.scatter(fragment, live.add_(drift, alpha=1 / self._method.schedule.period))

    def _begin(self, fragment: int, step: int) -> None:
        started = self._link.now()
        method = self._method
        live, x = self._selected(fragment)
        if back_to_back(method.schedule):
            paused = self._link.now()
            x = self._turn(fragment, live, x)
            live = self._fragments.gather(fragment)
            started += self._link.now() - paused  # counted there
        state = self._states[fragment]
        if self._group is not None and method.payload.kind != "gradient" and self._is_idle(fragment, self._made):
            x = torch.full_like(x, math.nan)  # not a step to tell of: the mean is the others'
        says = self._group.link.says() if self._group is not None and fragment == 0 else None
        under_way, self._states[fragment] = rounds.begin(
            method, self._terms, self._link, fragment, step, live, x, self._weight(fragment), state,
            how=self._how[fragment], shared=self._shared(fragment, state), counted=(self._made, self._samples),
            island=self._island, says=says,
        )  # fmt: skip
        if self._pacer is not None:
            self._tell(step, x, under_way.round)
        rows = self._exchange_buffers(under_way.round) if fragment == 0 and self._buffers else None
        self._under_way.append((under_way, rows))
        self.timing += Timing(apply_s=self._link.now() - started)

    def _is_idle(self, fragment: int, made: int) -> bool:
        """Whether this member has made no local step since the last round that counted."""
        return made == self._counted[fragment][0]

    def _selected(self, fragment: int) -> tuple[Tensor, Tensor]:
        """Gradients or parameters, and what of them is to be sent.  both [n]"""
        method, state = self._method, self._states[fragment]
        if method.payload.kind == "gradient":
            live = self._fragments.gather_gradients(fragment)
            if method.payload.in_steps:
                live.mul_(self._rates(fragment))
            return live, method.payload.select(live, state.anchor)
        live = self._fragments.gather(fragment)
        entry = self._last_of(fragment) if back_to_back(method.schedule) else None
        start = self._fragments.rounded(fragment, state.anchor) if entry is None else entry[0].live
        x = method.payload.select(live, start)
        return live, x + state.owed if state.owed.numel() else x

    def _last_of(self, fragment: int) -> tuple[UnderWay, Handle[BufferRows] | None] | None:
        """The fragment's round that is under way."""
        return next((entry for entry in self._under_way if entry[0].fragment == fragment), None)

    def _turn(self, fragment: int, live: Tensor, x: Tensor) -> Tensor:
        """End the fragment's last round as its next one begins, and set the parameters to where local steps go on from.

        returns  [n] what the next round sends: x, and what the last one was to send if it had no effect
        """
        entry = self._last_of(fragment)
        if entry is None:
            self._merge(fragment, Mine(live, live, fresh=x, members=len(self._link.members)))
        else:
            x = self._finish(entry, x)
        if self._is_finite(x):  # else this member sends nothing, and owes what it did
            self._states[fragment] = replace(self._states[fragment], owed=x.new_zeros(0))
        return x

    def _exchange_buffers(self, number: int) -> Handle[BufferRows]:
        route = rounds.route_of(self._method, self._terms, self._link, 0, number)
        ranks = rounds.witnesses(self._method, self._link, route)
        header = Header(round=number, sender=self._link.rank, context=self._terms.context)
        to = route.to if isinstance(route, Neighbours) else None
        return self._buffers.exchange(self._link, ranks, header, to=to)

    def _tell(self, step: int, x: Tensor, number: int) -> None:
        """Tell all members what the pace to come depends on."""
        pacing, before = self._pacing, self._counted[0]
        mine = Told(self._clock.median(), float(self._samples - before[1]), self._inner.lr, *pacing.last)
        header = Header(round=number, sender=self._link.rank, context=self._terms.context)
        self._asked = rounds.tell(self._link, mine, header)
        self._pacing = replace(pacing, since=step, local=0, size2=float(x.square().sum()))

    def _decide(self, pacer: Pacer, combined: Combined, took_part: bool) -> None:
        """A round has ended: take in what all have told with it."""
        if self._asked is None:  # what was told was lost with a member, and the run went on from there
            return
        told, self._asked = self._asked.wait(), None
        if self._island is not None:
            told = self._island.told(told)
        update2 = 0.0 if combined.update is None else float(combined.update.square().sum())
        last = (combined.job_s, self._pacing.size2 if took_part else -1.0, update2)
        self._pacing = replace(self._pacing, last=last, decided=pacer.decide(self._pacing.pace, told))

    def _weight(self, fragment: int) -> float:
        last_step, last_samples = self._counted[fragment]
        return float(self._samples - last_samples if self._counts_samples else self._made - last_step)

    def _shared(self, fragment: int, state: FragmentState) -> Tensor | None:
        """What the verdict compares beside the result, if it is this round's turn."""
        if not self._method.topology.consensus or not self._is_common(state) or len(self._link.members) == 1:
            return None
        gradient = self._method.payload.kind == "gradient"
        every = max(_COMPARE_GRADIENT_STEPS if gradient else 1, self._fragments.sizes[fragment] // _COMPARE_ELEMENTS)
        if state.begun % every:
            return None
        return self._fragments.gather(fragment) if gradient else state.anchor

    def _finish(self, entry: tuple[UnderWay, Handle[BufferRows] | None], fresh: Tensor = _NOTHING) -> Tensor:
        """Take a round's result in.

        fresh    [n] what the fragment's next round sends, if that begins now; else empty
        returns  the same, and what this round was to send if it had no effect
        """
        under_way, rows = entry
        fragment, before = under_way.fragment, self._link.now()
        combined = under_way.result.wait()
        buffers = None if rows is None else rows.wait()
        arrived = self._link.now()
        self._under_way.remove(entry)
        route = rounds.route_of(self._method, self._terms, self._link, fragment, under_way.round)
        witnesses = rounds.witnesses(self._method, self._link, route)
        due = tuple(rank for rank in witnesses if rank not in combined.damaged)
        state, outcome = rounds.finish(
            self._outers[fragment], under_way, combined, self.step, self._states[fragment], due, self._inner.lr
        )
        self._states[fragment] = state
        self._last[fragment] = combined.ranks, combined.digest.hex()
        self._ended |= fragment == 0
        if isinstance(outcome, Skipped):
            self._on_skipped(outcome, state)
            fresh = self._owe(under_way, fresh)
        else:
            was_idle = self._group is not None and self._is_idle(fragment, under_way.counted[0])
            self._counted[fragment] = under_way.counted
            self._apply(under_way, combined, outcome, fresh, was_idle)
            if buffers is not None:
                self._buffers.scatter(*average(buffers, shares(route, self._link.rank, outcome.ranks)))
            self._on_committed(outcome, state, due)
            if self._group is not None:
                self._group.worked()
                self._group.link.hear(outcome, under_way.said)
        if self._pacer is not None:
            self._decide(self._pacer, combined, took_part=self._link.rank in combined.ranks)
        waited = arrived - before
        encoded = min(waited, combined.encode_s)
        self.timing += Timing(
            wait_s=waited - encoded,
            encode_s=encoded,
            apply_s=self._link.now() - arrived,
            hidden_s=max(0.0, combined.job_s - waited),
        )
        if self._observer is not None:
            self._observer(outcome)
        return fresh

    def _owe(self, under_way: UnderWay, fresh: Tensor) -> Tensor:
        """A round had no effect. Unless parameters still hold what it was to send, the next one sends it too."""
        fragment, state = under_way.fragment, self._states[under_way.fragment]
        if not back_to_back(self._method.schedule):
            return fresh
        if not fresh.numel():
            self._states[fragment] = owing(state, under_way)
            return fresh
        if self._is_finite(under_way.x):
            if self._is_finite(fresh):
                fresh = fresh + under_way.x
            else:  # then it waits for a round that this member has something to say in
                self._states[fragment] = replace(state, owed=under_way.x)
        live = self._fragments.gather(fragment)
        self._merge(fragment, Mine(live, under_way.live, fresh=fresh, members=len(self._link.members)))
        return fresh

    def _merge(self, fragment: int, mine: Mine) -> None:
        """Set the live parameters to what the outer step makes of them."""
        state, outer = self._states[fragment], self._outers[fragment]
        merged, own = outer.merge(mine, state.anchor, state.own, Now(state.committed, self._inner.lr))
        if not mine.fresh.numel() and back_to_back(self._method.schedule):  # nothing begins: local steps stay
            merged = merged + (mine.live - mine.sent)
        if back_to_back(self._method.schedule) and not self._is_finite(mine.fresh, merged):
            self._start_over(fragment)
            return
        self._fragments.scatter(fragment, merged)
        self._states[fragment] = replace(state, own=own)
        if outer.restarts:
            self._forget(fragment)

    def _is_finite(self, *vectors: Tensor) -> bool:
        """Whether they are, on all members of an island."""
        healthy = all(finite(vector) for vector in vectors)
        return healthy if self._island is None else self._island.all_of(healthy)

    def _start_over(self, fragment: int) -> None:
        """Take the common model with a fresh inner state: this member's own values are not finite."""
        state = self._states[fragment]
        self._fragments.scatter(fragment, state.anchor)
        self._states[fragment] = replace(state, own={})
        self._forget(fragment)

    def _forget(self, fragment: int) -> None:
        """Inner optimizers begin anew with a fragment's parameters."""
        self._inner.forget(self._fragments.names(fragment))

    def _apply(
        self, under_way: UnderWay, combined: Combined, outcome: Committed, fresh: Tensor, was_idle: bool
    ) -> None:
        """Write the result into the model: gradients before a step, parameters after it."""
        fragment = under_way.fragment
        assert combined.update is not None
        if self._method.payload.kind == "gradient":
            if self._method.payload.in_steps:
                rates = self._rates(fragment)
                self._fragments.scatter_gradients(fragment, (combined.update / rates).masked_fill_(rates == 0, 0.0))
            elif self._fragments.is_shared or combined.update.data_ptr() != under_way.live.data_ptr():
                # else nobody's but its own came back
                self._fragments.scatter_gradients(fragment, combined.update)
        elif self._link.rank in outcome.ranks or back_to_back(self._method.schedule):
            live, members = self._fragments.gather(fragment), len(outcome.ranks)
            mine = Mine(live, under_way.live, combined.update, combined.counted, fresh, members)
            self._merge(fragment, mine)
        elif was_idle:
            self._fragments.scatter(fragment, self._states[fragment].anchor)
        else:
            self._start_over(fragment)

    def _rates(self, fragment: int) -> Tensor:
        """Learning rates of a fragment's parameters, 1 for those that the optimizer lacks.  [n], or [] if all alike"""
        rates = self._inner.rates(self._fragments.names(fragment))
        if len(set(rates)) == 1:
            return torch.tensor(rates[0], device=self._fragments.device)
        return self._fragments.spread(fragment, rates)

    @property
    def _scales_gradients(self) -> bool:
        return self._inner.scales and self._method.payload.kind == "gradient"

    def _on_committed(self, outcome: Committed, state: FragmentState, due: tuple[int, ...]) -> None:
        self.committed += 1
        patience = _PATIENCE_SCALED if self._scales_gradients else _PATIENCE_ROUNDS
        for rank in sorted(set(due) - set(outcome.ranks)):
            if self._group is not None and state.idle[rank] == 1:
                _log.info("round %d: %s had nothing to say", outcome.round, self._group.link.names[rank])
                continue
            _log.warning("round %d: member %d had no finite values and was left out", outcome.round, rank)
            if state.idle[rank] >= patience:
                raise DivergedError(
                    f"member {rank} had no finite values in {state.idle[rank]} rounds in a row, "
                    f"the last at step {self.step}",
                    expected="finite parameters and gradients",
                    mend="lower its learning rate, clip its gradients, or look at its data",
                )

    def _on_skipped(self, outcome: Skipped, state: FragmentState) -> None:
        self.skipped += 1
        where = f"round {outcome.round}, fragment {outcome.fragment} at step {outcome.step}"
        if outcome.reason in (NOBODY_FINITE, OVERFLOW):
            if state.idle[self._link.rank] >= self._patience_with_all():
                raise DivergedError(
                    f"{where}: {outcome.reason}",
                    expected="finite values on at least one member",
                    mend="resume from the last checkpoint with a lower learning rate or with clipping",
                )
            self._all_overflown = self._scales_gradients
        elif self._method.payload.kind == "gradient" and outcome.reason == NO_SAMPLES:
            raise ConfigError(
                f"{where}: {outcome.reason}",
                expected="samples on at least one member, for a rule that weighs by them",
                mend="call sync.count(samples) before the optimizer's step",
            )
        elif self._method.payload.kind == "gradient":
            raise LinkError(
                f"{where}: {outcome.reason}",
                expected="all members' gradients",
                mend="look for a faulty network card or memory on the member named; resume from the last checkpoint",
            )
        _log.warning("%s was skipped (%s); its local steps go with the next round", where, outcome.reason)

    def _patience_with_all(self) -> int:
        """How often in a row nobody may have finite values: a scale is being looked for, or a partner will help."""
        if self._scales_gradients:
            return _PATIENCE_SCALED
        gradient = self._method.payload.kind == "gradient"
        return 1 if gradient or self._method.topology.consensus else _PATIENCE_ROUNDS


def _heard(rows: Handle[BufferRows] | None) -> Handle[BufferRows] | None:
    """What was said of buffers, if all of it came."""
    if rows is None:
        return None
    try:
        return Arrived(rows.wait())
    except MENDABLE:
        return None


def _order(entry: tuple[UnderWay, Handle[BufferRows] | None]) -> tuple[int, int]:
    return entry[0].due, entry[0].fragment


def _check_island(model: nn.Module, plan: Method | Phases, island: Island | None) -> None:
    """A model that several processes have only together, or keep alike, wants to know them."""
    sharded = any(is_dtensor(p) for p in model.parameters())
    replicated = any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules())
    if island is None and (sharded or replicated):
        told = "has parameters sharded over processes" if sharded else "is averaged over processes in every step (DDP)"
        raise ConfigError(
            f"this {type(model).__name__} {told}, and the link knows no island of them",
            expected="a link that knows who holds the model with this member: they leave out a round together",
            mend='mesh = init_device_mesh("cpu", (islands, members), mesh_dim_names=("across", "within")), then '
            'thinwire.join(across=mesh["across"], within=mesh["within"])',
        )
    for method in (plan.first, plan.then) if isinstance(plan, Phases) else (plan,):
        if island is not None and method.aggregator.needs == "rows":
            raise ConfigError(
                f"aggregator {method.aggregator!r} within an island: each part of the model would choose for itself",
                expected="a rule that goes by coordinates, whose choice on a part is that on the whole",
                mend="use Mean(), Median() or TrimmedMean(...) with islands",
            )


def _shards(model: nn.Module, inner: Link) -> str:
    """Which part of its island's model a member has, in words."""
    place = f"part {inner.rank + 1} of {len(inner.members)} of an island's model"
    found = layout(model)
    return f"{place} ({found})" if found else place
