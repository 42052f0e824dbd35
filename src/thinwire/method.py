"""A method is six answers and nothing more. What makes no sense together is refused here, when it is composed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from thinwire.aggregators import Aggregator, Mean
from thinwire.codecs import ErrorFeedback, Feedback, How, Staged
from thinwire.codecs.base import Codec
from thinwire.codecs.precision import FP32
from thinwire.codecs.stages import wants_feedback
from thinwire.errors import ConfigError
from thinwire.outer import Mine, NoStep, Now, Outer
from thinwire.pace import Pacer
from thinwire.payloads import Gradient, Payload
from thinwire.routes import Topology
from thinwire.schedules import Every, Paced, Schedule, back_to_back
from thinwire.topologies import Everyone, Islands


@dataclass(frozen=True, kw_only=True)
class Method:
    """When, what, how, to whom, merged how, and then.

    A codec that needs error feedback (see its traits) is wrapped in the classic one here; another scheme is wrapped by
    hand, and ErrorFeedback(codec, decay=0) is the way to go without.
    """

    schedule: Schedule = field(default_factory=Every)
    payload: Payload = field(default_factory=Gradient)
    codec: How = field(default_factory=FP32)
    topology: Topology = field(default_factory=Everyone)
    aggregator: Aggregator = field(default_factory=Mean)
    outer: Outer = field(default_factory=NoStep)

    def __post_init__(self) -> None:
        if not isinstance(self.codec, Feedback) and wants_feedback(self.codec):
            object.__setattr__(self, "codec", ErrorFeedback(self.codec))
        _check(self)

    @property
    def feedback(self) -> Feedback | None:
        """The error memory around the codec, if there is one."""
        return self.codec if isinstance(self.codec, Feedback) else None

    @property
    def bare_codec(self) -> Codec | Staged:
        """The codec that writes, without its memory."""
        return self.codec.codec if isinstance(self.codec, Feedback) else self.codec

    @property
    def consensus(self) -> bool:
        """Whether a round leaves all members with one model; without, each has its own."""
        return self.topology.consensus and not self.outer.apart

    def answers(self) -> dict[str, str]:
        """The six answers in words; members compare them when they meet."""
        return {
            "schedule": repr(self.schedule),
            "payload": repr(self.payload),
            "codec": self.codec.spec,
            "topology": repr(self.topology),
            "aggregator": repr(self.aggregator),
            "outer": repr(self.outer),
        }

    def at(self, step: int) -> Method:
        """The method in force for local step `step`, counted from 1."""
        return self

    def paced(self, pacer: Pacer) -> Method:
        """The same method, with the time between rounds or the work for each decided anew after every round."""
        if not isinstance(self.schedule, Every):
            raise ConfigError(
                f"pacer {pacer!r} with schedule {self.schedule!r}",
                expected="a schedule of rounds at even distances to begin with",
                mend="Every(...)",
            )
        return self.but(schedule=Paced(self.schedule, pacer))

    def but(self, **answers: object) -> Method:
        """The same method with some answers changed: diloco().but(topology=Islands(4))."""
        return replace(self, **answers)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Phases:
    """One method up to and including local step `switch`, another one after it."""

    first: Method
    switch: int
    then: Method

    def __post_init__(self) -> None:
        if self.switch < 1:
            raise ConfigError(
                f"switch={self.switch}", expected="local step 1 or later", mend="use the second method alone"
            )
        if self.first.schedule.overlap:
            raise ConfigError(
                "the first phase overlaps its rounds with compute",
                expected="a first phase whose rounds end with the step they begin at",
                mend="set its overlap to 0",
            )
        if not self.first.consensus:
            if self.then.payload.kind != "parameters":
                raise ConfigError(
                    "the first phase leaves every member with a model of its own",
                    expected="a first phase that ends with one model on all members: the second one's anchor",
                    mend="use topology=Everyone() in the first phase, or send Parameters() in the second one, which "
                    "needs no anchor",
                )
        elif self.first.payload.kind != "gradient":
            _check_ends_together(self.first, self.switch)
            if self.then.payload.kind == "gradient":
                raise ConfigError(
                    "the second phase sends gradients, after a first one with local steps",
                    expected="gradients only in the first phase: local steps leave every member's optimizer with a "
                    "state of its own, and equal gradients would then no longer make equal steps",
                    mend="send Delta() with Every(1) and outer=SGD(1.0) in the second phase",
                )

    def at(self, step: int) -> Method:
        """The method in force for local step `step`, counted from 1."""
        return self.first if step <= self.switch else self.then

    def paced(self, pacer: Pacer) -> Phases:
        """Both methods at a pace decided after every round: refused where one of them cannot be."""
        return replace(self, first=self.first.paced(pacer), then=self.then.paced(pacer))

    def but(self, **answers: object) -> Phases:
        """Both methods with some answers changed."""
        return replace(self, first=self.first.but(**answers), then=self.then.but(**answers))

    def answers(self) -> dict[str, str]:
        """Both methods' answers in words."""
        first, then = self.first.answers(), self.then.answers()
        return {
            name: answer if answer == then[name] else f"{answer} to step {self.switch}, then {then[name]}"
            for name, answer in first.items()
        }


