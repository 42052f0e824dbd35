"""The loop behind the command line: what one member does, from the first step to the record of the run.

It is the loop of the README with what a long run needs around it: a learning-rate schedule, accumulation, clipping,
evaluation of the consensus model, a roll call, checkpoints, and an end that all members agree on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from thinwire.config import Run, dump
from thinwire.errors import PeerLost, ThinwireError
from thinwire.handshake import agree
from thinwire.links.base import Link
from thinwire.randomness import mix
from thinwire.report.record import Event, Point, RunRecord
from thinwire.rounds import Outcome, Skipped
from thinwire.seeds.recipe import Recipe
from thinwire.synchronizer import Synchronizer, synchronize
from thinwire.train import checkpoint
from thinwire.train.adopting import (
    batches_behind,
    load_inner,
    load_parameters,
    method_state,
    optimized,
    plan_from,
    share_of_history,
)
from thinwire.train.display import Display, Silent
from thinwire.train.history import NOT_SAVED, History, gather_json, make_record, totals
from thinwire.train.layerwise import Optimizers
from thinwire.train.resume import common_step, load_model, shared_settings
from thinwire.train.rollcall import RollCall, Status
from thinwire.train.steps import (
    consensus_tensors,
    device_of,
    keep,
    load_optimizers,
    local_step,
    precision,
    random_state,
    set_random_state,
)
from thinwire.train.tasks import Batch, Task
from thinwire.train.tuning import Tuned
from thinwire.train.universal import read, roles

_log = logging.getLogger("thinwire")


def train(
    run: Run, task: Task, link: Link, *, display: Display, stops: Callable[[], bool], resume: bool = False,
    start: Path | None = None,
) -> RunRecord | None:  # fmt: skip
    """Train this member to the end of the run.

    task     as all members built it from the run
    display  of this member; most are silent
    stops    whether this member was asked to stop; all stop together soon after
    resume   go on from the newest checkpoint that all members have
    start    go on from this universal checkpoint, of whatever group
    returns  the record of the run; None if the members stopped before its end
    raises   ConfigError if members were given different runs
    """
    agree(link, {**shared_settings(run, resume), "from": "a checkpoint" if start is not None else "the first step"})
    torch.manual_seed(run.seed)
    device = device_of(run)
    model = task.model().to(device)
    plan = run.method.build()
    optimizers = [] if isinstance(plan, Recipe) else run.optimizer.build(model)
    torch.manual_seed(mix(run.seed, link.rank) >> 1)  # from here on members may draw for themselves: dropout
    session = _Session(run, task, link, model, optimizers, display, stops, device)
    sync = (
        Tuned(model, replace(plan, seed=run.seed), link)
        if isinstance(plan, Recipe)
        else synchronize(model, optimizers, plan, link, seed=run.seed, observer=session.observe)
    )
    with sync:
        return session.go(sync, resume, start)


class _Session:
    """One member's run."""

    def __init__(
        self, run: Run, task: Task, link: Link, model: nn.Module, optimizers: Optimizers, display: Display,
        stops: Callable[[], bool], device: torch.device,
    ) -> None:  # fmt: skip
        self.run, self.task, self.link, self.model, self.optimizers = run, task, link, model, optimizers
        self.display, self.stops, self.device = display, stops, device
        self.folder = Path(run.out)
        self.before = History()  # of earlier sessions
        self.here = History()
        self.batches = 0  # micro-batches so far
        self.batch_samples = 0  # of the last one
        self.at = 0  # the step that all members count by; a paced member's own may be ahead of it
        self.calls = RollCall(link)
        self.losses: list[torch.Tensor] = []
        self.evaluations: dict[int, dict[str, float]] = {}
        self.asked_to_stop = False
        self.time_is_up = False
        self.start = link.now()

    # --- the order of things -------------------------------------------------------------------------------------

    def go(self, sync: Synchronizer | Tuned, resume: bool, start: Path | None) -> RunRecord | None:
        self.sync = sync
        told: list[str] = []
        if resume:
            self._restore()
        elif start is not None:
            told = self._adopt(start)
        self.start = self.link.now()
        parameters = sum(p.numel() for p in self.model.parameters())
        self.display.started(self.run, len(self.link.members), parameters, sync.step)
        for text in told:
            self._note("from a checkpoint", text)
        self._tell_lone_steps()
        if isinstance(sync, Tuned):
            self._tell_unused()
        try:
            if sync.step == 0:
                self._write_base()
                self._evaluate()
                self._call()
            self._after_step()
            while sync.step < self.run.steps and not self.asked_to_stop and not self.time_is_up:
                self._local_step()
                self._after_step()
            ended = self.at >= self.run.steps or self.time_is_up
            saved = self._save()
            if not ended and not saved:
                raise _stopped_unsaved(self.at, self.folder, self.link.rank)
            if not ended:
                self.display.stopped(self.at, self.folder)
                return None
        except PeerLost:
            self._rescue()
            raise
        return self._end()

    def _local_step(self) -> None:
        if isinstance(self.sync, Tuned):
            self._tune(self.sync)
            return
        parts = self.sync.parts or self.run.optimizer.accumulate
        batches = (self._next_batch() for _ in range(parts))
        self.losses.append(
            local_step(
                self.run, self.task, self.model, self.optimizers, self.sync, batches, parts=parts, device=self.device
            )
        )

    def _tune(self, sync: Tuned) -> None:
        run = self.run
        batches = [self._next_batch() for _ in range(run.optimizer.accumulate)]

        def loss() -> torch.Tensor:
            with precision(run, self.device):
                return torch.stack([self.task.loss(self.model, batch) for batch in batches]).mean()

        mean = sync.tune(loss, run.optimizer.lr_at(sync.step, steps=run.steps))
        self.losses.append(torch.tensor(mean))

    def _next_batch(self) -> Batch:
        batch = self.task.batch(self.batches, self.link.rank, len(self.link.members)).to(self.device)
        self.batches += 1
        self.batch_samples = batch.samples
        self.here.samples += batch.samples
        self.here.tokens += batch.tokens
        return batch

    def _after_step(self) -> None:
        """Whatever is due at the steps passed, in the same order on all members.

        A paced member may pass several steps at once, and a round among them: what is due before it waits for it.
        """
        reached = self.run.steps if self.sync.step >= self.run.steps else self.sync.common_step
        for step in range(self.at + 1, reached + 1):
            if self.asked_to_stop or self.time_is_up:
                return
            self.at = step
            self._at_step(step)

    def _at_step(self, step: int) -> None:
        run = self.run
        evaluates = run.eval_every > 0 and step % run.eval_every == 0 and step < run.steps
        if evaluates:
            self._evaluate()
        if evaluates or self.calls.due(step):
            self._call()
        if run.checkpoint_every and step % run.checkpoint_every == 0 and step < run.steps and not self.asked_to_stop:
            self._save()

    def _end(self) -> RunRecord:
        self.sync.finish()
        self._evaluate()
        self._call()
        self._take_in(self.calls.last())
        self._write_weights()
        self._write_log()
        return make_record(
            self.run, self.link, self.sync, self.model, self._whole(), self.final if self.link.rank == 0 else {}
        )

    # --- telling and deciding ------------------------------------------------------------------------------------

    def _call(self) -> None:
        losses, self.losses = self.losses, []
        loss = float(torch.stack(losses).mean()) if losses else float("nan")
        now = self._whole()
        sent, received = totals(now)
        late = self.run.max_time != "unlimited" and now.seconds >= self.run.max_time.seconds
        status = Status(self.at, now.seconds, loss, now.samples, now.tokens, sent, received, self.stops(), late)
        self._take_in(self.calls.call(status))

    def _take_in(self, statuses: Mapping[int, Status] | None) -> None:
        """What all members told one call ago: progress to show, a point of the curve, a wish to stop."""
        if statuses is None:
            return
        self.asked_to_stop = self.asked_to_stop or any(status.stops for status in statuses.values())
        self.time_is_up = self.time_is_up or any(status.late for status in statuses.values())
        step = next(iter(statuses.values())).step
        self.display.progress(step, statuses)
        evaluation = self.evaluations.pop(step, None)
        if step == 0 and evaluation is None:
            return
        told = [status.loss for status in statuses.values()]
        point = Point(
            step=step,
            seconds=max(status.seconds for status in statuses.values()),
            sent_bytes=round(sum(status.sent_bytes for status in statuses.values()) / len(statuses)),
            train_loss=sum(told) / len(told),
            valid_loss=None if evaluation is None else evaluation.get("loss"),
            accuracy=None if evaluation is None else evaluation.get("accuracy"),
        )
        if self.here.points and self.here.points[-1].step == step:  # evaluated after a call at the same step
            before = self.here.points.pop()
            point = replace(point, train_loss=before.train_loss)
        self.here.points.append(point)
        if evaluation is not None:
            self.display.evaluated(point)

    def _evaluate(self) -> None:
        """Member 0 evaluates the consensus model; where it takes all members to form one, all come."""
        if not (self.link.rank == 0 or not self.sync.has_consensus):
            return
        start = self.link.now()
        with self.sync.evaluating():
            if self.link.rank == 0:
                self.final = self.evaluations[self.at] = self.task.evaluate(self.model)
        self.here.evaluating_s += self.link.now() - start

    def observe(self, outcome: Outcome) -> None:
        """Keep what is out of the ordinary."""
        if isinstance(outcome, Skipped):
            self._note("skipped round", f"round {outcome.round} of fragment {outcome.fragment}: {outcome.reason}")
        elif self.sync.has_consensus and len(outcome.ranks) < len(self.link.members):
            left_out = sorted(set(self.link.members) - set(outcome.ranks))
            who = ", ".join(map(str, left_out))
            self._note("left out", f"round {outcome.round} of fragment {outcome.fragment}: no finite values from {who}")

    def _tell_lone_steps(self) -> None:
        """Steps after the last round teach each member alone, which is rarely what was meant."""
        last = _last_round(self.run)
        if last == self.run.steps or not self.sync.has_consensus:
            return
        when = f"the last round is due at step {last}" if last else "no round is due before the end"
        text = f"{when}: what is learnt in steps {last + 1} to {self.run.steps} does not reach the common model"
        if all(event.text != text for event in self.before.events):
            self._note("steps after the last round", text)

    def _tell_unused(self) -> None:
        """Scalars need no optimizer; of its section only the learning rate's part is read."""
        text = f"of [optimizer] lr, warmup_steps, schedule and accumulate count, {self.run.optimizer.name} does not"
        if all(event.text != text for event in self.before.events):
            self._note("no optimizer", text)

    def _note(self, kind: str, text: str) -> None:
        event = Event(self.at, self._whole().seconds, kind, text)
        self.here.events.append(event)
        self.display.event(event)

    # --- what is kept --------------------------------------------------------------------------------------------

    def _whole(self) -> History:
        """The run's history so far, earlier sessions included."""
        before, here = self.before, self.here
        purposes = dict(before.bytes_by_purpose)
        for name, traffic in self.link.meter.by_purpose().items():
            sent, received = purposes.get(name, (0, 0))
            purposes[name] = (sent + traffic.sent_bytes, received + traffic.received_bytes)
        return History(
            seconds=before.seconds + self.link.now() - self.start,
            samples=before.samples + here.samples,
            tokens=before.tokens + here.tokens,
            timing=before.timing + self.sync.timing,
            bytes_by_purpose=purposes,
            points=before.points + here.points,
            events=before.events + here.events,
            evaluating_s=before.evaluating_s + here.evaluating_s,
        )

    def _save(self) -> bool:
        """A checkpoint; one that cannot be written is told and the run goes on, the older ones still there."""
        self._take_in(self.calls.last())  # so that the checkpoint has all that was told
        try:
            checkpoint.save(self.folder, self.at, self.link.rank, self._state(rescue=False))
        except OSError as error:
            text = f"member {self.link.rank} could not write its checkpoint of step {self.at}: {error}"
            self._note(NOT_SAVED, text)
            if self.link.rank:  # whose display is silent, as a rule
                _log.warning(text)
            return False
        return True

    def _rescue(self) -> None:
        """After a member was lost: keep what has been committed since the last checkpoint."""
        self.display = Silent()  # what follows is half of the truth
        self.at = max(self.at, self.sync.common_step)  # the local step that ended with the loss was made
        if self.calls.unanswered is not None:  # the others' words are lost, but no evaluation of ours
            self._take_in({self.link.rank: self.calls.unanswered})
        try:
            checkpoint.save(self.folder, self.at, self.link.rank, self._state(rescue=True))
        except OSError as error:
            _log.warning("nothing since the last checkpoint could be kept: %s", error)

    def _state(self, *, rescue: bool) -> dict[str, Any]:
        return {
            "members": len(self.link.members),
            "optimizer_name": self.run.optimizer.name,
            "calls": None if rescue else self.calls.state_dict(),
            "evaluations": self.evaluations,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "sync": self.sync.state_dict(rescue=rescue),
            "random": random_state(self.device),
            "losses": list(self.losses),
            "batches": self.batches,
            "batch_samples": self.batch_samples,
            "roles": roles(self.model),
            "optimized": [optimized(self.model, optimizer) for optimizer in self.optimizers],
            "config": dump(self.run),
            "history": self._whole().as_dict(),
        }

    def _restore(self) -> None:
        step, owner = common_step(self.link, self.folder)
        state = checkpoint.load(self.folder, step, owner)
        load_model(self.model, state, self.run, len(self.link.members))
        load_optimizers(self.optimizers, state["optimizers"])
        if owner != self.link.rank:  # another member's file: what was its own alone is not ours
            _log.warning("this member has no checkpoint of step %d and goes on from member %d's", step, owner)
        self.sync.load_state_dict(state["sync"])
        set_random_state(state["random"], self.device)
        self.losses = [loss.to(self.device) for loss in state["losses"]]
        self.evaluations = state["evaluations"]
        self.batches, self.at = state["batches"], step
        self.batch_samples = state.get("batch_samples", 0)
        self.before = History.from_dict(state["history"])
        # Member 0's for all: after a loss a member may have had to write without.
        calls = gather_json(self.link, {"calls": state["calls"]}, "the roll calls")[self.link.members[0]]["calls"]
        if calls is not None:
            self.calls.load_state_dict(calls)

    def _adopt(self, start: Path) -> list[str]:
        """Go on from a universal checkpoint; returns what is told of it."""
        found = read(start)
        plan = plan_from(found, start, self.run)
        agree(self.link, {"--from": found.digest})
        assert isinstance(self.sync, Synchronizer)
        load_parameters(self.model, found, start)
        told = [f"step {found.step} of {found.members} members on {len(self.link.members)}", *found.told]
        told += load_inner(self.optimizers, self.model, found, self.run.optimizer.name)
        state, lost = method_state(self.sync.state_dict(), self.model, plan, found)
        self.sync.load_state_dict(state)
        self.at = found.step
        torch.manual_seed(mix(self.run.seed, self.link.rank, found.step) >> 1)
        world = len(self.link.members)
        self.batch_samples = self.task.batch(0, self.link.rank, world).samples
        self.batches = batches_behind(found.position, self.batch_samples * world)
        over = self.batches * self.batch_samples * world - found.position
        self.before = share_of_history(found, self.link.rank, world)
        return [*told, *lost, f"data: {found.position} samples are behind the group, {over} more are passed over"]

    def _write_base(self) -> None:
        """What a tuned model's log starts from."""
        if isinstance(self.sync, Tuned) and self.link.rank == 0:
            keep(self.folder, "base.safetensors", self.sync.write_base)

    def _write_log(self) -> None:
        """A tuned model's log, from which `thinwire export --seeds` takes it."""
        if isinstance(self.sync, Tuned) and self.link.rank == 0:
            keep(self.folder, "seeds.log", self.sync.write_log)

    def _write_weights(self) -> None:
        """The consensus model, for use."""
        if not (self.link.rank == 0 or not self.sync.has_consensus):
            return
        tensors = consensus_tensors(self.model, self.sync)
        if self.link.rank == 0:
            keep(self.folder, "model.safetensors", lambda path: save_file(tensors, path))


def _stopped_unsaved(step: int, folder: Path, rank: int) -> ThinwireError:
    older = sorted(checkpoint.steps(folder, rank))
    return ThinwireError(
        f"stopped after step {step}, but member {rank} could not write its checkpoint",
        expected=f"room on the disk, and permission to write into {folder}",
        mend=f"make room; --resume {folder} goes on from step {older[-1]}" if older else "make room, and start anew",
    )


def _last_round(run: Run) -> int:
    """The last local step of the run after which a round begins; 0 if there is none."""
    plan = run.method.build()
    if isinstance(plan, Recipe):
        return run.steps

    def begins(step: int) -> bool:
        method = plan.at(step)
        return bool(method.schedule.begins(step, method.payload.fragments))

    return next((step for step in range(run.steps, 0, -1) if begins(step)), 0)
