"""Asynchronous outer steps: no rounds, and nobody waits for anybody. Member 0 keeps the anchor beside its own training.

    member w, after H_w local steps from the anchor a_v of version v:   push a_v - theta, pull the newest anchor
    member 0, for each push g that arrives:    G <- G + s g;  a <- a - eta s g / N;  n <- n + 1
                                               if N divides n:  b <- mu b + G / N;  a <- a - eta mu b;  G <- 0
    s = (1 + staleness)^-p      staleness: pushes that were taken in since version v
    H_w = max(1, floor(H v_w / v))      v_w local steps a second of member w, v those of the fastest (if by_speed)

Error   N pushes from one version are one Nesterov step on their mean (p=0). An ordinary momentum step on every push
        would apply the momentum N times as often, and diverges where this does not.
Size    c(n) bytes up and 4n down for every push; member 0 carries all of it.
State   member 0: anchor, b, G, all 4n; every other member: the anchor it pulled.
Source  Liu et al. 2024, arXiv:2401.09135: delayed Nesterov (with none of the momentum in the steps between, c=0) and
        dynamic local updates; eta=0.7, mu=0.9.
Differs this is no `Method`: members share no rounds and no count of steps, which is what the six answers are about.
        What comes of a run depends on the order of arrival; `Asynchronous.log` has it, and on a simulated link the same
        call gives the same bits. The weight by staleness is ours (p=0 is the paper).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from thinwire.codecs import Codec, Feedback, fp32
from thinwire.codecs.base import require
from thinwire.codecs.feedback import Place
from thinwire.codecs.stages import Tensors
from thinwire.collectives import finite
from thinwire.elastic.link import only_fixed
from thinwire.errors import ConfigError, PacketError
from thinwire.fragments import Fragments, digest
from thinwire.handshake import agree, all_of
from thinwire.links.base import Channel, Handle, Link
from thinwire.outer.base import check as check_rates
from thinwire.pace import Clock
from thinwire.packet import Flag, Header, Kind, Packet, check, read, wire_bytes
from thinwire.randomness import mix
from thinwire.version import __version__

_TOLD = {"told": (torch.float64, 4)}  # up: version, seconds a step, whether it ends, number; down: see _Reply


@dataclass(frozen=True)
class Held:
    """What member 0 keeps of all members' work.

    anchor, momentum, gathered  [n] a, b and G
    pushes                      taken in so far: the anchor's version
    """

    anchor: Tensor
    momentum: Tensor
    gathered: Tensor
    pushes: int = 0


@dataclass(frozen=True)
class DelayedNesterov:
    """The rule for a push; a pure function of what is held.

    buffer  pushes to a momentum step (N); None for as many as there are members
    stale   exponent p of the weight by staleness; 0 weighs all alike
    """

    lr: float = 0.7
    momentum: float = 0.9
    buffer: int | None = None
    stale: float = 0.0

    def __post_init__(self) -> None:
        check_rates(self.lr, self.momentum)
        if self.buffer is not None and self.buffer < 1:
            raise ConfigError(f"buffer={self.buffer}", expected="at least one push", mend="None for one a member")
        if not 0 <= self.stale < math.inf:
            raise ConfigError(f"stale={self.stale}", expected="an exponent from 0 up", mend="0.5, or 0 for no weights")

    def take(self, held: Held, g: Tensor, staleness: int, members: int) -> Held:
        """Take a push in.

        g          [n] anchor of its version minus the member's parameters
        staleness  pushes since that version
        """
        size = self.buffer or members
        g = g * (1 + staleness) ** -self.stale if self.stale else g
        gathered = held.gathered + g
        anchor = held.anchor - (self.lr / size) * g
        pushes = held.pushes + 1
        if pushes % size:
            return Held(anchor, held.momentum, gathered, pushes)
        momentum = self.momentum * held.momentum + gathered / size
        return Held(anchor - (self.lr * self.momentum) * momentum, momentum, torch.zeros_like(gathered), pushes)


@dataclass(frozen=True)
class Pushed:
    """An entry of the log: pushes in the order in which they were taken in.

    number   from 0
    version  of the anchor that the member had started from
    """

    number: int
    member: int
    version: int

    @property
    def staleness(self) -> int:
        """Pushes taken in between."""
        return self.number - self.version


@dataclass(frozen=True)
class _Reply:
    """What a member gets for a push: the newest anchor, its version, local steps to its next push, whether to end."""

    anchor: Tensor
    version: int
    steps: int
    over: bool


class _Center:
    """Member 0's side. Pushes are taken in one at a time, in threads beside its training (actors, if simulated)."""

    def __init__(
        self, rule: DelayedNesterov, anchor: Tensor, members: int, every: int, by_speed: bool, until: int | None,
        observer: Callable[[Pushed, Tensor], None] | None,
    ) -> None:  # fmt: skip
        self.rule, self.members, self.every, self.by_speed, self.until = rule, members, every, by_speed, until
        self.observer = observer
        zeros = torch.zeros_like(anchor)
        self.held = Held(anchor, zeros, zeros)
        self.step_s: dict[int, float] = {}
        self.log: list[Pushed] = []
        self._lock = threading.Lock()

    def take(self, member: int, g: Tensor | None, version: int, step_s: float) -> _Reply:
        """A push; None brings nothing and asks for the anchor."""
        with self._lock:  # never held while waiting for a link
            if g is not None:
                pushed = Pushed(self.held.pushes, member, version)
                self.held = self.rule.take(self.held, g, pushed.staleness, self.members)
                self.log.append(pushed)
                if self.observer is not None:
                    self.observer(pushed, g)
            if step_s > 0:
                self.step_s[member] = step_s
            over = self.until is not None and self.held.pushes >= self.until
            return _Reply(self.held.anchor, self.held.pushes, self._steps(member), over)

    def _steps(self, member: int) -> int:
        if not self.by_speed or member not in self.step_s:
            return self.every
        return max(1, math.floor(self.every * min(self.step_s.values()) / self.step_s[member] + 1e-6))


