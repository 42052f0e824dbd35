"""EF21 and its relatives: estimates that follow what members send, and the mean of them that all know."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from memories import Members, vectors
from small import train
from thinwire import every_step
from thinwire.aggregators import WeightedMean
from thinwire.codecs import (
    EF21SGDM,
    EControl,
    Feedback,
    Staged,
    diana,
    econtrol,
    ef21,
    ef21_sgdm,
    ef21w,
    feedback,
    fp16,
    fp32,
    int4,
    int8,
    parse,
    randk,
    topk,
)
from thinwire.codecs.base import Shapes
from thinwire.codecs.feedback import Place
from thinwire.codecs.stages import Exchanged, Result, Stage, Tensors
from thinwire.errors import ConfigError
from thinwire.links.local import run

EPS = torch.finfo(torch.float32).eps
FAMILY = [
    ef21(topk(1 / 8)),
    ef21w(topk(1 / 8), smoothness=(1.0, 2.0, 5.0)),
    ef21_sgdm(topk(1 / 8)),
    ef21_sgdm(topk(1 / 8), eta=0.5, double=True),
    econtrol(topk(1 / 8)),
    econtrol(int4(block=64)),
]
family = pytest.mark.parametrize("memory", FAMILY, ids=lambda memory: memory.spec)


def updates(memory: Feedback, members: int = 3, rounds: int = 6, n: int = 40) -> Iterator[tuple[Tensor, Members]]:
    group = Members(memory, members)
    for number in range(rounds):
        yield group.round(vectors(members, n, number)), group


def same_updates(a: Feedback, b: Feedback, members: int = 3, **options: int) -> bool:
    pairs = zip(updates(a, members, **options), updates(b, members, **options), strict=True)
    return all(torch.equal(x, y) for (x, _), (y, _) in pairs)


# What the schemes share -----------------------------------------------------------------------------------------------


@family
def test_the_update_is_what_all_know_the_mean_of_estimates(memory: Feedback) -> None:
    """Tolerance: eight rounds of three additions each, of numbers below 8."""
    for update, group in updates(memory, rounds=8):
        assert torch.equal(update, group.shared["estimate"])
        weights = [memory.weight(group.place(rank)) or 1 / 3 for rank in range(3)]
        mean = sum(w * own["estimate"] for w, own in zip(weights, group.own, strict=True))
        torch.testing.assert_close(update, mean, rtol=0, atol=8 * 3 * 8 * EPS)


@family
def test_who_is_left_out_keeps_its_estimate_and_is_still_in_the_mean(memory: Feedback) -> None:
    group = Members(memory, 3)
    group.round(vectors(3, 40, 0))
    before = group.own[1]
    x = vectors(3, 40, 1)
    update = group.round([x[0], None, x[2]])
    assert group.own[1] is before
    weights = [memory.weight(group.place(rank)) or 1 / 3 for rank in range(3)]
    mean = sum(w * own["estimate"] for w, own in zip(weights, group.own, strict=True))
    torch.testing.assert_close(update, mean, rtol=0, atol=16 * EPS)
    alone = group.round([None, x[1], None])
    assert not torch.equal(alone, update), "a share of the members moves the mean by its share"


def test_a_member_alone_gets_its_own_estimate_to_the_bit() -> None:
    for memory in (ef21(topk(1 / 8)), ef21_sgdm(topk(1 / 8)), econtrol(topk(1 / 8)), ef21w(topk(1 / 8), (3.0,))):
        for update, group in updates(memory, members=1):
            assert torch.equal(update, group.own[0]["estimate"])


@pytest.mark.parametrize("codec", [fp32, topk(1)], ids=str)
def test_a_codec_that_drops_nothing_makes_it_the_plain_mean(codec: object) -> None:
    """Tolerance: estimate + (x - estimate), then the mean by mean + (change of the mean): two roundings of numbers
    below 8 in each of 6 rounds."""
    for memory in (ef21(codec), ef21w(codec, (1.0, 2.0, 5.0)), ef21_sgdm(codec, eta=1.0), econtrol(codec)):
        for number, (update, _) in enumerate(updates(memory)):
            plain = torch.stack(vectors(3, 40, number)).mean(dim=0)
            torch.testing.assert_close(update, plain, rtol=0, atol=6 * 2 * 8 * EPS)


def test_small_whole_numbers_make_it_the_plain_mean_to_the_bit() -> None:
    """Four members, dyadic numbers: nothing rounds."""
    for memory in (ef21(fp32), ef21w(fp32, (1, 1, 2, 4)), ef21_sgdm(fp32, eta=1.0), econtrol(fp32)):
        group = Members(memory, 4)
        for number in range(5):
            x = [torch.arange(12.0) * (rank - number) for rank in range(4)]
            assert torch.equal(group.round(x), torch.stack(x).mean(dim=0))


@pytest.mark.parametrize("codec", [topk(1 / 8), int8, topk(1 / 4) | int4], ids=lambda codec: codec.spec)
def test_what_an_estimate_misses_shrinks_by_the_codecs_contraction(codec: object) -> None:
    """||x - g'||^2 <= (1 - delta) ||x - g||^2, up to the rounding of g + c."""
    group = Members(ef21(codec), 1)
    x, before = vectors(1, 64)[0], torch.zeros(64)
    for _ in range(20):
        estimate = group.round([x])
        bound = (1 - codec.contraction(64)) * (x - before).square().sum()
        assert (x - estimate).square().sum() <= bound + 64 * (8 * EPS) ** 2
        before = estimate


