"""Global momentum fusion: DGC where nothing is fused, and what fusing does to the selection."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from doubles import Largest
from memories import Members
from small import same, sgd, train
from thinwire.codecs import dgc, fp32, gmf, int4, int8, parse, topk, warmup, zstd
from thinwire.errors import ConfigError
from thinwire.links.local import run
from thinwire.methods import every_step


def vectors(count: int, n: int, seed: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=g) for _ in range(count)]


@settings(deadline=None, max_examples=25)
@given(share=st.floats(0.05, 1.0), seed=st.integers(0, 99))
def test_without_tau_it_is_dgc_to_the_bit(share, seed):
    fused, plain = Members(gmf(topk(share), tau=0.0), 2), Members(dgc(topk(share)), 2)
    for number in range(4):
        given = vectors(2, 40, 10 * seed + number)
        assert torch.equal(fused.round(given), plain.round(given))
        for a, b in zip(fused.own, plain.own, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in b)


def test_without_tau_it_is_dgc_over_a_link_too():
    ours, theirs = (
        run(3, lambda link, codec=codec: train(link, every_step(codec=codec), 6, make_optimizer=sgd))
        for codec in (gmf(topk(1 / 4) | int4, tau=0.0), dgc(topk(1 / 4) | int4))
    )
    assert all(same(a.live, b.live) for a, b in zip(ours, theirs, strict=True))
    fused = run(3, lambda link: train(link, every_step(codec=gmf(topk(1 / 4) | int4)), 6, make_optimizer=sgd))
    assert not same(fused[0].live, theirs[0].live)
    assert all(same(fused[0].live, other.live) for other in fused)


def test_a_round_by_hand():
    """After M = (0, 4, 0): scores of v = (3, 2, 1), |v| = sqrt 14, |M| = 4, tau = 1/2: .40, .27 + .5, .13."""
    group = Members(gmf(topk(1 / 3), tau=0.5, momentum=0.0), 1)
    assert group.round([torch.tensor([0.0, 4.0, 0.0])]).tolist() == [0, 4, 0]
    assert group.round([torch.tensor([3.0, 2.0, 1.0])]).tolist() == [0, 2, 0], "the second entry, and v itself there"
    assert group.own[0]["residual"].tolist() == [3, 0, 1]
    assert torch.allclose(group.shared["global"], torch.tensor([0.0, 0.9 * 4 + 2, 0.0]))
    assert int(group.shared["rounds"]) == 2
    plain = Members(gmf(topk(1 / 3), tau=0.1, momentum=0.0), 1)
    plain.round([torch.tensor([0.0, 4.0, 0.0])])
    assert plain.round([torch.tensor([3.0, 2.0, 1.0])]).tolist() == [3, 0, 0]


def test_signs_count():
    """An entry that moves against the global momentum scores less than one of the same size that moves along."""
    group = Members(gmf(topk(1 / 2), tau=0.5, momentum=0.0), 1)
    group.round([torch.tensor([0.0, 2.0])])
    assert group.round([torch.tensor([1.5, -2.0])]).tolist() == [1.5, 0]


def test_members_agree_more_on_where_to_send():
    """The point of it: of four members with vectors of their own and a common part, the union of entries is smaller."""

    def union(tau: float) -> float:
        group, common, sizes = Members(gmf(topk(1 / 16), tau=tau), 4), torch.randn(512), []
        for number in range(12):
            group.round([0.3 * common + x for x in vectors(4, 512, number)])
            sizes.append(int((torch.stack(group.sent) != 0).any(dim=0).sum()))
        return sum(sizes[4:])

    assert union(0.6) < 0.8 * union(0.0)
    assert union(0.99) < union(0.6)


def test_zeros_have_no_direction():
    group = Members(gmf(topk(1 / 2)), 1)
    for x in (torch.zeros(4), torch.ones(4), torch.zeros(4)):
        assert group.round([x]).isfinite().all()
    huge = Members(gmf(topk(1 / 2)), 1)
    for _ in range(2):
        assert huge.round([torch.full((4,), 1e38)]).isfinite().all()
        assert huge.shared["global"].isfinite().all()


def test_tau_rises_in_ten_stages():
    scheme = gmf(topk(1 / 2), tau=0.9, rounds=20)
    group, seen = Members(scheme, 1), []
    for _ in range(24):
        seen.append(round(scheme._tau(group.shared), 6))
        group.round([torch.ones(4)])
    assert seen[:2] == [0, 0]
    assert seen[2:20:2] == seen[3:20:2] == [round(0.9 * stage / 9, 6) for stage in range(1, 10)]
    assert seen[20:] == [0.9] * 4
    at_once = Members(gmf(topk(1 / 2)), 1)
    assert at_once.memory._tau(at_once.shared) == 0
    at_once.round([torch.ones(4)])
    assert at_once.memory._tau(at_once.shared) == 0.6


def test_a_member_that_a_round_did_not_count_keeps_its_own_and_all_move_what_is_shared():
    group = Members(gmf(topk(1 / 2)), 2)
    group.round([torch.ones(4)] * 2)
    before, moved = group.own[1], group.shared["global"]
    group.round([torch.ones(4), None])
    assert group.own[1] is before
    assert not torch.equal(group.shared["global"], moved)


def test_expression():
    for scheme in (gmf(topk(1 / 64)), gmf(topk(1 / 64) | int4 | zstd, 0.5, 0.5, 0.5, 10)):
        assert parse(scheme.spec) == scheme
    assert gmf(topk(1 / 64), tau=0.5, rounds=220).spec == "gmf(topk(0.015625), tau=0.5, rounds=220)"


def test_what_does_not_select_by_magnitude_is_refused():
    said = r"gmf around fp32: it does not select by magnitude\n.*topk, or a chain that begins with it\n.*dgc\(...\)"
    with pytest.raises(ConfigError, match=said):
        gmf(fp32)
    with pytest.raises(ConfigError, match="gmf around int8: it does not keep some elements"):
        gmf(int8)
    with pytest.raises(ConfigError, match=r"gmf around warmup.*: it does not select by magnitude"):
        gmf(warmup(topk(1 / 64), rounds=5))
    with pytest.raises(ConfigError, match=r"gmf around largest\(0.5\): it does not select by magnitude"):
        gmf(Largest(0.5))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tau": 1.0}, "gmf with tau 1.0\n  expected  a number at least 0 and below 1\n  mend      0.6 is"),
        ({"beta": -1}, "gmf with beta -1\n  expected  a number at least 0 and below 1"),
        ({"momentum": math.inf}, "gmf with momentum inf"),
        ({"rounds": 1.5}, "gmf is to raise tau over 1.5 rounds\n  expected  a whole number, at least 0"),
        ({"rounds": -1}, "gmf is to raise tau over -1 rounds"),
    ],
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        gmf(topk(1 / 4), **options)


@pytest.mark.parametrize("options", [{"tau": 0.3}, {"beta": 0.1}, {"momentum": 0.5}, {"rounds": 4}])
def test_every_option_changes_the_result(options):
    group, other = Members(gmf(topk(1 / 8)), 2), Members(gmf(topk(1 / 8), **options), 2)
    rounds = [vectors(2, 64, number) for number in range(8)]
    assert any(not torch.equal(group.round(given), other.round(given)) for given in rounds)
