"""The loop of a member among members that come and go: the sibling of loop.py, over a group that changes.

What differs: batches are units of the sample ledger, so that whoever is there, each is counted once; steps and learning
rates go by the common step, which a newcomer is given; nothing is decided by a roll call (a group that changes between
two of them would tear it): what members tell each other goes with the rounds.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from safetensors.torch import save_file
from torch import nn

from thinwire.config import Run, dump
from thinwire.elastic import beside
from thinwire.elastic.board import WITH_OTHERS, Board, Said
from thinwire.elastic.exhibit import Exhibit
from thinwire.elastic.journal import FOLDER, Journal
from thinwire.elastic.ledger import Book, Ledger, Runs, size
from thinwire.errors import ConfigError, ThinwireError
from thinwire.fragments import digest
from thinwire.links.base import Link
from thinwire.links.timings import Timings
from thinwire.method import Method, Phases
from thinwire.randomness import mix
from thinwire.report.record import Event, Point, RunRecord
from thinwire.rounds import Committed, Outcome, Skipped
from thinwire.synchronizer import Synchronizer, synchronize
from thinwire.train import checkpoint
from thinwire.train.display import Display
from thinwire.train.history import History, facts_of, record_of, totals
from thinwire.train.layerwise import Optimizers
from thinwire.train.rollcall import Status
from thinwire.train.steps import (
    consensus_tensors,
    device_of,
    keep,
    load_optimizers,
    local_step,
    random_state,
    set_random_state,
)
from thinwire.train.tasks import Batch, Task
from thinwire.train.watching import Watching
from thinwire.watch import Policy, Word

_log = logging.getLogger("thinwire")
_WATCH_STEPS = 8  # local steps between a member's words, at least
_NO_EPOCH = 1000  # units in an epoch of a task that does not say


class Group(Link, Protocol):
    """What the loop wants of an elastic link; see `thinwire.elastic.link`."""

    @property
    def name(self) -> str:
        """This member's."""

    @property
    def names(self) -> tuple[str, ...]:
        """Everybody's, in order of rank, as of now."""

    @property
    def timings(self) -> Timings | None:
        """Seconds a byte, if they are measured."""

    def carry(self, key: str, save: Callable[[], Mapping[str, Any]], load: Callable[[Mapping[str, Any]], None]) -> None:
        """Common state beside the model's."""

    def beside_rounds(
        self, tell: Callable[[], Sequence[int]], hear: Callable[[Committed, Mapping[int, tuple[int, ...]]], None]
    ) -> None:
        """Numbers that are heard if and only if the round commits."""

    def on_change(self, tell: Callable[[Any], None]) -> None:
        """After each settled change of the group."""


@dataclass(frozen=True)
class Stay:
    """How a member is in a run.

    out       folder of the run on this machine
    epochs    the run ends when so many are done; 0: by its steps alone
    at_least  members before the first step
    begun     the run has taken steps already: without somebody who holds its state this member must not begin anew
    resume    folder with checkpoints to go on from if nobody holds more; None: this member starts without
    fetched   what came of the state beside the run, before this member met the others
    isolate   a member that is found slow or damaged again and again leaves; the same on all members
    """

    out: Path
    epochs: int = 0
    at_least: int = 1
    begun: bool = False
    resume: Path | None = None
    fetched: beside.Beside = beside.NOTHING
    isolate: bool = False


