"""Composition: what makes no sense is refused in words; every option is part of the answers."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import pytest

from thinwire.aggregators import Mean, Median, TrimmedMean, WeightedMean
from thinwire.codecs import ErrorFeedback, dct, ef21, ef21w, fp32, int4, int8, projection, topk, zstd
from thinwire.codecs.base import Codec, Traits
from thinwire.errors import ConfigError
from thinwire.method import Method, Phases
from thinwire.methods import (
    METHODS,
    co2,
    delayed,
    demo,
    dgc,
    diloco,
    eager,
    every_step,
    fedavg,
    ferret,
    flasc,
    gossip,
    late_merge,
    local_sgd,
    muloco,
    noloco,
    one_bit_adam,
    post_local_sgd,
    sign_sgd,
    slowmo,
    sparse_loco,
    sparta,
    streaming_diloco,
)
from thinwire.outer import (
    SGD,
    Adam,
    Average,
    ClippedMomentum,
    Eager,
    Gap,
    Mix,
    Nesterov,
    NoStep,
    Rebase,
    Restart,
    Scheduled,
    SlowMo,
    Towards,
    per_group,
)
from thinwire.payloads import Delta, Gradient, Parameters
from thinwire.schedules import At, Every
from thinwire.topologies import (
    Everyone,
    Exponential,
    Graph,
    Group,
    Islands,
    RandomGraph,
    RandomPairs,
    Ring,
    Torus,
    Tree,
    Window,
    members_of,
)


@dataclass(frozen=True)
class Halves(Codec):
    """Linear and lossy: the sums of neighbours."""

    @property
    def spec(self) -> str:
        return "halves"

    @property
    def traits(self) -> Traits:
        return Traits(linear=True)

    def layout(self, n):
        raise NotImplementedError

    encode = decode = layout


GOSSIP = {"payload": Parameters(), "outer": Average()}


def refused(text: str):
    return pytest.raises(ConfigError, match=text)


@pytest.mark.parametrize(
    ("answers", "text"),
    [
        ({"payload": Delta()}, r"payload Delta\(fragments=1\) with outer step NoStep\(\): delta meets a step made for "
                               "gradient\n.*gradient with NoStep.*\n.*outer=SGD\\(1.0\\) to average"),
        ({"outer": SGD()}, "gradient meets a step made for delta\n.*\n.*leave outer out, or send Delta"),
        ({"payload": Parameters(), "outer": Nesterov()}, "parameters meets .* delta\n.*\n.*use outer=Average"),
        ({"payload": Delta(), "outer": Average()}, "delta meets a step made for parameters"),
        ({"payload": Delta(), "outer": Mix(Average())}, "delta meets a step made for parameters"),
        ({"schedule": Every(2)}, r"gradient with schedule Every\(steps=2, overlap=0\): gradients of the steps between "
                                 "would be lost\n.*gradients every step\n.*use Every\\(1\\), or send Delta"),
        ({"payload": Parameters(), "outer": Average(), "codec": int8}, "parameters with codec int8: what it drops is "
                                                                       "gone .*\n.*lossless.*\n.*send Delta"),
        ({"payload": Parameters(), "outer": Average(), "codec": ErrorFeedback(int4)}, "parameters with codec feedback"),
        ({"topology": Islands(2), "aggregator": Median()}, r"Median\(\) over Islands.*sums that islands have formed"
                                                           "\n.*a mean.*\n.*use Everyone"),
        ({"topology": RandomPairs()}, r"Gradient\(\) over RandomPairs\(share=1.0\): .* drift apart for ever\n.*para"
                                      r"meters.*\n.*send Parameters\(\) with outer=Average"),
        ({"payload": Delta(), "outer": SGD(), "topology": Islands(2, between=RandomPairs())}, "drift apart for ever"),
        ({"codec": Halves(), "aggregator": TrimmedMean(0.1)}, "with linear codec halves: .* added as codes\n.*a mean"),
        ({"codec": ef21(int8), "aggregator": Median()}, r"ef21\(int8\) with aggregator Median\(\): it keeps the mean "
                                                        "of what .*\n.*a plain mean\n.*or feedback"),
        ({"codec": ef21(int8), "aggregator": WeightedMean()}, "or weights that change from round to round, would make"),
        ({"codec": ef21w(int8, (1, 2))}, r"aggregator Mean\(\): its members' weights would be ignored\n.*a weighted "
                                         r"mean\n.*aggregator=WeightedMean\(\)"),
        ({"codec": ef21(int8), "topology": Islands(2)}, "over Islands.*: islands weigh what they pass on by who took"),
        ({"codec": ef21(fp32), "topology": RandomPairs(), "payload": Parameters(), "outer": Average()},
         r"ef21\(fp32\) over RandomPairs\(.*\): .* partners change\n.*one group of all members\n.*use Everyone\(\)"),
        ({"payload": Delta(), "outer": Eager(SGD()), "schedule": Every(4, 3)}, r"Eager\(.* with schedule Every\(steps="
         r"4, overlap=3\): nothing is on its way .*\n.*begin as the last one ends.*\n.*Every\(4, overlap=4\), or l"),
        ({"payload": Delta(), "outer": Eager(SGD()), "schedule": Every(4, 4), "aggregator": Median()},
         r"Eager\(.* with aggregator Median\(\): it counts on a share of 1/N .*\n.*a plain mean\n.*aggregator=Mean"),
        ({"payload": Delta(), "outer": Restart(Scheduled(Eager(SGD()))), "schedule": Every(4, 4),
          "aggregator": WeightedMean()}, r"with aggregator WeightedMean\(\): it counts on a share of 1/N"),
        ({"schedule": At((1, 2))}, r"gradient with schedule At\(steps=\(1, 2\)\): gradients of the steps between"),
        ({**GOSSIP, "topology": Ring(), "aggregator": Median()}, r"Median\(\) with codec fp32 over Ring\(\): the gr.*\n"
                                                                r".*Mean\(\), and a codec without memory\n.*leave ag"),
        ({**GOSSIP, "topology": Window(0, 3, outside=Torus()), "aggregator": WeightedMean()}, r"over Window\(first=0"),
        ({**GOSSIP, "topology": Exponential(), "codec": ErrorFeedback(fp32)}, r"feedback\(fp32\) over Exponential"),
        ({"payload": Delta(), "outer": SGD(), "topology": Ring()}, "drift apart for ever"),
    ],
)  # fmt: skip
def test_refusals(answers, text):
    with refused(text):
        Method(**answers)


@pytest.mark.parametrize(
    "answers",
    [
        {},
        {"aggregator": Median()},
        {"codec": Halves()},
        {"codec": int8, "aggregator": TrimmedMean(0.2)},
        {"codec": ef21(topk(1 / 8)), "payload": Delta(2), "outer": SGD(), "schedule": Every(4, 1)},
        {"codec": ef21w(int8, (1, 2)), "aggregator": WeightedMean()},
        {"topology": Islands(2, between=Islands(2), inside=int8), "aggregator": WeightedMean()},
        {"payload": Delta(2), "outer": Eager(SGD()), "schedule": Every(4, 4), "topology": Islands(2), "codec": int8},
        {"payload": Delta(3), "outer": Rebase(Adam()), "schedule": Every(6, 3), "codec": topk(1 / 8) | int4 | zstd},
        {"payload": Parameters(2), "outer": Average(), "codec": zstd, "topology": RandomPairs(), "schedule": Every(3)},
        {
            "payload": Parameters(2),
            "outer": Mix(Average()),
            "codec": zstd,
            "topology": Torus(),
            "schedule": Every(9, 3),
        },
        {**GOSSIP, "topology": Window(3, 1), "aggregator": WeightedMean(), "schedule": At((4, 9))},
    ],
    ids=str,
)
def test_sensible_ones_are_accepted(answers):
    method = Method(**answers)
    assert all(getattr(method, name) == answer for name, answer in answers.items() if name != "codec")
    assert method.at(1) is method.at(10**9) is method


def test_a_codec_that_wants_feedback_gets_it():
    assert every_step(codec=topk(1 / 8)).codec == ErrorFeedback(topk(1 / 8))
    assert every_step(codec=topk(1 / 8) | int4).feedback == ErrorFeedback(topk(1 / 8) | int4)
    assert every_step(codec=int4).feedback is None
    without = every_step(codec=ErrorFeedback(topk(1 / 8), decay=0))
    assert without.codec == ErrorFeedback(topk(1 / 8), decay=0), "asked not to, it is not wrapped again"
    assert without.bare_codec == every_step(codec=topk(1 / 8)).bare_codec == topk(1 / 8)


def test_an_option_that_is_not_there_is_an_error():
    with pytest.raises(TypeError):
        diloco().but(color="red")
    with pytest.raises(TypeError):
        Method(speed=3)
    assert diloco().but(outer=SGD(0.3)).outer == SGD(0.3)
    with refused("delta meets a step made for gradient"):
        diloco().but(outer=NoStep())


#: Another value for every option of every named method.
OTHERS = {
    every_step: {"codec": int8},
    dgc: {
        "codec": topk(1 / 8), "momentum": 0.5, "masking": False, "nesterov": True, "clip": 1.0, "warmup": 7,
    },
    one_bit_adam: {"freeze": 7, "codec": int8, "beta1": 0.5, "beta2": 0.5, "eps": 1e-3},
    sign_sgd: {"block": 64},
    demo: {"codec": dct(1 / 8), "decay": 0.9},
    sparta: {"share": 0.1, "every": 3, "codec": int8},
    local_sgd: {"every": 7, "codec": int8},
    fedavg: {"every": 7, "codec": int8},
    post_local_sgd: {"switch": 7, "every": 7, "codec": int8},
    diloco: {"every": 7, "outer_lr": 0.3, "momentum": 0.5, "codec": int8},
    eager: {"every": 7, "fragments": 2, "outer_lr": 0.3, "momentum": 0.5, "codec": int8},
    delayed: {"every": 7, "fragments": 2, "outer_lr": 0.3, "momentum": 0.5, "codec": int8},
    co2: {"every": 7, "outer_lr": 0.3, "momentum": 0.5, "clip": None, "penalty": "gap", "codec": int8},
    slowmo: {"every": 7, "outer_lr": 0.3, "momentum": 0.2, "codec": int8},
    noloco: {"every": 7, "outer_lr": 0.3, "momentum": 0.3, "pull": 0.3, "codec": zstd},
    flasc: {"every": 7, "outer_lr": 0.3, "codec": topk(1 / 16)},
    ferret: {"every": 7, "outer_lr": 0.3, "codec": projection(9)},
    muloco: {"every": 7, "outer_lr": 0.3, "momentum": 0.5, "codec": int8},
    sparse_loco: {"every": 7, "outer_lr": 0.3, "decay": 0.5, "codec": topk(1 / 16)},
    gossip: {"every": 7, "topology": Torus(), "codec": zstd},
    late_merge: {"every": 7, "merge": 300, "rounds": 2, "topology": Ring(), "codec": zstd},
    streaming_diloco: {
        "every": 7, "fragments": 3, "overlap": 3, "keep": 0.3, "outer_lr": 0.3, "momentum": 0.5, "codec": int8,
    },
}  # fmt: skip


def test_every_option_of_every_method_changes_the_answers():
    assert set(OTHERS) == set(METHODS.values())
    for make, others in OTHERS.items():
        assert set(others) == set(make.__kwdefaults__), f"{make.__name__}: an option without an example here"
        told = [str(make().answers()), *(str(make(**{name: value}).answers()) for name, value in others.items())]
        assert len(set(told)) == len(told), make.__name__


@pytest.mark.parametrize(
    ("part", "others"),
    [
        (Every(4, 1), {"steps": 5, "overlap": 2}),
        (Delta(2), {"fragments": 3}),
        (Parameters(2), {"fragments": 3, "stretch": 2.0}),
        (Everyone(), {"shares": (0.5, 0.5)}),
        (Islands(2), {"size": 3, "between": RandomPairs(), "inside": int8}),
        (At((4,)), {"steps": (4, 5)}),
        (RandomPairs(), {"share": 0.5}),
        (Exponential(), {"one_peer": False}),
        (RandomGraph(2), {"degree": 3}),
        (Graph(((0, 1),)), {"lines": ((0, 1), (1, 2))}),
        (Window(1, 2), {"first": 2, "rounds": 3, "inside": Torus(), "outside": Ring()}),
        (TrimmedMean(0.1), {"share": 0.2}),
        (SGD(0.1, 0.5), {"lr": 0.2, "momentum": 0.6, "nesterov": True}),
        (Adam(), {"lr": 0.2, "betas": (0.1, 0.2), "eps": 0.1}),
        (Mix(SGD()), {"outer": SGD(0.3), "keep": 0.4}),
        (Rebase(SGD()), {"outer": SGD(0.3)}),
        (Towards(SGD()), {"outer": SGD(0.3)}),
        (Eager(SGD()), {"outer": SGD(0.3)}),
        (Restart(SGD()), {"outer": SGD(0.3)}),
        (ClippedMomentum(), {"lr": 0.2, "momentum": 0.6, "clip": 0.1, "penalty": Gap()}),
        (Gap(), {"weight": 2.0}),
        (SlowMo(), {"lr": 0.2, "momentum": 0.6}),
        (Scheduled(SGD()), {"outer": SGD(0.3), "warmup": 2, "decay": 3, "shape": "linear", "floor": 0.5}),
        (per_group(("a", SGD()), rest=SGD()), {"groups": (("b", SGD()),), "rest": SGD(0.3)}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_option_of_every_part_is_seen_in_its_words(part, others):
    assert set(others) == {option.name for option in fields(part) if option.init and option.repr}
    told = [repr(part), *(repr(replace(part, **{name: value})) for name, value in others.items())]
    assert len(set(told)) == len(told)


def test_parts_without_options_differ_in_words():
    assert (
        len({repr(part) for part in (Gradient(), Mean(), WeightedMean(), Median(), NoStep(), Average(), Everyone())})
        == 7
    )


def test_phases_change_after_the_switch():
    first, then = every_step(), diloco(every=4)
    phases = Phases(first, 5, then)
    assert phases.at(5) is first
    assert phases.at(6) is then
    assert phases.answers()["payload"] == "Gradient() to step 5, then Delta(fragments=1)"
    assert len({str(p.answers()) for p in (phases, Phases(first, 6, then), Phases(first, 5, diloco(every=5)))}) == 3


@pytest.mark.parametrize(
    ("first", "switch", "text"),
    [
        (every_step(), 0, "switch=0\n.*step 1 or later\n.*second method alone"),
        (streaming_diloco(every=4, fragments=1, keep=0.0), 4, "first phase overlaps .*\n.*\n.*overlap to 0"),
        (
            local_sgd(every=2).but(topology=RandomPairs()),
            4,
            "model of its own\n.*one model on all members.*\n.*Everyone.*or send Parameters",
        ),
        (
            diloco(every=3),
            4,
            r"ends at step 4, where Every\(steps=3, overlap=0\) has no round for all.*\n.*\n.*multiple of",
        ),
        (streaming_diloco(every=4, fragments=2, overlap=0), 4, "no round for all of its model"),
        (
            diloco(every=2).but(outer=Mix(SGD(), 0.5)),
            4,
            "keeps a share of every member's own model\n.*\n.*leave Mix out",
        ),
    ],
)
def test_phases_that_cannot_follow_are_refused(first, switch, text):
    with refused(text):
        Phases(first, switch, diloco())


def test_gradients_after_local_steps_are_refused():
    """Found by a run: Adam's moments differ between members, so that equal gradients make unequal steps."""
    with refused("second phase sends gradients, after .* local steps\n.*state of its own.*\n.*Delta.. with Every"):
        Phases(local_sgd(every=2), 4, every_step())