def test_on_a_constant_vector_the_estimate_arrives_and_what_is_sent_vanishes() -> None:
    group, x = Members(ef21(topk(1 / 8)), 2), vectors(2, 40)
    for _ in range(8):
        update = group.round(x)
    assert torch.equal(update, torch.stack(x).mean(dim=0)), "8 rounds of an eighth: every entry was sent once"
    assert torch.equal(group.round(x), update)


@family
def test_nothing_given_is_changed(memory: Feedback) -> None:
    place = Place(1, (0, 1, 2))
    group = Members(memory, 3)
    group.round(vectors(3, 40))
    x, own, shared = vectors(3, 40, 1)[1], group.own[1], group.shared
    kept = x.clone(), {k: v.clone() for k, v in own.items()}, {k: v.clone() for k, v in shared.items()}
    target, held = memory.prepare(x, own, shared, place)
    memory.commit(target, held, target.clone())
    memory.receive(target, shared, 0.5)
    assert torch.equal(x, kept[0])
    assert all(torch.equal(own[k], v) for k, v in kept[1].items())
    assert all(torch.equal(shared[k], v) for k, v in kept[2].items())


# EF21-W ---------------------------------------------------------------------------------------------------------------


def test_equal_smoothness_is_ef21_to_the_bit() -> None:
    assert same_updates(ef21w(topk(1 / 8), smoothness=(0.3,) * 4), ef21(topk(1 / 8)), members=4)
    assert not same_updates(ef21w(int4, smoothness=(1, 1, 3, 3)), ef21(int4), members=4)


def test_with_a_codec_that_scales_as_its_input_does_it_is_ef21_to_the_bit_whatever_the_weights() -> None:
    """C(a x) = a C(x): then w g and g / N are the same sequence. Powers of two, so that no product rounds."""
    assert same_updates(ef21w(topk(1 / 8), smoothness=(1, 1, 2, 4)), ef21(topk(1 / 8)), members=4)


def test_weights_and_shares_are_those_of_the_smoothness() -> None:
    memory, ranks = ef21w(topk(1 / 8), smoothness=(1, 2, 5)), (3, 4, 9)
    assert [memory.weight(Place(rank, ranks)) for rank in ranks] == [1 / 8, 2 / 8, 5 / 8]
    assert memory.share((3, 9), ranks) == 6 / 8
    assert memory.share(ranks, ranks) == 1


@pytest.mark.parametrize("count", [2, 4])
def test_another_number_of_members_than_numbers_is_refused(count: int) -> None:
    memory = ef21w(topk(1 / 8), smoothness=(1, 2, 5))
    said = rf"ef21w with the smoothness of 3 members, in a group of {count}\n  expected  one number for each member"
    with pytest.raises(ConfigError, match=said):
        Members(memory, count).round(vectors(count, 16))
    with pytest.raises(ConfigError, match=said):
        run(count, lambda link: train(link, every_step().but(codec=memory, aggregator=WeightedMean()), 1))


@pytest.mark.parametrize(
    "smoothness", [(), 3.0, (1, 0), (1, -2.0), (1, math.inf), (1, math.nan), (1, True), (1, "2"), ((1, 2), 3), "12"]
)
def test_smoothness_that_is_none_is_refused(smoothness: object) -> None:
    said = f"ef21w with smoothness {smoothness!r}\n  expected  a finite number above 0 for each member, in order of"
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        ef21w(topk(1 / 8), smoothness=smoothness)  # type: ignore[arg-type]
    assert "smoothness=(1, 1, 4)" in caught.value.mend


# EF21-SGDM ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [False, True])
def test_eta_one_is_ef21_to_the_bit(double: bool) -> None:
    assert same_updates(ef21_sgdm(topk(1 / 8), eta=1.0, double=double), ef21(topk(1 / 8)))