def train_among(
    run: Run, task: Task, link: Group, stay: Stay, *, board: Board, journal: Journal, display: Display,
    stops: Callable[[], bool], exhibit: Exhibit | None = None,
) -> RunRecord | None:  # fmt: skip
    """Train this member until the run ends or it is asked to leave.

    task     as all members build it from the run
    link     a group that changes; the synchronizer meets the others over it
    stops    whether this member was asked to leave: it finishes its round, says goodbye and goes
    exhibit  where newcomers find the state after committed rounds; None: they are given all of it when they come
    returns  the record of the run as this member saw it; None if it left before the end
    raises   ConfigError for a method whose members do not share a model, or a run that has begun and nobody holds
    """
    plan = run.method.build()
    if not isinstance(plan, Method | Phases):
        raise ConfigError(
            f"method {run.method.name} among members that come and go",
            expected="a method of rounds; tuning by seeds has a way of its own",
            mend="take diloco or another method of `thinwire methods`; docs/elastic-tuning.md shows the other way",
        )
    torch.manual_seed(run.seed)
    device = device_of(run)
    model = task.model().to(device)
    optimizers = run.optimizer.build(model)
    own = int.from_bytes(hashlib.blake2b(link.name.encode(), digest_size=8).digest(), "little")
    torch.manual_seed(mix(run.seed, own) >> 1)  # from here on members may draw for themselves: dropout
    session = _Session(run, task, link, model, optimizers, stay, board, journal, display, stops, device, plan, exhibit)
    sync = synchronize(model, optimizers, plan, link, seed=run.seed, observer=session.observe)
    session.restore(sync)
    try:
        with sync:
            return session.go(sync)
    except _Left:  # the others are in the midst of local steps: nobody waits for anybody
        return None


def ledger_of(run: Run, task: Task, plan: Method | Phases, epochs: int) -> Ledger:
    """The ledger that a run begins with."""
    units = int(getattr(task, "units_per_epoch", _NO_EPOCH))  # a task of one's own need not know epochs
    schedule = (plan.then if isinstance(plan, Phases) else plan).schedule
    each = run.optimizer.accumulate
    return Ledger(
        units, block=schedule.period * each, end=epochs * units if epochs else None, reserve=schedule.overlap * each
    )


