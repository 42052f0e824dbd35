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

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from thinwire import rounds, stability
from thinwire.buffers import BufferRows, average
from thinwire.collectives import NO_SAMPLES, NOBODY_FINITE, OVERFLOW, Combined, finite
from thinwire.errors import ConfigError, DivergedError, LinkError, ThinwireError
from thinwire.handshake import agree
from thinwire.inner import Optimizers
from thinwire.kept import NOTHING, Kept, order
from thinwire.links.base import Handle, Link
from thinwire.method import Method, Phases
from thinwire.outer import Mine, Now
from thinwire.pace import Pacer, Told
from thinwire.packet import Header
from thinwire.regroup import MENDABLE
from thinwire.rounds import Committed, FragmentState, Outcome, Skipped, Terms, UnderWay
from thinwire.routes import Neighbours, shares
from thinwire.schedules import back_to_back
from thinwire.sharding import clip_grad_norm_
from thinwire.snapshot import (
    owing,
)

_log = logging.getLogger("thinwire")

_PATIENCE_ROUNDS = 3  # a member may contribute nothing finite this often in a row
_PATIENCE_SCALED = 40  # the same with a GradScaler, which looks for its scale by halving: 2^16 to 2^-24
_COMPARE_GRADIENT_STEPS = 16  # parameters are compared this often when gradients are sent: they are not free to read
_COMPARE_ELEMENTS = 1 << 22  # anchors above this size are compared less often, in proportion
_MEET_GRADIENT_STEPS = 16  # members that come are let in this often when gradients are sent


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


class Synchronizer(Kept):
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
        super().__init__(model, optimizer, method, link, seed=seed, scaler=scaler)
        if link.rank == link.members[0]:
            for phase in (method.first, method.then) if isinstance(method, Phases) else (method,):
                stability.warn(phase, len(link.members))
        self.timing = Timing()
        self._observer = observer
        self._gradients_are_combined = False
        self._all_overflown = False
        self._met = self._void = self._ended = self._unmet = False
        self._hooks: list[Any] = []

    # --- life ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Synchronizer:
        if self._group is None:
            self._agree_within({})
            self._terms = Terms(agree(self._link, self._facts()), self._seed)
        else:
            self._regroup(None)
            self._met = self._ended = False  # see _meet_if_due
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
        self._carry_out((), due=None)
        while self._group is not None and self._unmet:
            self._regroup(None)  # whoever is in doubt about the last round can still ask
        self._met = False

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

    # --- a group that changes ------------------------------------------------------------------------------------

    def _regroup(self, broken: ThinwireError | None) -> tuple[int, ...]:
        """Meet the others, and go on with them; returns fragments whose rounds are to begin again."""
        assert self._group is not None
        settled = self._group.meet(broken)
        self._unmet = False
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
                for entry in sorted(self._under_way, key=order):
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
        due = self._ended and not self._met
        if self._method.payload.kind == "gradient":
            due = self.step % _MEET_GRADIENT_STEPS == 0
        if self._group is not None and due:
            self._regroup(None)
        self._met = self._ended = False  # a round that was done again there is behind all: they meet after the next one

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

    def _finish(self, entry: tuple[UnderWay, Handle[BufferRows] | None], fresh: Tensor = NOTHING) -> Tensor:
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
        self._unmet = True
        was_idle = self._group is not None and self._is_idle(fragment, under_way.counted[0])
        if isinstance(outcome, Skipped):
            self._on_skipped(outcome, state, was_idle)
            fresh = self._owe(under_way, fresh)
        else:
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

    def _on_skipped(self, outcome: Skipped, state: FragmentState, was_idle: bool) -> None:
        self.skipped += 1
        where = f"round {outcome.round}, fragment {outcome.fragment} at step {outcome.step}"
        if outcome.reason in (NOBODY_FINITE, OVERFLOW):
            if state.idle[self._link.rank] >= self._patience_with_all() and not was_idle:
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
