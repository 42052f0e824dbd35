"""What a synchronizer keeps of a run, and how that is read, saved, restored and handed on.

The anchor of each fragment with what the method remembers of it, rounds under way, and counts of steps and samples.
Everything here is between steps; what happens in one is in synchronizer.py.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from thinwire.buffers import BufferRows, Buffers
from thinwire.collectives import Carried, gather_packets
from thinwire.elastic.handing import State
from thinwire.elastic.link import ElasticLink
from thinwire.elastic.settle import FragmentWord, Word
from thinwire.errors import ConfigError, PeerLost
from thinwire.fragments import Fragments, digest
from thinwire.handshake import agree
from thinwire.inner import Inner, Optimizers
from thinwire.island import Island
from thinwire.links.base import Handle, Link
from thinwire.links.islands import within
from thinwire.method import Method, Phases
from thinwire.pace import Clock, Pace, Pacing, Told
from thinwire.packet import Header, Layout, Packet
from thinwire.regroup import MENDABLE, Regrouping, Settled
from thinwire.rounds import FragmentState, Terms, UnderWay
from thinwire.schedules import Paced, back_to_back
from thinwire.sharding import Share, is_dtensor, layout, resharder
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

NOTHING = torch.zeros(0)


class Kept(ABC):
    """A member's part of a run; see Synchronizer."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizers, method: Method | Phases, link: Link, *, seed: int,
        scaler: torch.amp.GradScaler | None,
    ) -> None:  # fmt: skip
        resharder(model)()
        self._inner = Inner(model, optimizer, method, scaler)
        inner = within(link)
        self._island = None if inner is None else Island(inner)
        self._share = None if inner is None else Share(inner.rank, len(inner.members), Island(inner).gather)
        _check_island(model, method, self._island)
        self._shards = "" if inner is None else _shards(model, inner)
        self.step = 0
        self.committed = 0
        self.skipped = 0
        self._model, self._link, self._plan, self._seed = model, link, method, seed
        self._buffers = Buffers(model)
        self._terms = Terms(0, seed)
        self._made = 0
        self._samples = 0
        self._counts_samples = False
        self._resumed = False
        self._clock = Clock(link.now)
        self._under_way: list[tuple[UnderWay, Handle[BufferRows] | None]] = []
        self._group = Regrouping(link, self) if isinstance(link, ElasticLink) else None
        self._redo: dict[int, int] = {}
        self._enter_phase(method.at(1))
        self._schema = self._fragments.schema()  # in whatever phase a member is by now, or a newcomer not yet

    @abstractmethod
    def _finish(self, entry: tuple[UnderWay, Handle[BufferRows] | None], fresh: Tensor = NOTHING) -> Tensor:
        """Take a round's result in; see Synchronizer."""

    # --- the group and the method --------------------------------------------------------------------------------

    def _facts(self) -> dict[str, str]:
        """What members of a fixed group must hold alike before the first round."""
        facts = self._meant()
        if not self._resumed:  # else anchors were compared, and every member has weights of its own
            facts["weights"] = digest(*self._model.parameters(), *self._buffers.persistent()).hex()
        if self._method.payload.kind == "gradient":  # members take the same steps; after deltas each takes its own
            facts["optimizer"] = self._inner.settings()
        if self._island is not None:
            facts["shards"] = self._shards
        return facts

    def _meant(self) -> dict[str, str]:
        """What members of any run must mean alike, whatever step they are at."""
        answers = {f"method.{name}": answer for name, answer in self._plan.answers().items()}
        return {"version": __version__, "model": self._schema, "seed": str(self._seed)} | answers

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

    # --- what a loop may ask -------------------------------------------------------------------------------------

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

    def _last_of(self, fragment: int) -> tuple[UnderWay, Handle[BufferRows] | None] | None:
        """The fragment's round that is under way."""
        return next((entry for entry in self._under_way if entry[0].fragment == fragment), None)

    # --- state ---------------------------------------------------------------------------------------------------

    def state_dict(self, *, rescue: bool = False) -> dict[str, Any]:
        """Everything the method remembers; waits for rounds under way to arrive, without applying them.

        Save it beside the model's and the optimizer's: the three together resume to the bit.

        rescue  after a PeerLost: leave out rounds that will not arrive. What they carried goes with the next ones.
        """
        if not rescue:
            self._inner.check_between_steps(self.step + 1)
        under_way, states = [], list(self._states)
        for entry in sorted(self._under_way, key=order):
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
        for under_way, _ in sorted(self._under_way, key=order):
            update = under_way.result.wait().update
            told = "nothing" if update is None else digest(update).hex()
            facts[f"state.round under way of fragment {under_way.fragment}"] = f"{told} due at step {under_way.due}"
        return facts

    # --- a group that changes: what thinwire.regroup asks for ----------------------------------------------------

    def word(self, epoch: int, founds: bool) -> Word:
        """See thinwire.regroup.Keeper."""
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
        gradient = self._method.payload.kind == "gradient"
        model_step = self.step if gradient else 0
        facts = self._meant() | ({"optimizer": self._inner.classes()} if gradient else {})
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
        for entry in sorted(self._under_way, key=order):
            self._finish(entry)

    def common_digest(self) -> str:
        """See thinwire.regroup.Keeper."""
        facts = self._shared_facts()
        if self._group is not None and self._group.epoch == 0 and not self._resumed:  # nothing was handed over yet
            facts["weights"] = digest(*self._model.parameters(), *self._buffers.persistent()).hex()
        return json.dumps(facts, sort_keys=True)

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
            packed = pack_state(without_own(replace(state, owed=NOTHING, idle={})))
            packed["carried"] |= {"own": {}, "dropped": {}}
            values.append({"state": packed, "model": self._fragments.gather(f) if gradient else NOTHING})
        return values

    def for_newcomers(self) -> State:
        """What a newcomer to a group that changes would be given now, of all that members hold alike.

        Asked for after a round, before the next step; it may share memory with the state: copy what is to stay.
        """
        if self._group is None:
            raise ConfigError(
                "what newcomers would be given, of a group that does not change",
                expected="an elastic link", mend="take part with thinwire.join_elastic, or ask for state_dict()",
            )  # fmt: skip
        return self._group.common()

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


def _heard(rows: Handle[BufferRows] | None) -> Handle[BufferRows] | None:
    """What was said of buffers, if all of it came."""
    if rows is None:
        return None
    try:
        return Arrived(rows.wait())
    except MENDABLE:
        return None


def order(entry: tuple[UnderWay, Handle[BufferRows] | None]) -> tuple[int, int]:
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