def asynchronous(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    link: Link,
    *,
    every: int = 20,
    rule: DelayedNesterov = DelayedNesterov(),
    codec: Codec | Feedback = fp32,
    overlap: int = 0,
    by_speed: bool = True,
    until: int | None = None,
    seed: int = 0,
    observer: Callable[[Pushed, Tensor], None] | None = None,
) -> Asynchronous:
    """Keep a model in step with the others' without waiting for any of them. Use it as a context manager.

    every     local steps of the fastest member between its pushes
    codec     of pushes, perhaps with feedback that is a member's own; anchors come back at full precision
    overlap   local steps that a push and its answer may take; what is learnt in them goes on top of the new anchor
    by_speed  whether slower members push after fewer local steps
    until     pushes of all members together after which `over` is told; None leaves the end to the loops
    observer  called on member 0 with every push and what it brought, in the order of the log
    raises    ConfigError if members differ in model, initial weights, options or version
    """
    return Asynchronous(
        model, optimizer, link, every=every, rule=rule, codec=codec, overlap=overlap, by_speed=by_speed, until=until,
        seed=seed, observer=observer,
    )  # fmt: skip


class Asynchronous:
    """See `asynchronous`. `step` counts this member's local steps, `pushes` what it sent; `over` ends its loop."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, link: Link, *, every: int, rule: DelayedNesterov,
        codec: Codec | Feedback, overlap: int, by_speed: bool, until: int | None, seed: int,
        observer: Callable[[Pushed, Tensor], None] | None,
    ) -> None:  # fmt: skip
        _check(every, overlap, until, codec)
        only_fixed(link, "asynchronous")
        self.step = self.pushes = 0
        self.over = False
        self.wait_s = 0.0
        self._model, self._optimizer, self._link = model, optimizer, link
        self._fragments = Fragments(model, 1)
        self._codec = codec.fit(self._fragments.shapes(0))
        self._every, self._overlap, self._seed = every, overlap, seed
        self._facts = {"rule": repr(rule), "codec": codec.spec, "every": f"{every}, {overlap}, {by_speed}, {until}"}
        self._anchor = self._fragments.gather(0)
        self._version, self._steps, self._since = 0, every, 0
        self._own: Tensors = {}
        self._context = 0
        self._clock = Clock(link.now)
        self._waits: tuple[int, Handle[_Reply], Tensor] | None = None  # local steps when due, the answer, what was sent
        center = link.rank == link.members[0]
        members = len(link.members)
        self._center = _Center(rule, self._anchor, members, every, by_speed, until, observer) if center else None
        self._services: list[Handle[None]] = []
        self._hook: Any = None
        self._sent = 0  # messages of this session

    # --- life ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Asynchronous:
        weights = digest(*self._model.parameters()).hex()
        facts = {"version": __version__, "model": self._fragments.schema(), "weights": weights, "seed": str(self._seed)}
        self._context = agree(self._link, {**facts, **self._facts})
        self._channels = {rank: self._link.open("pushes") for rank in self._link.members[1:]}
        if self._center is not None:
            for rank, channel in self._channels.items():
                self._services.append(self._link.spawn(self._serve(rank, channel), f"pushes of member {rank}"))
        self._hook = self._optimizer.register_step_post_hook(self._after_step)
        self._clock.resume()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None and self._hook is not None:
                self.finish()
        finally:
            self._remove_hook()

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    def finish(self) -> None:
        """Push what is left, wait for all members to have done so, and take the model that all end with.

        Local steps after it are a member's own. Leaving the `with` block does it, if it was not done.
        """
        self._await()
        self._remove_hook()
        last = self._version_and_delta()
        self.pushes += last is not None
        channel = self._link.open("pushes")
        header = Header(kind=Kind.RESULT, sender=self._link.members[0], context=self._context)
        if self._center is None:
            self._send(last, ends=True)
            most = wire_bytes("fp32", {"value": (torch.float32, self._anchor.numel())})
            arrived = channel.exchange({}, {header.sender: most}, "the last anchor")
            packet = check(read(arrived[header.sender]), header=header, codec="fp32", n=self._anchor.numel())
            self._anchor = packet.fields["value"].clone().to(self._anchor.device)
        else:
            if last is not None:
                self._take(last)
            for service in self._services:
                service.wait()
            self._anchor = self._center.held.anchor
            packet = Packet("fp32", self._anchor.numel(), {"value": self._anchor.cpu()}, header)
            others = dict.fromkeys(self._link.members[1:], packet.to_bytes())
            channel.exchange(others, {}, "the last anchor")
        self._fragments.scatter(0, self._anchor)
        self._since = self.step

    # --- what a loop may ask -------------------------------------------------------------------------------------

    @property
    def anchor(self) -> Tensor:
        """The anchor as this member last saw it; after `finish` the same on all.  [n]"""
        return (self._anchor if self._center is None else self._center.held.anchor).clone()

    @property
    def log(self) -> tuple[Pushed, ...]:
        """All pushes in the order in which they were taken in; member 0 has it."""
        return () if self._center is None else tuple(self._center.log)

    def state_dict(self) -> dict[str, Any]:
        """Everything remembered; all members call it and wait for each other this once: it is of one moment."""
        self._await()
        all_of(self._link, True)
        center = None
        if self._center is not None:
            held = self._center.held
            center = {
                "anchor": held.anchor, "momentum": held.momentum, "gathered": held.gathered, "pushes": held.pushes,
                "step_s": dict(self._center.step_s), "log": [[p.member, p.version] for p in self._center.log],
            }  # fmt: skip
        all_of(self._link, True)
        self._clock.resume()
        return {
            "facts": dict(self._facts), "step": self.step, "pushes": self.pushes, "anchor": self._anchor,
            "version": self._version, "steps": self._steps, "since": self._since, "own": dict(self._own),
            "center": center,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`, each member from its own; load model and optimizer beside it."""
        wrong = [name for name, told in self._facts.items() if state["facts"].get(name) != told]
        if wrong:
            raise ConfigError(
                f"the saved state is of another run: its {wrong[0]} is {state['facts'].get(wrong[0])}",
                expected=f"{wrong[0]} {self._facts[wrong[0]]}",
                mend="resume with the options of the checkpoint, or start anew from its weights",
            )
        self.step, self.pushes, self._anchor = state["step"], state["pushes"], state["anchor"]
        self._version, self._steps, self._since = state["version"], state["steps"], state["since"]
        self._own = dict(state["own"])
        if self._center is not None:
            saved = state["center"]
            self._center.held = Held(saved["anchor"], saved["momentum"], saved["gathered"], saved["pushes"])
            self._center.step_s = dict(saved["step_s"])
            self._center.log = [Pushed(number, *pair) for number, pair in enumerate(saved["log"])]
        all_of(self._link, True)  # nobody pushes to a member 0 that has not loaded yet
        self._clock.resume()

    # --- the order of things -------------------------------------------------------------------------------------

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.step += 1
        self._link.local_step()
        self._clock.pause()
        if self._waits is not None and self.step >= self._waits[0]:
            self._await()
        if self._waits is None and self.step - self._since >= self._steps:
            self._push()
        self._clock.resume()

    def _push(self) -> None:
        """Send what local steps did since the last pull, and take the answer now or `overlap` steps later."""
        sent = self._fragments.gather(0)
        brings = self._version_and_delta()
        self.pushes += 1
        self._since = self.step
        if self._center is not None:
            answer = self._take(brings)
            self._apply(answer, sent)
            return
        self._waits = self.step + self._overlap, self._send(brings), sent
        if self._overlap == 0:
            self._await()

    def _version_and_delta(self) -> tuple[int, Tensor] | None:
        """What a push brings; None if that is nothing, or not finite."""
        if self.step == self._since:
            return None
        delta = self._fragments.rounded(0, self._anchor) - self._fragments.gather(0)
        if finite(delta):
            return self._version, delta
        self._optimizer.state.clear()  # its moments are not finite either, as a rule: start over from the anchor
        return None

    def _await(self) -> None:
        """Take in the answer that is under way, if one is."""
        if self._waits is None:
            return
        before = self._link.now()
        _, handle, sent = self._waits
        self._waits = None
        answer = handle.wait()
        self.wait_s += self._link.now() - before
        self._apply(answer, sent)

    def _apply(self, answer: _Reply, sent: Tensor) -> None:
        """The new anchor, and on top of it what was learnt while it was under way."""
        live = self._fragments.gather(0)
        made = live - sent if finite(live) else torch.zeros_like(live)
        self._anchor, self._version, self._steps, self.over = answer.anchor, answer.version, answer.steps, answer.over
        self._fragments.scatter(0, self._anchor + made)

    # --- pushes --------------------------------------------------------------------------------------------------

    def _take(self, brings: tuple[int, Tensor] | None) -> _Reply:
        """Member 0's own push: no link, the same codec."""
        version, g = self._version, None
        if brings is not None:
            version, delta = brings
            fields, self._own = self._written(delta, self.pushes)
            g = self._bare.decode(fields, delta.numel(), self._key(self._link.rank, self.pushes))
        return self._taken(self._link.rank, g, version, self._clock.median())

    def _taken(self, member: int, g: Tensor | None, version: int, step_s: float) -> _Reply:
        assert self._center is not None
        answer = self._center.take(member, g, version, step_s)
        for service in self._services:  # a member that was lost is told at once, not at the end
            if service.done():
                service.wait()
        return answer

    def _serve(self, member: int, channel: Channel) -> Callable[[], None]:
        """Take in a member's pushes until it ends."""
        n, device = self._anchor.numel(), self._anchor.device
        layout = {**_TOLD, **self._bare.layout(n)}
        most = wire_bytes(self._bare.spec, layout)

        def job() -> None:
            ends, sent = False, 0
            while not ends:
                sent += 1
                due = Header(sender=member, round=sent, context=self._context)
                arrived = channel.exchange({}, {member: most}, f"push {sent} of member {member}")
                packet = read(arrived[member])
                check(packet, header=due, codec=self._bare.spec, n=packet.n and n)
                require({name: value for name, value in packet.fields.items() if name == "told"}, _TOLD)
                version, step_s, last, number = packet.fields["told"].tolist()
                if not 0 <= version <= self._pushes_taken:
                    raise PacketError(f"push {sent} of member {member} is from version {version}, which is to come")
                g = None
                if packet.n:
                    fields = {name: value.to(device) for name, value in packet.fields.items() if name != "told"}
                    g = self._bare.decode(fields, n, self._key(member, int(number)))
                ends = bool(last)
                answer = self._taken(member, g, int(version), step_s)
                if not ends:
                    told = torch.tensor([answer.version, answer.steps, answer.over, 0], dtype=torch.float64)
                    header = replace(due, kind=Kind.RESULT, sender=self._link.members[0])
                    back = Packet("fp32", n, {"told": told, "value": answer.anchor.cpu()}, header)
                    channel.exchange({member: back.to_bytes()}, {}, f"answer {sent} to member {member}")

        return job

    def _send(self, brings: tuple[int, Tensor] | None, *, ends: bool = False) -> Handle[_Reply]:
        """A push of another member than 0, beside the compute."""
        self._sent += 1
        number = self._sent
        told = torch.tensor([self._version, self._clock.median(), ends, self.pushes], dtype=torch.float64)
        header = Header(sender=self._link.rank, round=number, context=self._context)
        fields: Mapping[str, Tensor] = {}
        if brings is None:
            header = replace(header, flags=Flag.ABSTAINS)
        else:
            fields, self._own = self._written(brings[1], self.pushes)
        n = self._anchor.numel()
        packet = Packet(self._bare.spec, n if fields else 0, {"told": told, **fields}, header)
        center, channel = self._link.members[0], self._channels[self._link.rank]
        most = wire_bytes("fp32", {**_TOLD, "value": (torch.float32, n)})
        device = self._anchor.device

        def job() -> _Reply:
            channel.exchange({center: packet.to_bytes()}, {}, f"push {number}")
            if ends:
                return _Reply(torch.zeros(0), 0, 0, True)
            arrived = channel.exchange({}, {center: most}, f"the answer to push {number}")
            due = Header(kind=Kind.RESULT, sender=center, round=number, context=self._context)
            back = check(read(arrived[center]), header=due, codec="fp32", n=n)
            require(back.fields, {**_TOLD, "value": (torch.float32, n)})
            version, steps, over, _ = back.fields["told"].tolist()
            return _Reply(back.fields["value"].clone().to(device), int(version), int(steps), bool(over))

        return self._link.spawn(job, f"push {number}")

    @property
    def _pushes_taken(self) -> int:
        assert self._center is not None
        return self._center.held.pushes

    @property
    def _bare(self) -> Codec:
        """The codec that writes, without its memory."""
        bare = self._codec.codec if isinstance(self._codec, Feedback) else self._codec
        assert isinstance(bare, Codec)
        return bare

    def _written(self, delta: Tensor, number: int) -> tuple[Mapping[str, Tensor], Tensors]:
        """What is sent of a delta, and what is owed after it."""
        key = self._key(self._link.rank, number)
        if not isinstance(self._codec, Feedback):
            return self._bare.encode(delta, key), {}
        place = Place(self._link.rank, (self._link.rank,))
        target, held = self._codec.prepare(delta, self._own, {}, place)
        fields = self._bare.encode(target, key)
        sent = self._bare.decode(fields, delta.numel(), key)
        return fields, self._codec.commit(target, held, sent)

    def _key(self, member: int, number: int) -> int:
        return mix(self._seed, member, number)


