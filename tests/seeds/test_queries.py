"""SPSA with gradient correction: what its mean is, what order it moves in, and what failing queries do."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from torch import Tensor, nn

from thinwire.errors import ConfigError, DivergedError
from thinwire.links.base import Link
from thinwire.links.local import run
from thinwire.seeds.queries import SPSA, Probed, QueryTuner, advance, replay

N = 7
SLOPE = torch.linspace(-2, 3, N)
#: A step of rate 1 without memory: minus the estimate.
BARE = {"rate": 1.0, "alpha": 0.0, "beta": 0.0}


def linear(x: Tensor) -> float:
    return float(SLOPE.double() @ x.double())


def estimates(loss, at: Tensor, draws: int, **options: object) -> Tensor:
    """One-probe estimates of the gradient, one for each seed.  [draws, n]"""
    found = []
    for seed in range(draws):
        tuner = QueryTuner(at, SPSA(**BARE, probes=1, seed=seed, **options))
        tuner.step(loss)
        found.append(at - tuner.parameters)
    return torch.stack(found).double()


def test_directions_are_bounded_away_from_zero_and_even() -> None:
    d = SPSA(seed=3).direction(200_000, 5, 1, 2)
    assert d.dtype == torch.float32
    assert d.abs().min() >= 0.5
    assert d.abs().max() < 1
    assert torch.equal(d * 2**24, (d * 2**24).round()), "exact"
    assert d.mean().abs() < 5 * math.sqrt(7 / 12 / 200_000)  # E d^2 = 7/12
    assert abs(d.abs().mean() - 0.75) < 5 * math.sqrt(1 / 48 / 200_000)
    others = [
        SPSA(seed=4).direction(9, 5, 1, 2),
        *(SPSA(seed=3).direction(9, *k) for k in ((6, 1, 2), (5, 2, 2), (5, 1, 3))),
    ]
    assert not any(torch.equal(other, d[:9]) for other in others)


def test_the_mean_is_the_gradient_of_a_linear_loss() -> None:
    """Within five standard errors of each element, which the draws themselves tell."""
    found = estimates(linear, torch.zeros(N), 3000, width=0.1)
    error = found.std(dim=0) / math.sqrt(len(found))
    assert ((found.mean(dim=0) - SLOPE).abs() <= 5 * error).all()
    assert (error < 0.15).all()


def test_a_symmetric_difference_has_no_second_order() -> None:
    """On a quadratic the two sides differ by the gradient's part alone, however far they are apart."""
    curve = torch.diag(torch.linspace(1, 9, N).double()) + 0.5
    at = torch.linspace(1, -1, N)

    def quadratic(x: Tensor) -> float:
        return float(0.5 * x.double() @ curve @ x.double())

    slope = curve @ at.double()
    for width in (0.01, 1.0):
        for seed in range(20):
            spsa = SPSA(**BARE, probes=1, seed=seed, width=width)
            (difference,) = QueryTuner(at, spsa).step(quadratic).differences[0]
            d = spsa.direction(N, 0, 0, 0).double()
            assert difference == pytest.approx(2 * width * float(slope @ d), rel=1e-4, abs=1e-5)


def test_it_is_its_algorithm_box() -> None:
    """Three steps in plain float64; float32 rounds each of a dozen operations."""
    spsa = SPSA(rate=0.3, width=0.2, alpha=0.6, gamma=0.2, offset=2.0, beta=0.8, probes=2)
    x, m = torch.linspace(-1, 1, N).double(), torch.zeros(N).double()
    tuner = QueryTuner(x.float(), spsa)
    for k in (1, 2, 3):
        c, a, g = 0.2 / k**0.2, 0.3 / (k + 2) ** 0.6, torch.zeros(N).double()
        for probe in range(2):
            d = spsa.direction(N, k - 1, 0, probe).double()
            g += (linear(x + c * d) - linear(x - c * d)) / (2 * c * d) / 2
        m = 0.8 * m + g
        x = x - a * (g + 0.8 * m)
        tuner.step(linear)
    torch.testing.assert_close(tuner.parameters.double(), x, rtol=1e-5, atol=1e-5)


def test_the_momentum_looks_ahead() -> None:
    """m is updated before the step: the second one is along g + beta (beta m + g)."""
    probed = Probed(0, 1.0, 0.5, {0: (1.0,)})
    spsa, x = SPSA(beta=0.5, probes=1), torch.zeros(3)
    g = 1 / spsa.direction(3, 0, 0, 0)
    moved, m = advance(x, torch.ones(3), spsa, probed)
    torch.testing.assert_close(m, 0.5 + g)
    torch.testing.assert_close(moved, -(g + 0.5 * (0.5 + g)))