def test_eta_and_double_change_the_result() -> None:
    one, slow, twice = (
        ef21_sgdm(topk(1 / 8), eta, double) for eta, double in ((0.5, False), (0.1, False), (0.5, True))
    )
    assert not same_updates(one, slow)
    assert not same_updates(one, twice)


def test_the_running_means_by_hand() -> None:
    """2, then 6, then 6 at eta 1/2: v = 2, 4, 5 and u = 2, 3, 4; fp32 drops nothing."""
    for double, expected in ((False, [2, 4, 5]), (True, [2, 3, 4])):
        group = Members(ef21_sgdm(fp32, eta=0.5, double=double), 1)
        assert [group.round([torch.full((3,), x)]).tolist() for x in (2.0, 6.0, 6.0)] == [[v] * 3 for v in expected]


def test_it_takes_noise_out() -> None:
    """A constant in noise of spread 1, eta = 0.1: a mean of 19 draws in effect, so its spread is about 0.23."""
    g = torch.Generator().manual_seed(0)
    noisy, calm = Members(ef21(topk(1 / 2)), 1), Members(ef21_sgdm(topk(1 / 2), eta=0.1), 1)
    for _ in range(100):
        x = [3 + torch.randn(4096, generator=g)]
        spread = noisy.round(x).std(), calm.round(x).std()
    assert spread[0] > 0.8
    assert 0.2 < spread[1] < 0.35


@pytest.mark.parametrize("eta", [0, 0.0, -0.1, 1.5, math.nan, True, "0.1", None])
def test_etas_of_momentum_out_of_range_are_refused(eta: object) -> None:
    said = f"ef21_sgdm with eta {eta!r}\n  expected  a number above 0 and at most 1\n  mend      leave it out for 0.1"
    with pytest.raises(ConfigError, match=re.escape(said)):
        ef21_sgdm(topk(1 / 8), eta=eta)  # type: ignore[arg-type]


def test_double_is_yes_or_no() -> None:
    with pytest.raises(ConfigError, match=r"ef21_sgdm with double 2\n  expected  True or False"):
        ef21_sgdm(topk(1 / 8), double=2)  # type: ignore[arg-type]


# EControl -------------------------------------------------------------------------------------------------------------


def test_without_eta_it_is_ef21_to_the_bit() -> None:
    assert same_updates(econtrol(topk(1 / 8), eta=0.0), ef21(topk(1 / 8)))
    assert not same_updates(econtrol(topk(1 / 8), eta=0.1), ef21(topk(1 / 8)))


def test_nothing_is_lost() -> None:
    """sum of estimates + residual == sum of vectors; exact, because small dyadic sums do not round in float32."""
    group, total, given = Members(econtrol(topk(1 / 8), eta=0.5), 1), torch.zeros(40), torch.zeros(40)
    for number in range(6):
        x = (vectors(1, 40, number)[0] * 16).round() / 16
        total, given = total + group.round([x]), given + x
        assert torch.equal(total + group.own[0]["residual"], given)
    assert group.own[0]["residual"].any()


def test_the_rule_for_eta_is_half_the_contraction_and_at_most_a_twentieth() -> None:
    assert econtrol(topk(1 / 50)).share_fed_back(100) == 0.01
    assert econtrol(topk(1 / 50)).share_fed_back(10) == 0.05, "one of ten"
    assert econtrol(int8).share_fed_back(1000) == 0.05
    assert econtrol(topk(1 / 50), eta=0.3).share_fed_back(100) == 0.3
    assert same_updates(econtrol(topk(1 / 40)), econtrol(topk(1 / 40), eta=1 / 80))
    assert not same_updates(econtrol(topk(1 / 40)), econtrol(topk(1 / 40), eta=1 / 40))


@pytest.mark.parametrize("eta", [-0.1, 1.5, math.nan, True, "0.1"])
def test_etas_of_the_residual_out_of_range_are_refused(eta: object) -> None:
    said = f"econtrol with eta {eta!r}\n  expected  a number at least 0 and at most 1\n  mend      leave it out"
    with pytest.raises(ConfigError, match=re.escape(said)):
        econtrol(topk(1 / 8), eta=eta)  # type: ignore[arg-type]


# DIANA ----------------------------------------------------------------------------------------------------------------