def _check_ends_together(first: Method, switch: int) -> None:
    fragments = first.payload.fragments
    if first.schedule.begins(switch, fragments) != tuple(range(fragments)):
        raise ConfigError(
            f"the first phase ends at step {switch}, where {first.schedule!r} has no round for all of its model",
            expected="a round of every fragment at the switch: the second phase starts from one model on all members",
            mend="let the switch be a multiple of `every`, with fragments=1",
        )
    one, zero = torch.ones(1), torch.zeros(1)
    merged, _ = first.outer.merge(Mine(one, one), zero, {}, Now())  # live parameters 1, anchor 0
    if bool(merged):
        raise ConfigError(
            f"the first phase's outer step {first.outer!r} keeps a share of every member's own model",
            expected="a first phase that ends with one model on all members: the second one's anchor",
            mend="leave Mix out of the first phase",
        )


def _check(method: Method) -> None:
    payload, outer = method.payload, method.outer
    if outer.accepts != payload.kind:
        raise ConfigError(
            f"payload {payload!r} with outer step {outer!r}: {payload.kind} meets a step made for {outer.accepts}",
            expected="gradient with NoStep, delta with SGD, Nesterov or Adam, parameters with Average",
            mend={
                "gradient": "leave outer out, or send Delta()",
                "delta": "use outer=SGD(1.0) to average, Nesterov(0.7, 0.9) for DiLoCo",
                "parameters": "use outer=Average(), or send Delta() to use this outer step",
            }[payload.kind],
        )
    if payload.kind == "gradient" and method.schedule.overlap:
        raise ConfigError(
            f"payload gradient with schedule {method.schedule!r}: a step waits for the gradients it is made with",
            expected="gradients without overlap",
            mend="use Every(1), or send Delta(), whose rounds may end later than they begin",
        )
    if payload.kind == "gradient" and any(method.schedule.begins(step, 1) != (0,) for step in (1, 1 << 62)):
        raise ConfigError(
            f"payload gradient with schedule {method.schedule!r}: gradients of the steps between would be lost",
            expected="gradients every step",
            mend="use Every(1), or send Delta(), which holds all local steps",
        )
    codec = method.bare_codec
    if payload.kind == "parameters" and not (isinstance(codec, Codec) and codec.traits.lossless):
        raise ConfigError(
            f"payload parameters with codec {method.codec.spec}: what it drops is gone from the model every round",
            expected="a lossless codec for parameters",
            mend="send Delta() with outer=SGD(1.0): the same average, and only the small change is rounded",
        )
    if not method.topology.consensus and payload.kind != "parameters":
        raise ConfigError(
            f"payload {payload!r} over {method.topology!r}: members would add up changes to models that nothing brings "
            "together, and drift apart for ever",
            expected="parameters, where members have models of their own",
            mend="send Parameters() with outer=Average(), or use a topology that all members share",
        )
    if method.topology.mixes and (method.aggregator != Mean() or method.feedback is not None):
        raise ConfigError(
            f"aggregator {method.aggregator!r} with codec {method.codec.spec} over {method.topology!r}: the graph's "
            "weights say how neighbours are merged, and no member knows what the others remember",
            expected="Mean(), and a codec without memory",
            mend="leave aggregator and feedback out, or use RandomPairs()",
        )
    if isinstance(method.topology, Islands) and method.aggregator.needs != "sum":
        raise ConfigError(
            f"aggregator {method.aggregator!r} over {method.topology!r}: it would see sums that islands have formed",
            expected="a mean, which is the same in one go and in two",
            mend="use Everyone() with this aggregator, or Mean() with islands",
        )
    if _adds_codes(codec) and method.aggregator.needs != "sum":
        raise ConfigError(
            f"aggregator {method.aggregator!r} with linear codec {method.codec.spec}: values are added as codes",
            expected="a mean, or a codec that is decoded before it is merged",
            mend="use Mean(), or another codec",
        )
    if isinstance(method.schedule, Paced):
        _check_paced(method, method.schedule)
    if back_to_back(method.schedule):
        _check_back_to_back(method)
    if outer.recalls:
        _check_recalls(method)
    if outer.anticipates:
        _check_anticipates(method)
    if outer.apart:
        _check_apart(method)
    if method.feedback is not None:
        _check_feedback(method, method.feedback)


