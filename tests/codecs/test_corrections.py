"""SCALLION and SCAFCOM: SCAFFOLD when nothing is lost, exact when something is, and what alpha must not be."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import thinwire
from doubles import Chosen, Largest
from memories import Members
from small import same, train
from thinwire.aggregators import Median, WeightedMean
from thinwire.codecs import Feedback, fp16, fp32, int4, int8, parse, scafcom, scallion, topk, zstd
from thinwire.errors import ConfigError
from thinwire.links.local import run
from thinwire.method import Method
from thinwire.methods import diloco, every_step
from thinwire.outer import SGD
from thinwire.payloads import Delta
from thinwire.schedules import Every
from thinwire.topologies import Islands

SCHEMES = {"scallion": scallion(fp32, alpha=1.0), "scafcom": scafcom(fp32, beta=1.0)}
both = pytest.mark.parametrize("name", SCHEMES)


def federated(codec: Feedback, every: int = 4) -> Method:
    return Method(schedule=Every(every), payload=Delta(), codec=codec, outer=SGD(1.0))


# --- SCAFFOLD ---------------------------------------------------------------------------------------------------

DIM, MEMBERS, LOCAL, ROUNDS, LR = 12, 3, 4, 6, 0.125


def quadratic(rank: int) -> tuple[Tensor, Tensor]:
    """H [DIM, DIM] and c [DIM] of a member's loss x H x / 2 - c x, float64; eigenvalues of H in [1/2, 2]."""
    g = torch.Generator().manual_seed(rank)
    turn = torch.linalg.qr(torch.randn(DIM, DIM, generator=g, dtype=torch.float64)).Q
    scale = torch.linspace(0.5, 2, DIM, dtype=torch.float64)
    return turn @ torch.diag(scale) @ turn.T, torch.randn(DIM, generator=g, dtype=torch.float64)


def scaffold(num_members: int) -> Tensor:
    """Karimireddy et al. 2020, Alg. 1, option II, all members in every round, server's step 1; float64 [DIM]."""
    x = c = torch.zeros(DIM, dtype=torch.float64)
    variate = [c] * num_members
    for _ in range(ROUNDS):
        models = []
        for rank in range(num_members):
            (h, b), y = quadratic(rank), x
            for _ in range(LOCAL):
                y = y - LR * (h @ y - b - variate[rank] + c)
            models.append(y)
        after = [variate[rank] - c + (x - y) / (LOCAL * LR) for rank, y in enumerate(models)]
        x = torch.stack(models).mean(dim=0)
        c = c + (torch.stack(after) - torch.stack(variate)).mean(dim=0)
        variate = after
    return x


def training(link, method: Method, rounds: int = ROUNDS, *, poisoned: tuple[int, ...] = ()) -> tuple[Tensor, dict]:
    """Plain SGD on the member's quadratic through the synchronizer: the model [DIM], and what it remembers."""
    model = nn.Linear(DIM, 1, bias=False)
    nn.init.zeros_(model.weight)
    h, b = (part.float() for part in quadratic(link.rank))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with thinwire.synchronize(model, optimizer, method, link) as sync:
        for step in range(rounds * LOCAL):
            x = model.weight.detach().view(-1)
            model.weight.grad = (h @ x - b).view(1, -1)
            if step in poisoned and link.rank == 1:
                model.weight.grad.fill_(math.nan)
            optimizer.step()
        carried = sync.state_dict()["fragments"][0]["carried"]
    return model.weight.detach().view(-1).clone(), carried


@both
@pytest.mark.parametrize("members", [1, 2, MEMBERS])
def test_nothing_lost_and_whole_steps_are_scaffold(name, members):
    """Float32 against float64: some 20 roundings of numbers up to 4 in each of 24 contracting steps."""
    model, _ = run(members, lambda link: training(link, federated(SCHEMES[name])))[0]
    assert torch.allclose(model.double(), scaffold(members), rtol=0, atol=24 * 20 * 4 * 2.0**-24)
    if members > 1:
        plain, _ = run(members, lambda link: training(link, federated(fp32)))[0]
        assert not torch.allclose(model, plain, atol=1e-3), "without corrections members drift"


@both
def test_the_shared_variate_is_the_mean_of_the_members(name):
    """With a lossy codec. Tolerance: float32 sums over six rounds, in another order."""
    codec = {"scallion": scallion(int4(block=4, rounding="stochastic")), "scafcom": scafcom(topk(1 / 4))}[name]
    results = run(MEMBERS, lambda link: training(link, federated(codec)))
    own = torch.stack([carried["own"]["control"] for _, carried in results]).mean(dim=0)
    for _, carried in results:
        assert torch.allclose(carried["shared"]["control"], own, atol=1e-6)
        assert torch.equal(carried["shared"]["control"], results[0][1]["shared"]["control"])
    assert own.abs().max() > 0.01