def test_diana_on_a_constant_vector_arrives_while_the_codec_alone_stays_noisy() -> None:
    """The error that is left shrinks by about 1 - alpha a round; randk(1/4) has omega 3, so alpha is 1/4."""
    x, codec = vectors(2, 40), randk(1 / 4, scaled=True)
    plain = torch.stack(x).mean(dim=0)
    group, noisy = Members(diana(codec), 2), Members(feedback(codec, decay=0), 2)
    assert diana(codec).share_followed(40) == pytest.approx(1 / 4)
    for _ in range(100):
        update, alone = group.round(x), noisy.round(x)
    torch.testing.assert_close(update, plain, rtol=0, atol=100 * 4 * EPS)
    assert (alone - plain).norm() > 0.5 * plain.norm()


def test_dianas_update_is_right_in_the_mean_from_the_first_round_on() -> None:
    """Over 400 runs of three rounds, up to 5 standard errors."""
    x, rounds = vectors(1, 24), []
    for draw in range(400):
        group = Members(diana(randk(1 / 4, scaled=True)), 1, rounds=1000 * draw)  # other keys
        rounds.append(torch.stack([group.round(x) for _ in range(3)]))
    off = torch.stack(rounds).double() - x[0].double()
    assert (off.mean(dim=0).abs() <= 5 * off.std(dim=0) / math.sqrt(400) + 16 * EPS).all()


def test_dianas_alpha_changes_the_result_and_one_without_noise_is_ef21() -> None:
    codec = int4(rounding="stochastic")
    assert not same_updates(diana(codec), diana(codec, alpha=0.1))
    assert same_updates(diana(fp32), ef21(fp32))


@pytest.mark.parametrize("alpha", [0, -0.1, 1.5, math.nan, True, "0.1"])
def test_dianas_alphas_out_of_range_are_refused(alpha: object) -> None:
    said = f"diana with alpha {alpha!r}\n  expected  a number above 0 and at most 1\n  mend      leave it out for 1 / ("
    with pytest.raises(ConfigError, match=re.escape(said)):
        diana(fp32, alpha=alpha)  # type: ignore[arg-type]


@pytest.mark.parametrize("codec", [topk(1 / 8), int4], ids=lambda codec: codec.spec)
def test_diana_refuses_codecs_that_are_not_unbiased(codec: object) -> None:
    with pytest.raises(ConfigError, match=r"diana around .*: it is not unbiased with a bounded variance"):
        diana(codec)


# EControl around several exchanges ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Halved(Staged):
    """One exchange of half the vector's entries."""

    @property
    def spec(self) -> str:
        return "halved"

    @property
    def wants_feedback(self) -> bool:
        return True

    def run(self, x: Tensor, shared: Tensors, key: int):
        half = len(x) // 2
        combined, sent = yield Stage(x[:half])
        return Result(*(torch.cat([value, x.new_zeros(len(x) - half)]) for value in Exchanged(combined, sent)), shared)

    def fit(self, shapes: Shapes) -> Halved:
        return self


def test_around_several_exchanges_eta_must_be_given() -> None:
    said = (
        r"econtrol around halved without eta: its contraction depends on the data\n.*\n  mend      econtrol\(halved, e"
    )
    with pytest.raises(ConfigError, match=said):
        econtrol(Halved())
    assert econtrol(Halved(), eta=0.01).share_fed_back(7) == 0.01


# What they go around --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [ef21, lambda codec: ef21w(codec, (1, 2)), ef21_sgdm, econtrol])
def test_codecs_of_another_class_are_refused(make: object) -> None:
    for codec in (fp16, int4(block=4096, rounding="stochastic")):
        with pytest.raises(ConfigError, match=r"around .*: its error may be larger than what it is given") as caught:
            make(codec)
        assert "a contractive codec" in caught.value.expected
    with pytest.raises(ConfigError, match=r"around ErrorFeedback\(.*\n  expected  a codec, or a chain of them"):
        make(feedback(int8))
    with pytest.raises(ConfigError, match=r"\| ...: what follows would be outside the error memory"):
        make(topk(1 / 2)) | int4


@family
def test_expressions(memory: Feedback) -> None:
    assert parse(memory.spec) == memory


def test_expressions_name_what_differs_from_the_default() -> None:
    assert ef21(topk(1 / 64) | int4).spec == "ef21(topk(0.015625) | int4)"
    assert ef21w(int8, [1, 2]).spec == "ef21w(int8, smoothness=(1.0, 2.0))"  # type: ignore[arg-type]
    assert EF21SGDM(int8).spec == "ef21_sgdm(int8)"
    assert EF21SGDM(int8, 0.2, True).spec == "ef21_sgdm(int8, eta=0.2, double=True)"
    assert EControl(int8).spec == "econtrol(int8)"
    assert EControl(int8, 0).spec == "econtrol(int8, eta=0)"