def _check_paced(method: Method, schedule: Paced) -> None:
    """Decisions are made by all members of a group, for rounds of the whole model."""
    name, changes = repr(schedule.pacer), schedule.pacer.paces
    if method.payload.fragments != 1 or not method.topology.consensus:
        raise ConfigError(
            f"pacer {name} with payload {method.payload!r} over {method.topology!r}",
            expected="rounds of the whole model, among all members: they decide together when the next one is",
            mend="one fragment and topology=Everyone() or islands, or leave the pacer out",
        )
    if (changes == "parts") != (method.payload.kind == "gradient"):
        raise ConfigError(
            f"pacer {name} with payload {method.payload!r}: it changes the {changes}",
            expected="by_shares and by_noise with gradients, by_speed, by_link and by_rate with local steps",
            mend="another pacer, or another method",
        )
    if changes == "parts" and not method.aggregator.weighs:
        raise ConfigError(
            f"pacer {name} with aggregator {method.aggregator!r}: members' batches will be of unlike sizes",
            expected="a mean weighted by samples",
            mend="use aggregator=WeightedMean(), and call sync.count(samples)",
        )
    if method.feedback is not None and method.feedback.corrects:
        raise ConfigError(
            f"pacer {name} with {method.feedback.spec}: it spreads a correction over the local steps of a round",
            expected="rounds of as many local steps each",
            mend="leave the pacer out, or take another memory",
        )


def _check_back_to_back(method: Method) -> None:
    if method.payload.kind != "delta":
        raise ConfigError(
            f"payload {method.payload!r} with schedule {method.schedule!r}: what local steps did to the model would be "
            "overwritten with an average from before them",
            expected="deltas, where a round has all of the time to the next one",
            mend="send Delta(), or lower the overlap",
        )
    if method.outer.mixes:
        raise ConfigError(
            f"outer step {method.outer!r} with schedule {method.schedule!r}: the local steps that it would keep are "
            "sent by the round that begins then, and would count twice",
            expected=f"an overlap below {method.schedule.period}, or an outer step that keeps none of them",
            mend=f"overlap={method.schedule.period - 1}, or leave Mix and Rebase out",
        )


def _check_apart(method: Method) -> None:
    """Members that take over only what was sent must have sent the same entries, or a mean means nothing."""
    codec = method.bare_codec
    alike = isinstance(codec, Codec) and not any(c.selects and not c.traits.linear for c in codec.leads)
    if not alike:
        raise ConfigError(
            f"outer step {method.outer!r} with codec {method.codec.spec}: each member selects entries of its own",
            expected="a codec that selects alike on all members, or nothing: randk, fp32, int8",
            mend="use randk(share), by itself or with another codec after it: randk(0.01) | bf16",
        )
    feedback = method.feedback
    if feedback is not None and not (isinstance(feedback, ErrorFeedback) and feedback.decay == 0):
        raise ConfigError(
            f"outer step {method.outer!r} with {feedback.spec}: what was not sent is still in the parameters, and "
            "would be owed as well",
            expected="a codec without memory",
            mend=f"codec=ErrorFeedback({feedback.codec.spec}, decay=0)",
        )