@pytest.mark.parametrize(
    "first", [every_step(), diloco(every=3), local_sgd(every=2), diloco(every=6).but(outer=Mix(SGD(), 0.0))]
)
def test_phases_that_end_with_a_round_are_accepted(first):
    assert Phases(first, 6, streaming_diloco()).at(7).payload.fragments == 4


def test_gossip_may_be_followed_by_what_needs_no_anchor():
    """And at any step: nothing is to end together."""
    assert Phases(gossip(every=4), 5, local_sgd(every=4)).at(6) == local_sgd(every=4)
    assert Phases(gossip(every=4), 5, gossip(topology=Torus())).at(6).topology == Torus()
    assert Phases(sparta(), 5, local_sgd(every=4)).at(5) == sparta(), "members of sparta are apart as well"
    with refused("first phase overlaps"):
        Phases(gossip(every=4).but(schedule=Every(4, 1)), 5, local_sgd(every=4))


def test_other_refusals_of_parts():
    with refused("0 fragments\n.*at least one\n.*fragments=1 sends the whole model"):
        Delta(0)
    with refused("-1 fragments"):
        Parameters(-1)
    with refused("islands of 0 members\n.*at least 1\n.*size=2 or more"):
        Islands(0)
    with refused(r"codec topk\(0.5\) inside islands: it needs error feedback, and there is none inside"):
        Islands(2, inside=topk(1 / 2))
    with refused(r"islands with Ring\(\) between them: every island .*\n.*in groups\n.*use Everyone\(\) or Random"):
        Islands(2, between=Ring())
    with refused("a share of 1.5 of the pairs\n.*number in .0, 1.\n.*0.2 every fifth"):
        RandomPairs(1.5)
    with refused("a window of 0 rounds from round 3 on\n.*at least one round.*\n.*window.30, 10."):
        Window(3, 0)
    with refused("a window of 1 rounds from round -1 on"):
        Window(-1, 1)


def test_routes():
    members = (0, 1, 2, 3, 4)
    assert Everyone().route(3, members, 9) == Group(members)
    tree = Islands(2).route(3, members, 9)
    assert tree == Tree(((0, 1), (2, 3), (4,)), fp32, Group((0, 2, 4)))
    assert members_of(tree) == members
    deep = Islands(2, between=Islands(2)).route(4, members, 9)
    assert members_of(deep) == members
    assert not Islands(2, between=RandomPairs()).consensus


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
def test_gossip_over_islands_pairs_whole_islands_and_everybody_agrees_on_them(count):
    members = tuple(range(count))
    topology = Islands(2, between=RandomPairs())
    for key in range(20):
        groups = {rank: members_of(topology.route(rank, members, key)) for rank in members}
        assert all(rank in group and all(groups[other] == group for other in group) for rank, group in groups.items())