@pytest.mark.parametrize(
    "other",
    [{"rate": 0.5}, {"width": 0.5}, {"alpha": 0.9}, {"gamma": 0.7}, {"offset": 3.0}, {"beta": 0.3}, {"probes": 2},
     {"seed": 1}],
)  # fmt: skip
def test_every_option_makes_a_difference(other: dict[str, float]) -> None:
    def after(spsa: SPSA) -> Tensor:
        tuner = QueryTuner(torch.ones(N), spsa)
        for _ in range(3):
            tuner.step(lambda x: float(x.double().pow(4).sum()))
        return tuner.parameters

    assert not torch.equal(after(SPSA()), after(SPSA(**other)))


def wave(rank: int):
    return lambda x: float((x.double() * (1 + rank)).sin().sum())


def tuned(members: int, steps: int, **options: object):
    def work(link: Link):
        with QueryTuner(torch.linspace(0, 1, 50), SPSA(rate=0.1), link, **options) as tuner:
            for _ in range(steps):
                tuner.step(wave(link.rank))
        return tuner, link.meter.by_purpose()["queries"]

    return run(members, work)


def test_members_and_a_replay_hold_the_same_bits() -> None:
    results = [tuner for tuner, _ in tuned(3, 6)]
    for tuner in results:
        assert torch.equal(tuner.parameters, results[0].parameters)
        assert torch.equal(replay(torch.linspace(0, 1, 50), SPSA(rate=0.1), tuner.steps), tuner.parameters)
        assert tuner.queries == 6 * 5 * 2
    assert results[0].steps[0].counted == 15


def test_a_step_is_few_bytes_whatever_the_vector() -> None:
    (_, traffic), *_ = tuned(2, 4)
    assert traffic.sent_bytes <= 4 * 200


def test_queries_at_once_change_nothing_and_are_at_once() -> None:
    meeting = threading.Barrier(4)

    def together(x: Tensor) -> float:
        meeting.wait(timeout=20)  # breaks unless four are under way
        return linear(x)

    one, four = QueryTuner(torch.zeros(N), SPSA(probes=6)), QueryTuner(torch.zeros(N), SPSA(probes=6), at_once=4)
    one.step(linear)
    four.step(together)
    assert four.steps[0].counted == 6
    assert torch.equal(one.parameters, four.parameters)


def test_a_probe_that_fails_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """Of five probes the third raises and the fifth has no number: the step is that of the other three."""
    count = iter(range(10))

    def flaky(x: Tensor) -> float:
        place = next(count)
        if place == 5:
            raise TimeoutError("too many requests")
        return math.inf if place == 8 else linear(x)

    tuner = QueryTuner(torch.zeros(N), SPSA())
    probed = tuner.step(flaky)
    assert [math.isnan(each) or math.isinf(each) for each in probed.differences[0]] == [False, False, True, False, True]
    assert probed.counted == 3
    whole = QueryTuner(torch.zeros(N), SPSA()).step(linear).differences[0]
    kept = (whole[0], whole[1], math.nan, whole[3], math.nan)
    expected, _ = advance(torch.zeros(N), torch.zeros(N), SPSA(), Probed(0, probed.rate, probed.width, {0: kept}))
    assert torch.equal(tuner.parameters, expected)
    assert "a query failed, its probe is left out: TimeoutError('too many requests')" in caplog.text


def test_a_service_that_is_gone_is_an_error_after_a_while() -> None:
    def gone(x: Tensor) -> float:
        raise ConnectionError("refused")

    tuner = QueryTuner(torch.ones(N), SPSA(), patience=3)
    tuner.step(gone)
    tuner.step(gone)
    tuner.step(linear)  # it was only tired: counting begins anew
    held = tuner.parameters
    tuner.step(gone)
    tuner.step(gone)
    with pytest.raises(DivergedError, match="no query was answered with a finite loss for 3 steps") as caught:
        tuner.step(gone)
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert torch.equal(tuner.parameters, held)
    assert tuner.queries == 60


def test_one_member_whose_service_is_gone_follows_the_others() -> None:
    def work(link: Link) -> Tensor:
        with QueryTuner(torch.zeros(N), SPSA(), link, patience=2) as tuner:
            for _ in range(4):
                tuner.step(linear if link.rank else lambda x: math.nan)
        return tuner.parameters

    one, two = run(2, work)
    assert torch.equal(one, two)
    assert not torch.equal(one, torch.zeros(N))