def _check_recalls(method: Method) -> None:
    """An outer step that tells a member's own part from the others' must know what that part was."""
    if isinstance(method.topology, Islands) or not method.topology.consensus:
        raise ConfigError(
            f"outer step {method.outer!r} over {method.topology!r}: a member's own part cannot be told from the rest",
            expected="members that combine directly, all with all",
            mend="use topology=Everyone() with this outer step",
        )
    if method.aggregator.needs != "sum" or method.aggregator.weighs:
        raise ConfigError(
            f"outer step {method.outer!r} with aggregator {method.aggregator!r}: it counts on a share of 1/N for each",
            expected="a plain mean",
            mend="use aggregator=Mean()",
        )


def _check_anticipates(method: Method) -> None:
    """An outer step that takes a member's own part in advance needs to be told it, and what share it will be."""
    if not back_to_back(method.schedule):
        raise ConfigError(
            f"outer step {method.outer!r} with schedule {method.schedule!r}: nothing is on its way when a round ends",
            expected="rounds that begin as the last one ends: an overlap of all steps between them",
            mend=f"schedule=Every({method.schedule.period}, overlap={method.schedule.period}), or leave Eager out",
        )
    if method.aggregator.needs != "sum" or method.aggregator.weighs:
        raise ConfigError(
            f"outer step {method.outer!r} with aggregator {method.aggregator!r}: it counts on a share of 1/N for each",
            expected="a plain mean",
            mend="use aggregator=Mean()",
        )


def _adds_codes(codec: Codec | Staged) -> bool:
    """Whether contributions are merged before they are decoded."""
    if isinstance(codec, Staged):
        return True
    return (codec.traits.linear or codec.traits.summable) and not codec.traits.lossless


def _check_feedback(method: Method, feedback: Feedback) -> None:
    """What a scheme that knows the mean of members' memories, or corrects local steps, asks of the other parts."""
    name = feedback.spec.split("(")[0]
    weighs_by_itself = feedback.weighs
    if weighs_by_itself and not method.aggregator.weighs:
        raise ConfigError(
            f"{feedback.spec} with aggregator {method.aggregator!r}: its members' weights would be ignored",
            expected="a weighted mean",
            mend="aggregator=WeightedMean()",
        )
    if feedback.tracks and (method.aggregator.needs != "sum" or method.aggregator.weighs != weighs_by_itself):
        raise ConfigError(
            f"{feedback.spec} with aggregator {method.aggregator!r}: it keeps the mean of what all members hold, which "
            "another rule, or weights that change from round to round, would make wrong for ever",
            expected="a plain mean",
            mend="aggregator=Mean(), or feedback(...), which every rule may merge",
        )
    if feedback.tracks and not method.topology.consensus:
        raise ConfigError(
            f"{feedback.spec} over {method.topology!r}: it keeps the mean of what all members hold, and "
            "partners change",
            expected="one group of all members",
            mend="use Everyone() with this scheme, or another one over this topology",
        )
    if feedback.tracks and isinstance(method.topology, Islands):
        raise ConfigError(
            f"{feedback.spec} over {method.topology!r}: islands weigh what they pass on by who took part",
            expected="members that combine directly",
            mend="use feedback(...) with islands, or Everyone() with this scheme",
        )
    whole_rounds = method.payload.kind == "delta" and not method.schedule.overlap and method.payload.fragments == 1
    if feedback.corrects and not whole_rounds:
        raise ConfigError(
            f"{feedback.spec} with payload {method.payload!r} and schedule {method.schedule!r}: it corrects the local "
            "steps of whole rounds",
            expected="Delta() in one fragment, rounds that end with the step they begin at",
            mend=f"payload=Delta(), schedule=Every(...) without overlap, or another scheme than {name}",
        )