@both
def test_a_member_left_out_keeps_its_variate_and_the_mean_stays_the_mean(name):
    """Member 1 has no finite values in the third round: it takes the others' model, and goes on."""
    out = (2 * LOCAL,)
    before = run(MEMBERS, lambda link: training(link, federated(SCHEMES[name]), 2))
    after = run(MEMBERS, lambda link: training(link, federated(SCHEMES[name]), 3, poisoned=out))
    kept = [torch.equal(a[1]["own"]["control"], b[1]["own"]["control"]) for a, b in zip(before, after, strict=True)]
    assert kept == [False, True, False]
    own = torch.stack([carried["own"]["control"] for _, carried in after]).mean(dim=0)
    assert torch.allclose(after[0][1]["shared"]["control"], own, atol=1e-6)
    assert all(torch.equal(model, after[0][0]) for model, _ in after)
    late = run(MEMBERS, lambda link: training(link, federated(SCHEMES[name]), 60, poisoned=out))[0][0]
    h, b = (torch.stack(part).sum(dim=0) for part in zip(*(quadratic(rank) for rank in range(MEMBERS)), strict=True))
    assert torch.allclose(late.double(), torch.linalg.solve(h, b), atol=1e-5), "it still ends at the optimum"


@both
def test_a_group_that_changes_begins_without_variates(name):
    """Shared variates are of those who were there: two of three go on, and both have none."""
    method = federated(SCHEMES[name])

    def first(link):
        model = nn.Linear(DIM, 1, bias=False)
        nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        with thinwire.synchronize(model, optimizer, method, link) as sync:
            for _ in range(LOCAL):
                model.weight.grad = torch.full((1, DIM), float(link.rank))
                optimizer.step()
            return sync.state_dict(), {name: value.clone() for name, value in model.state_dict().items()}

    saved = run(MEMBERS, first)

    def second(link):
        model = nn.Linear(DIM, 1, bias=False)
        nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        with thinwire.synchronize(model, optimizer, method, link) as sync:
            model.load_state_dict(saved[link.rank][1])
            sync.load_state_dict(saved[link.rank][0])
            return sync.state_dict()["fragments"][0]["carried"]

    assert all(carried["own"] and carried["shared"] for carried in run(MEMBERS, second))
    for carried in run(2, second):
        assert carried["own"] == {}
        assert carried["shared"] == {}


def test_nothing_is_encoded_twice_around_an_unbiased_codec():
    """Three members and a codec that could be: with scallion each hears of each, and combines what was sent."""
    codec = int8(block=2, rounding="stochastic")
    x = [torch.randn(600, generator=torch.Generator().manual_seed(rank)) for rank in range(3)]
    assert scallion(codec).keeps is None

    def member(link, scheme):
        model = nn.Linear(600, 1, bias=False)
        nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        with thinwire.synchronize(model, optimizer, federated(scheme, 1), link) as sync:
            model.weight.grad = x[link.rank].view(1, -1)
            optimizer.step()
            return sync.state_dict()["fragments"][0]["carried"], link.meter.total().sent_bytes

    once = run(3, lambda link: member(link, scallion(codec)))
    own = torch.stack([carried["own"]["control"] for carried, _ in once]).mean(dim=0)
    assert torch.allclose(once[0][0]["shared"]["control"], own, atol=1e-7), "what is combined is what was sent"
    twice = run(3, lambda link: member(link, scafcom(codec)))
    own = torch.stack([carried["own"]["control"] for carried, _ in twice]).mean(dim=0)
    assert (twice[0][0]["shared"]["control"] - own).abs().max() > 1e-4
    assert twice[0][1] < once[0][1]


# --- heterogeneous least squares, partial participation (problem C) ------------------------------------------------