def _watch_every(plan: Method | Phases) -> int:
    """Rounds from one word to the next: of methods that exchange every step or two, not every one."""
    schedule = (plan.then if isinstance(plan, Phases) else plan).schedule
    return max(1, _WATCH_STEPS // schedule.period)


class _Left(Exception):
    """The member was asked to leave, and has finished its round."""


class _Session:
    """One member's stay."""

    def __init__(
        self, run: Run, task: Task, link: Group, model: nn.Module, optimizers: Optimizers, stay: Stay, board: Board,
        journal: Journal, display: Display, stops: Callable[[], bool], device: torch.device, plan: Method | Phases,
        exhibit: Exhibit | None = None,
    ) -> None:  # fmt: skip
        self.run, self.task, self.link, self.model, self.optimizers = run, task, link, model, optimizers
        self.stay, self.board, self.journal, self.display = stay, board, journal, display
        self.stops, self.device, self.exhibit = stops, device, exhibit
        self.book = Book(ledger_of(run, task, plan, stay.epochs), link.name)
        self.here = History()
        self.losses: list[torch.Tensor] = []
        self.mean_loss: float | None = None  # since the last round, as it was told
        self.worked_s = self.worked_units = 0.0  # since the last round
        self.leaves, self.leaves_for = False, "it was asked to"
        self.heard: dict[str, Any] | None = None  # a committed round that is not written down yet
        self.statuses: dict[int, Status] = {}
        self.evaluated_at = self.saved_at = 0
        self.final: dict[str, float] = {}
        self.watching = Watching(Policy(isolate=stay.isolate), _watch_every(plan), self.find)
        self.word = Word(0)
        self.start = link.now()
        link.carry("ledger", self.book.state_dict, self.book.load_state_dict)
        link.beside_rounds(self._tell, self._hear)
        link.on_change(self._changed)

    # --- the order of things -------------------------------------------------------------------------------------

    def go(self, sync: Synchronizer) -> RunRecord | None:
        self._refuse_another_genesis()
        self.evaluated_at = self.saved_at = sync.step
        seconds = self.link.now() - self.start
        self.journal.write(
            "joined", step=sync.step, seconds=seconds, bytes=self._received(), units_seen=self.book.ledger.units_done,
            units_per_epoch=self.book.ledger.units_per_epoch, beside_step=self.stay.fetched.step,
            beside_seconds=self.stay.fetched.seconds, beside_bytes=self.stay.fetched.bytes,
        )  # fmt: skip
        self.board.met(self.link.names)
        self.display.started(self.run, 0, sum(p.numel() for p in self.model.parameters()), sync.step)
        while not self._is_over():
            self._local_step()
            told = self.leaves
            self._after_step()
            if told and self.ended_round:
                self._leave()
        return self._end()

    def _is_over(self) -> bool:
        return self.sync.step >= self.run.steps or self.book.ledger.is_full

    def _refuse_another_genesis(self) -> None:
        if self.sync.step == 0 and self.stay.begun:
            raise ConfigError(
                "the run has begun, and nobody who is here holds its state",
                expected="a member that was in it, or a checkpoint",
                mend=f"go on from one: thinwire up --resume {self.stay.out}; to start anew, take another --out",
            )

    def _local_step(self) -> None:
        begun = self.link.now()
        self.board.phase("computing", self.sync.step)
        wanted = self.sync.parts or self.run.optimizer.accumulate
        units = [unit for _ in range(wanted) if (unit := self.book.take(self.link.names)) is not None]
        self.ended_round = False
        batches = self._batches(units, begun)
        loss = local_step(
            self.run, self.task, self.model, self.optimizers, self.sync, batches, parts=max(1, len(units)),
            device=self.device,
        )  # fmt: skip
        if units:
            self.losses.append(loss)

    def _batches(self, units: Sequence[int], begun: float) -> Any:
        """The units' batches, one by one; after the last one the step may take long, for it may be a round."""
        for unit in units:
            batch = self.task.batch(unit, 0, 1).to(self.device)
            self._count(batch)
            yield batch
        self.worked_s += self.link.now() - begun
        self.worked_units += len(units)
        self.board.phase(WITH_OTHERS, self.sync.step)

    def _count(self, batch: Batch) -> None:
        if not self.here.samples:
            self.board.tell(tokens_per_unit=batch.tokens, samples_per_unit=batch.samples)
        self.here.samples += batch.samples
        self.here.tokens += batch.tokens

    def _after_step(self) -> None:
        if self.heard is None:
            return
        self.ended_round = True
        heard, self.heard = self.heard, None
        common = self._digest()
        self.journal.write("round", **heard, digest=common)
        if self.exhibit is not None:
            self.exhibit.publish(self.sync.common_step, self.sync.for_newcomers)
        self._watch()
        step, run = self.sync.step, self.run
        self.display.progress(step, self.statuses)
        if run.eval_every and step // run.eval_every > self.evaluated_at // run.eval_every and step < run.steps:
            self._evaluate()
        if (
            run.checkpoint_every
            and step // run.checkpoint_every > self.saved_at // run.checkpoint_every
            and step < run.steps
        ):
            self._save()

    def _watch(self) -> None:
        self.watching.call(self.word)
        because = self.watching.isolates(self.link.name)
        if because and not self.leaves:
            self.leaves, self.leaves_for = True, because  # told with the next round
            self._note("isolated", because)

    def _leave(self) -> NoReturn:
        """The round is committed and the others have met: what follows is theirs."""
        self._save()
        self.journal.write("ended", step=self.sync.step, why=f"left: {self.leaves_for}")
        self.board.phase("ended", self.sync.step)
        self._note("left", "the others go on; join again to come back")
        raise _Left

    def _end(self) -> RunRecord:
        self.sync.finish()
        self._after_step()  # of a round that was under way
        self._evaluate()
        self._save()
        if self._is_first():
            tensors = consensus_tensors(self.model, self.sync)
            keep(self.stay.out, "model.safetensors", lambda path: save_file(tensors, path))
        why = "all units are done" if self.book.ledger.is_full else f"step {self.sync.step} was the last"
        self.board.tell(ended=why)
        self.board.phase("ended", self.sync.step)
        self.journal.write("ended", step=self.sync.step, why=why, epochs=self.book.ledger.epochs)
        whole = self._whole()
        told = {self.link.rank: facts_of(self.link.rank, self.sync, whole)}
        return record_of(self.run, self.link.rank, self.sync, self.model, whole, self.final, told)

    # --- what goes with the rounds -------------------------------------------------------------------------------

    def _tell(self) -> tuple[int, ...]:
        lease, used = self.book.tell(self.link.names)
        self.leaves = self.leaves or self.stops()
        if self.losses:
            mean = float(torch.stack(self.losses).mean())
            self.mean_loss = mean if math.isfinite(mean) else None
        sent, received = totals(self._whole())
        rate = self.worked_units / self.worked_s if self.worked_s else 0.0
        return Said(
            lease, used, self.leaves, self.mean_loss if self.losses else None, rate, sent, received, self.board.address
        ).numbers()

    def _hear(self, outcome: Committed, numbers: Mapping[int, tuple[int, ...]]) -> None:
        names, before = self.link.names, self.book.ledger.chain
        told = {rank: Said.of(numbers[rank]) for rank in sorted(numbers)}
        done = self.book.hear(names, numbers, outcome.ranks)
        ledger = self.book.ledger
        losses = [said.loss for said in told.values() if said.loss is not None]
        loss = sum(losses) / len(losses) if losses else None
        self.heard = {
            "step": outcome.step, "round": outcome.round, "names": [names[rank] for rank in outcome.ranks],
            "units": {name: [list(run) for run in done[name]] for name in done}, "loss": loss,
            "commits": ledger.commits, "before": before, "chain": ledger.chain, "epochs": ledger.epochs,
            "units_per_epoch": ledger.units_per_epoch,
        }  # fmt: skip
        self._show(outcome, names, told, done)
        step_s = self.worked_s / self.worked_units if self.worked_s and self.worked_units else None
        self.word = Word(round(self.worked_units), step_s, counted=self.link.rank in outcome.ranks)
        self.watching.heard()
        self.losses, self.worked_s, self.worked_units = [], 0.0, 0.0

    def _show(
        self, outcome: Committed, names: tuple[str, ...], told: Mapping[int, Said], done: Mapping[str, Runs]
    ) -> None:
        ledger, seconds = self.book.ledger, self.link.now() - self.start
        self.board.round(
            outcome.step, {names[rank]: told[rank] for rank in told}, {name: size(done[name]) for name in done},
            round=outcome.round, epochs_done=ledger.epochs, units_done=ledger.units_done,
            units_per_epoch=ledger.units_per_epoch, end=ledger.end, skipped=self.sync.skipped,
        )  # fmt: skip
        self.statuses = {
            rank: Status(
                outcome.step, seconds, math.nan if said.loss is None else said.loss, self.here.samples,
                self.here.tokens, said.sent_bytes, said.received_bytes, said.leaves, False,
            )
            for rank, said in told.items()
        }  # fmt: skip
        losses = [status.loss for status in self.statuses.values() if math.isfinite(status.loss)]
        sent = round(sum(said.sent_bytes for said in told.values()) / len(told))
        if losses:
            self.here.points.append(Point(outcome.step, seconds, sent, sum(losses) / len(losses)))

    def observe(self, outcome: Outcome) -> None:
        """Keep what is out of the ordinary."""
        if isinstance(outcome, Skipped):
            if outcome.fragment == 0:
                self.book.skipped()
            self._note("skipped round", f"round {outcome.round} of fragment {outcome.fragment}: {outcome.reason}")

    def _changed(self, change: Any) -> None:
        self.journal.write(
            "met", names=list(change.names), came=list(change.came), left=list(change.left), seconds=change.seconds
        )
        self.board.met(change.names, change.came, change.left)
        self.watching.gather(self.link, tuple(change.names), self.link.timings)
        if change.healed:
            self.journal.write("healed", seconds=change.seconds, bytes=change.received_bytes)
            self.losses, self.worked_s, self.worked_units = [], 0.0, 0.0

    def find(self, kind: str, who: str, evidence: str) -> None:
        """Something that a person should look at: for those who watch the rhythm of rounds."""
        self.journal.write("finding", kind=kind, who=who, evidence=evidence)
        self.board.find(kind, who, evidence)

    def _note(self, kind: str, text: str) -> None:
        event = Event(self.sync.step, self.link.now() - self.start, kind, text)
        self.here.events.append(event)
        self.display.event(event)

    # --- what is kept --------------------------------------------------------------------------------------------

    def _is_first(self) -> bool:
        return self.link.rank == self.link.members[0]

    def _evaluate(self) -> None:
        """The member of the lowest rank evaluates the consensus model; the others go on and wait at the next round."""
        self.evaluated_at = self.sync.step
        if not self._is_first():
            return
        self.board.phase("evaluating", self.sync.step)
        start = self.link.now()
        with self.sync.evaluating():
            self.final = dict(self.task.evaluate(self.model))
        self.here.evaluating_s += self.link.now() - start
        self.journal.write("evaluated", step=self.sync.step, **self.final)
        self.board.tell(valid_loss=self.final.get("loss"), evaluated_at=self.sync.step)
        before = self.here.points[-1] if self.here.points else Point(self.sync.step, 0.0, 0, math.nan)
        point = Point(
            self.sync.step, self.link.now() - self.start, before.sent_bytes, before.train_loss, self.final["loss"],
            self.final.get("accuracy"),
        )  # fmt: skip
        self.here.points.append(point)
        self.display.evaluated(point)

    def _save(self) -> None:
        """A checkpoint in this member's own folder; one that cannot be written is told, and the run goes on."""
        self.saved_at = self.sync.step
        self.board.phase("saving", self.sync.step)
        try:
            checkpoint.save(folder_of(self.stay.out, self.link.name), self.sync.step, 0, self._state())
        except OSError as error:
            self.find("checkpoint failed", self.link.name, f"of step {self.sync.step}: {error}")
            _log.warning("the checkpoint of step %d could not be written: %s", self.sync.step, error)
            return
        self.journal.write("saved", step=self.sync.step)

    def _state(self) -> dict[str, Any]:
        return {
            "members": len(self.link.members),
            "optimizer_name": self.run.optimizer.name,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "sync": self.sync.state_dict(),
            "random": random_state(self.device),
            "ledger": self.book.state_dict(),
            "config": dump(self.run),
        }

    def restore(self, sync: Synchronizer) -> None:
        """Go on from the newest checkpoint on this machine, whoever wrote it, unless the others hold more."""
        self.sync = sync
        state = None if self.stay.resume is None else load_newest(self.stay.resume)
        if state is None:
            return
        if state["optimizer_name"] != self.run.optimizer.name:
            raise ConfigError(
                f"the checkpoint was made with the optimizer {state['optimizer_name']}",
                expected=f"{self.run.optimizer.name}, which this run has",
                mend=f"resume with --optimizer {state['optimizer_name']}",
            )
        self.model.load_state_dict(state["model"])
        load_optimizers(self.optimizers, state["optimizers"])
        sync.load_state_dict(state["sync"])
        set_random_state(state["random"], self.device)
        self.book.load_state_dict(state["ledger"])

    def _digest(self) -> str:
        """Of the common state: the consensus model and the ledger."""
        ledger = json.dumps(self.book.state_dict(), sort_keys=True).encode()
        return hashlib.blake2b(digest(*self.sync.consensus()) + ledger, digest_size=16).hexdigest()

    def _received(self) -> int:
        return totals(self._whole())[1]

    def _whole(self) -> History:
        purposes = {
            name: (traffic.sent_bytes, traffic.received_bytes) for name, traffic in self.link.meter.by_purpose().items()
        }
        here, timing = self.here, self.sync.timing
        return History(
            self.link.now() - self.start, here.samples, here.tokens, timing, purposes, here.points, here.events,
            here.evaluating_s,
        )  # fmt: skip


def folder_of(out: Path, name: str) -> Path:
    """Where a member's own files lie."""
    return out / FOLDER / name


def newest(out: Path) -> tuple[Path, int] | None:
    """The newest checkpoint of any member: its folder and step; None if there is none."""
    found = [(step, folder) for folder in sorted((out / FOLDER).glob("*/")) for step in checkpoint.steps(folder, 0)]
    if not found:
        return None
    step, folder = max(found)
    return folder, step


def load_newest(out: Path) -> dict[str, Any] | None:
    """The newest checkpoint that can be read; a damaged one is told and passed over."""
    found = sorted(
        ((step, folder) for folder in (out / FOLDER).glob("*/") for step in checkpoint.steps(folder, 0)), reverse=True
    )
    for step, folder in found:
        try:
            return checkpoint.load(folder, step, 0)
        except ThinwireError as error:
            _log.warning("%s", error)
    return None