def test_it_goes_on_from_a_state() -> None:
    whole, first = (QueryTuner(torch.ones(N), SPSA()) for _ in range(2))
    for _ in range(6):
        whole.step(linear)
    for _ in range(3):
        first.step(linear)
    second = QueryTuner(torch.zeros(N), SPSA())
    second.load_state_dict(first.state_dict())
    for _ in range(3):
        second.step(linear)
    assert torch.equal(second.parameters, whole.parameters)
    assert second.steps == whole.steps
    assert second.queries == whole.queries


def test_parameters_that_were_given_are_not_changed() -> None:
    given = torch.ones(N)
    QueryTuner(given, SPSA()).step(lambda x: float(x.mul_(2).sum()))
    assert torch.equal(given, torch.ones(N))


# --- a service -------------------------------------------------------------------------------------------------------


class Service:
    """A frozen classifier of 8 x 8 images that gives its probabilities to four decimals, and nothing else."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self._model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
        optimizer = torch.optim.Adam(self._model.parameters(), lr=1e-2)
        for step in range(150):
            images, labels = pictures(step, 64)
            nn.functional.cross_entropy(self._model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

    @torch.no_grad()
    def scores(self, images: Tensor) -> Tensor:
        return self._model(images).softmax(dim=1).mul(1e4).round().div(1e4)


def pictures(number: int, count: int, fog: float = 0.0) -> tuple[Tensor, Tensor]:
    """Bright quarters on noise; fog lies over the left half."""
    g = torch.Generator().manual_seed(number)
    labels = torch.randint(4, (count,), generator=g)
    images = 0.7 * torch.randn(count, 8, 8, generator=g)
    for i, label in enumerate(labels.tolist()):
        images[i, 4 * (label // 2) :, 4 * (label % 2) :][:4, :4] += 1
    images[:, :, :4] += fog
    return images.reshape(count, 64), labels


def test_a_prompt_makes_up_for_what_a_frozen_service_never_saw() -> None:
    """Added to every foggy image, 64 numbers, tuned by queries alone."""
    service = Service()

    def accuracy(prompt: Tensor) -> float:
        images, labels = pictures(10_000, 500, fog=1.5)
        return float((service.scores(images + prompt).argmax(dim=1) == labels).float().mean())

    tuner = QueryTuner(torch.zeros(64), SPSA(rate=0.05, width=0.1))
    before = accuracy(tuner.parameters)
    for step in range(150):
        images, labels = pictures(20_000 + step, 64, fog=1.5)

        def loss(prompt: Tensor, images: Tensor = images, labels: Tensor = labels) -> float:
            chosen = service.scores(images + prompt)[torch.arange(64), labels]
            return float(-chosen.clamp(min=1e-4).log().mean())

        tuner.step(loss)
    after = accuracy(tuner.parameters)
    assert before < 0.75
    assert after > before + 0.15


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", [torch.zeros(3).double(), torch.zeros(2, 2), torch.zeros(3, dtype=torch.bfloat16)])
def test_other_than_float_vectors_are_refused(x: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"parameters are .*\n  expected  a float32 vector on the CPU"):
        QueryTuner(x, SPSA())


@pytest.mark.parametrize("options", [{"at_once": 0}, {"patience": 0}, {"at_once": 1.5}])
def test_options_of_the_tuner_are_whole_numbers(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"(at_once|patience)=.*\n  expected  a whole number of at least 1"):
        QueryTuner(torch.zeros(3), SPSA(), **options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rate": 0}, "SPSA with rate 0\n  expected  a number above 0"),
        ({"width": -1.0}, "SPSA with width -1.0"),
        ({"alpha": -0.1}, "SPSA with alpha -0.1"),
        ({"gamma": "x"}, "SPSA with gamma 'x'"),
        ({"offset": -1}, "SPSA with offset -1"),
        ({"beta": 1.0}, "SPSA with beta 1.0\n  expected  a number at least 0 and below 1"),
        ({"probes": 0}, "SPSA with probes 0\n  expected  a whole number of at least 1"),
        ({"seed": 1.5}, "SPSA with seed 1.5"),
    ],
)
def test_recipes_that_mean_nothing_are_refused(options: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        SPSA(**options)


def test_members_that_begin_elsewhere_are_told() -> None:
    def work(link: Link) -> None:
        with QueryTuner(torch.full((N,), float(link.rank)), SPSA(), link):
            pass

    with pytest.raises(ConfigError, match="members disagree on parameters"):
        run(2, work)