def _check(every: int, overlap: int, until: int | None, codec: Codec | Feedback) -> None:
    if every < 1:
        raise ConfigError(f"a push every {every} steps", expected="every 1 step or more", mend="every=20")
    if not 0 <= overlap < every:
        raise ConfigError(
            f"an overlap of {overlap} steps with a push every {every}",
            expected=f"an overlap from 0 to {every - 1}: an answer is there before the next push",
            mend="lower the overlap, or push less often",
        )
    if until is not None and until < 1:
        raise ConfigError(f"until={until} pushes", expected="at least one", mend="None leaves the end to the loops")
    told = getattr(codec, "spec", repr(codec))
    if isinstance(codec, Feedback) and (codec.tracks or codec.corrects or not isinstance(codec.codec, Codec)):
        raise ConfigError(
            f"asynchronous pushes with {told}: there are no rounds in which members could share a memory",
            expected="a codec, by itself or with feedback of each member's own",
            mend="feedback(...), or the codec inside",
        )
    if not isinstance(codec, Codec | Feedback):
        raise ConfigError(
            f"asynchronous pushes with {told}",
            expected="a codec: a round of several exchanges has no place here",
            mend="topk(1/64) | int4, or int8",
        )
    if isinstance(codec, Codec) and codec.traits.wants_feedback:
        raise ConfigError(
            f"codec {told} without a memory for what it drops",
            expected="feedback around it",
            mend=f"feedback({told})",
        )