def least_squares(members: int = 10, dim: int = 50) -> tuple[Tensor, Tensor]:
    """Hessians [m, d, d] and right sides [m, d] of members whose optima lie far apart, float64."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(members, 2 * dim, dim, generator=g, dtype=torch.float64) / 10
    optima = 3 * torch.randn(members, dim, generator=g, dtype=torch.float64)
    h = a.transpose(1, 2) @ a
    return h, (h @ optima.unsqueeze(-1)).squeeze(-1)


def distance(scheme: Feedback, rounds: int, *, taking: int = 10, local: int = 5, lr: float = 0.1) -> float:
    """From the optimum, relative, after rounds in which `taking` of ten members take part; inf if it blew up."""
    h, b = least_squares()
    optimum = torch.linalg.solve(h.sum(dim=0), b.sum(dim=0))
    group, x, g = Members(scheme, len(b)), torch.zeros_like(optimum), torch.Generator().manual_seed(0)
    for _ in range(rounds):
        present = torch.randperm(len(b), generator=g)[:taking].sort().values
        found = [scheme.drift(group.own[rank], group.shared) for rank in present]
        drift = torch.stack([torch.zeros_like(x) if each is None else each for each in found])
        y, hs, bs = x.expand(len(present), -1), h[present], b[present]
        for _ in range(local):
            y = y - lr * (torch.bmm(hs, y.unsqueeze(-1)).squeeze(-1) - bs) + drift / local
        given: list[Tensor | None] = [None] * len(b)
        for rank, model in zip(present.tolist(), y, strict=True):
            given[rank] = x - model
        x = x - group.round(given)
        if not x.norm() < 1e12:
            return math.inf
    return float((x - optimum).norm() / optimum.norm())


def test_alpha_up_to_one_over_one_plus_omega_converges_and_above_it_diverges():
    """A tenth of the entries at random: omega = 9."""
    assert distance(scallion(Chosen(0.1)), 800) < 1e-7
    assert distance(scallion(Chosen(0.1)), 60) == distance(scallion(Chosen(0.1), alpha=0.1), 60)
    assert distance(scallion(Chosen(0.1), alpha=1.0), 80) == math.inf


def test_with_a_tenth_of_the_entries_and_a_quarter_of_the_members_it_ends_at_the_optimum():
    assert distance(scafcom(Largest(0.1), beta=0.3), 1200, taking=3) < 1e-8
    assert distance(scafcom(Largest(0.1), beta=1.0), 500, taking=3) < 1e-8
    assert distance(thinwire.codecs.feedback(Largest(0.1)), 200, taking=3) > 0.1, "the classic memory does not"


def test_beta_below_one_averages_the_noise_of_gradients():
    """One member, everything sent, noise alone: the variate is a moving average, and varies as such."""

    def spread(beta: float) -> float:
        group, g, seen = Members(scafcom(fp32, beta=beta), 1), torch.Generator().manual_seed(0), []
        for _ in range(100):
            drift = group.memory.drift(group.own[0], group.shared)
            x = torch.randn(64, generator=g)
            seen.append(group.round([x if drift is None else x - drift]))
        return float(torch.stack([b - a for a, b in pairwise(seen[20:])]).std())

    assert spread(0.1) < 0.2 * spread(1.0)


# --- composition ------------------------------------------------------------------------------------------------


@both
def test_what_it_cannot_be_composed_with(name):
    scheme = SCHEMES[name]
    for answers, said in [
        ({"aggregator": Median()}, "with aggregator Median.*\n.*a plain mean"),
        ({"aggregator": WeightedMean()}, "with aggregator WeightedMean.*\n.*a plain mean"),
        ({"topology": Islands(2)}, "over Islands.*\n.*members that combine directly"),
        ({"schedule": Every(4, 1)}, "it corrects the local steps of whole rounds\n.*Delta\\(\\) in one fragment"),
        ({"payload": Delta(2)}, "it corrects the local steps of whole rounds"),
    ]:
        with pytest.raises(ConfigError, match=said):
            federated(scheme).but(**answers)
    with pytest.raises(ConfigError, match="it corrects the local steps of whole rounds"):
        every_step(codec=scheme)


def test_codecs_of_the_other_class_are_refused():
    for codec in (int8, topk(1 / 4), fp16):
        said = rf"scallion around {re.escape(codec.spec)}: it is not unbiased .*\n.*\n.*feedback, ef21, scafcom"
        with pytest.raises(ConfigError, match=said):
            scallion(codec)
    with pytest.raises(ConfigError, match="scafcom around fp16: its error may be larger"):
        scafcom(fp16)
    with pytest.raises(ConfigError, match="scafcom around Scafcom"):
        scafcom(scafcom(int8))


@pytest.mark.parametrize("value", [0, 1.5, -1, math.nan, "1", True])
def test_options_out_of_range_are_refused(value):
    said = (
        f"scallion with alpha {value!r}\n  expected  a number above 0 and at most 1\n  mend      leave it out for 1 /"
    )
    with pytest.raises(ConfigError, match=re.escape(said)):
        scallion(fp32, alpha=value)
    said = f"scafcom with beta {value!r}\n  expected  a number above 0 and at most 1\n  mend      leave it out for 0.2"
    with pytest.raises(ConfigError, match=re.escape(said)):
        scafcom(fp32, beta=value)


def test_expression():
    assert scallion(int4(rounding="stochastic")).spec == "scallion(int4(rounding='stochastic'))"
    assert scafcom(topk(1 / 64) | int4 | zstd, beta=0.5).spec == "scafcom(topk(0.015625) | int4 | zstd, beta=0.5)"
    for scheme in (scallion(fp32, alpha=0.5), scallion(fp32), scafcom(topk(1 / 4)), scafcom(int8, beta=1.0)):
        assert parse(scheme.spec) == scheme


@pytest.mark.parametrize(
    ("codec", "other"),
    [
        (scallion(int8(rounding="stochastic")), scallion(int8(rounding="stochastic"), alpha=0.5)),
        (scafcom(topk(1 / 4) | int4), scafcom(topk(1 / 4) | int4, beta=0.7)),
    ],
    ids=["scallion", "scafcom"],
)
def test_it_trains_a_model_with_an_optimizer_of_its_own(codec, other):
    """Beside AdamW, whose steps are not lr times the gradient: members agree, and the options change the result."""
    results = run(3, lambda link: train(link, diloco(every=3, codec=codec), 9))
    assert all(same(results[0].live, each.live) for each in results)
    changed = run(3, lambda link: train(link, diloco(every=3, codec=other), 9))
    assert not same(results[0].live, changed[0].live)
