"""Each memory on convex problems whose answers are known: who diverges, who stalls and where, who converges.

Gradient descent x <- x - gamma update, with the real schemes, on sums of quadratics f_i(x) = x'H_i x / 2 - b_i'x. All
clients of a run are one long vector, since a memory works element by element; the k largest entries of each client's
part are what is sent. In float64, so that floors are those of the schemes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

import thinwire
from thinwire import every_step
from thinwire.codecs import Feedback, diana, econtrol, ef21, ef21_sgdm, ef21w, feedback, randk, topk
from thinwire.codecs.feedback import Place
from thinwire.codecs.stages import Tensors
from thinwire.links.local import run

ALL = Place(0, (0,))
#: What "to the last bit" comes to after thousands of steps in float64.
ARITHMETIC = 1e-12


def largest(rows: Tensor, k: int) -> Tensor:
    """topk of each row.  [N, d]"""
    index = rows.abs().topk(k, dim=1).indices
    return torch.zeros_like(rows).scatter_(1, index, rows.gather(1, index))


def any_scaled(rows: Tensor, k: int, g: torch.Generator) -> Tensor:
    """randk(scaled=True) of each row, each with entries of its own: unbiased, omega = d / k - 1.  [N, d]"""
    index = torch.rand(rows.shape, generator=g).topk(k, dim=1).indices
    return torch.zeros_like(rows).scatter_(1, index, rows.gather(1, index) * (rows.shape[1] / k))


@dataclass(frozen=True)
class Problem:
    """hessians [N, d, d], linear terms [N, d]; k entries of each gradient are sent."""

    hessians: Tensor
    linear: Tensor
    k: int

    @property
    def codec(self):
        return topk(self.k / self.linear.shape[1])

    @property
    def optimum(self) -> Tensor:
        return torch.linalg.solve(self.hessians.mean(dim=0), self.linear.mean(dim=0))

    @property
    def smoothness(self) -> tuple[float, list[float]]:
        """L of the mean, and L_i of each client."""
        of_clients = torch.linalg.eigvalsh(self.hessians)[:, -1].tolist()
        return torch.linalg.eigvalsh(self.hessians.mean(dim=0))[-1].item(), of_clients


def least_squares(clients: int, d: int, k: int, *, skew: float = 0.0, seed: int = 0) -> Problem:
    """||A_i x - A_i x_i||^2 / 2 with 100 rows and an x_i of each client's own; `skew` spreads the sizes of A_i."""
    g = torch.Generator().manual_seed(seed)
    size = (skew * torch.randn(clients, 1, 1, generator=g, dtype=torch.float64)).exp()
    rows = size * torch.randn(clients, 100, d, generator=g, dtype=torch.float64) / math.sqrt(100)
    wanted = 3 * torch.randn(clients, d, 1, generator=g, dtype=torch.float64)
    hessians = rows.transpose(1, 2) @ rows
    return Problem(hessians, (hessians @ wanted).squeeze(2), k)


def descent(
    problem: Problem, memory: Feedback, gamma: float, steps: int, *, start: Tensor | None = None, noise: float = 0.0,
    lost: float = 0.0, acknowledged: bool = True, at_random: bool = False,
) -> Iterator[Tensor]:  # fmt: skip
    """x after each step.

    noise         spread of each entry of each client's gradient
    lost          share of messages that do not arrive
    acknowledged  whether who sent such a message is told, and keeps its memory as it was
    at_random     whether k entries are chosen at random and scaled, instead of the largest
    """
    clients, d = problem.linear.shape
    g = torch.Generator().manual_seed(1)
    x = torch.zeros(d, dtype=torch.float64) if start is None else start
    own: Tensors = {}
    shared: Tensors = {}
    for _ in range(steps):
        gradient = torch.einsum("nij,j->ni", problem.hessians, x) - problem.linear
        if noise:
            gradient += noise * torch.randn(clients, d, generator=g, dtype=torch.float64)
        target, held = memory.prepare(gradient.view(-1), own, shared, ALL)
        rows = target.view(clients, d)
        sent = any_scaled(rows, problem.k, g) if at_random else largest(rows, problem.k)
        after = memory.commit(target, held, sent.view(-1))
        arrived = torch.rand(clients, generator=g) >= lost
        share = arrived.double().mean().item()
        if share:
            update, shared = memory.receive(sent[arrived].mean(dim=0), shared, share)
            x = x - gamma * update
        if acknowledged and share < 1:
            there = arrived.repeat_interleave(d)
            after = {name: torch.where(there, new, own.get(name, torch.zeros(()))) for name, new in after.items()}
        own = after
        yield x


def ends(*args, **options) -> Tensor:
    for x in descent(*args, **options):  # noqa: B007
        pass
    return x


def error(problem: Problem, memory: Feedback, gamma: float, steps: int, **options) -> float:
    """||x - optimum|| / ||optimum|| at the end: 1 at the start, which is 0."""
    optimum = problem.optimum
    return ((ends(problem, memory, gamma, steps, **options) - optimum).norm() / optimum.norm()).item()


def test_rows_are_what_the_codec_sends() -> None:
    x = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    codec = topk(3 / 50)
    by_codec = torch.stack([codec.decode(codec.encode(row, 0), 50, 0) for row in x])
    assert torch.equal(largest(x, 3), by_codec)


def test_all_clients_as_one_vector_are_each_client_by_itself() -> None:
    """The step that everything here rests on, for each scheme."""
    problem = least_squares(3, 8, 2)
    for memory in (
        feedback(problem.codec),
        ef21(problem.codec),
        ef21_sgdm(problem.codec),
        econtrol(problem.codec, 0.1),
    ):
        x, own, shared = torch.zeros(8, dtype=torch.float64), [{}, {}, {}], {}
        for together in descent(problem, memory, 0.1, 5):
            sent = []
            for client in range(3):
                gradient = problem.hessians[client] @ x - problem.linear[client]
                target, held = memory.prepare(gradient, own[client], shared, Place(client, (0, 1, 2)))
                sent.append(largest(target.unsqueeze(0), 2)[0])
                own[client] = memory.commit(target, held, sent[-1])
            update, shared = memory.receive(torch.stack(sent).mean(dim=0), shared, 1.0)
            x = x - 0.1 * update
            torch.testing.assert_close(together, x, rtol=1e-12, atol=1e-12)


# A: three clients, each of whom would send the wrong way --------------------------------------------------------------

_A = torch.tensor([[-3, 2, 2], [2, -3, 2], [2, 2, -3]], dtype=torch.float64)
#: f_i(x) = <a_i, x>^2 + ||x||^2 / 4; on the diagonal the largest entry of each gradient is the one that points away.
THREE = Problem(
    2 * _A.unsqueeze(2) * _A.unsqueeze(1) + torch.eye(3, dtype=torch.float64) / 2,
    torch.zeros(3, 3, dtype=torch.float64),
    1,
)
ONES = torch.ones(3, dtype=torch.float64)


@pytest.mark.parametrize("gamma", [0.1, 0.01, 0.001])
def test_without_memory_it_grows_at_every_step_size(gamma: float) -> None:
    """By 1 + 11 gamma / 6 a step, exactly; the tolerance is one rounding of each of 500 factors."""
    for step, x in enumerate(descent(THREE, feedback(THREE.codec, decay=0), gamma, 500, start=ONES), 1):
        expected = (1 + 11 * gamma / 6) ** step
        torch.testing.assert_close(x, expected * ONES, rtol=500 * 4 * 2.0**-53, atol=0)


@pytest.mark.parametrize(
    "memory", [feedback(THREE.codec), ef21(THREE.codec), econtrol(THREE.codec), econtrol(THREE.codec, eta=0.3)], ids=str
)
def test_with_memory_it_converges_as_exact_descent_does(memory: Feedback) -> None:
    """To the rate's digit: the smallest curvature is 7/6, so exact descent shrinks by 1 - 7 gamma / 6 a step."""
    gamma, steps = 0.01, 2000
    exact = math.sqrt(3) * (1 - 7 * gamma / 6) ** steps
    assert 0.5 * exact < ends(THREE, memory, gamma, steps, start=ONES).norm() < 1.5 * exact


def test_the_same_through_packets_and_a_model() -> None:
    """In float32, over the local link: 30 steps of a torch optimizer with a method that sends gradients."""

    def descend(link, codec) -> float:
        model = nn.Linear(3, 1, bias=False)
        nn.init.ones_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        with thinwire.synchronize(model, optimizer, every_step(codec=codec), link):
            for _ in range(30):
                (model(_A[link.rank].float()).square().sum() + model.weight.square().sum() / 4).backward()
                optimizer.step()
                optimizer.zero_grad()
        return model.weight.norm().item()

    naive = run(3, lambda link: descend(link, feedback(THREE.codec, decay=0)))
    assert naive == pytest.approx([math.sqrt(3) * (1 + 11 * 0.02 / 6) ** 30] * 3, rel=1e-4)
    for memory in (ef21(THREE.codec), econtrol(THREE.codec)):
        assert max(run(3, lambda link, memory=memory: descend(link, memory))) < 1.2


# B: ten clients who want different things -----------------------------------------------------------------------------

TEN = least_squares(10, 50, 2)


def test_without_memory_it_stalls_far_away() -> None:
    for gamma in (0.1, 0.01):
        assert 0.9 < error(TEN, feedback(TEN.codec, decay=0), gamma, 1500) < 1.4


def test_the_residual_memory_stops_at_a_distance_in_proportion_to_the_step() -> None:
    coarse, fine = (error(TEN, feedback(TEN.codec), gamma, 2000) for gamma in (0.03, 0.01))
    assert 0.02 < fine < 0.1
    assert 2 < coarse / fine < 4


@pytest.mark.parametrize("gamma", [0.3, 0.1, 0.03])
@pytest.mark.parametrize("memory", [ef21(TEN.codec), econtrol(TEN.codec)], ids=str)
def test_estimates_reach_the_floor_of_the_arithmetic(memory: Feedback, gamma: float) -> None:
    assert error(TEN, memory, gamma, 2500) < ARITHMETIC


def test_at_large_steps_econtrol_is_stable_where_the_residual_memory_is_not() -> None:
    """gamma = 1, below 2 / L = 1.3: EF14 swings several times farther out than where it began."""
    lately = [(x - TEN.optimum).norm() / TEN.optimum.norm() for x in descent(TEN, feedback(TEN.codec), 1.0, 1500)][
        -500:
    ]
    assert torch.stack(lately).mean() > 3
    assert error(TEN, econtrol(TEN.codec), 1.0, 1500) < ARITHMETIC


@pytest.mark.parametrize("gamma", [0.1, 0.03])
def test_a_residual_that_is_fed_back_too_fast_diverges(gamma: float) -> None:
    """delta = 2/50. The rule gives eta = 0.02; 0.1 is above delta, and swings itself up whatever the step."""
    assert econtrol(TEN.codec).share_fed_back(50) == pytest.approx(0.02)
    assert error(TEN, econtrol(TEN.codec, eta=0.1), gamma, 1500) > 100


# B without the difference: clients who want the same ------------------------------------------------------------------


def test_where_clients_agree_the_residual_memory_bears_the_larger_step() -> None:
    """EControl's stability is no law: with one function on all clients, who then are as one, it is the first to go."""
    hessian = TEN.hessians.mean(dim=0, keepdim=True)
    alike = Problem(hessian, (hessian[0] @ TEN.optimum).unsqueeze(0), 2)
    assert error(alike, econtrol(TEN.codec), 0.06, 2500) < ARITHMETIC
    assert error(alike, econtrol(TEN.codec), 0.08, 2500) > 0.01
    for memory in (feedback(TEN.codec), ef21(TEN.codec)):
        assert error(alike, memory, 0.08, 2500) < ARITHMETIC


# B': the same with noisy gradients ------------------------------------------------------------------------------------


def test_noise_doubles_ef21s_floor_and_momentum_takes_that_back() -> None:
    """Mean error from step 500 to 2500, begun at the optimum. Eight clients in 20 dimensions."""
    problem = least_squares(8, 20, 2)
    optimum = problem.optimum

    def floor(memory: Feedback) -> float:
        path = descent(problem, memory, 0.005, 2500, start=optimum, noise=20 / math.sqrt(20))
        return torch.stack([(x - optimum).norm() for x in path][500:]).mean().item() / optimum.norm().item()

    classic = floor(feedback(problem.codec))
    plain, momentum = floor(ef21(problem.codec)), floor(ef21_sgdm(problem.codec, eta=0.02))
    assert plain > 2 * momentum
    assert momentum == pytest.approx(classic, rel=0.1)


# Unbiased codecs ------------------------------------------------------------------------------------------------------


def test_diana_takes_the_noise_of_an_unbiased_codec_away() -> None:
    """10 of 50 at random: omega = 4. Alone, the codec leaves a floor; with alpha = 1 / (1 + omega) there is none.

    Above its limit the estimates blow up: alpha (1 + omega) > 2 makes each of them diverge in the mean square.
    """
    problem, codec = replace(TEN, k=10), randk(10 / 50, scaled=True)
    assert diana(codec).share_followed(50) == pytest.approx(1 / 5)
    assert error(problem, feedback(codec, decay=0), 0.1, 2500, at_random=True) > 0.05
    assert error(problem, diana(codec), 0.1, 2500, at_random=True) < ARITHMETIC
    assert error(problem, diana(codec, alpha=0.8), 0.1, 200, at_random=True) > 100


# D: clients of very different smoothness ------------------------------------------------------------------------------


def weighted_descent(problem: Problem, smoothness: Sequence[float], gamma: float) -> Iterator[Tensor]:
    """EF21-W, whose members do differ: each client by itself."""
    clients, d = problem.linear.shape
    memory, ranks = ef21w(problem.codec, smoothness=tuple(smoothness)), tuple(range(clients))
    places = [Place(rank, ranks) for rank in ranks]
    weights = torch.tensor([memory.weight(place) for place in places], dtype=torch.float64)
    x, own, shared = torch.zeros(d, dtype=torch.float64), [{} for _ in ranks], {}
    while True:
        gradient = torch.einsum("nij,j->ni", problem.hessians, x) - problem.linear
        ready = [memory.prepare(v, o, shared, place) for v, o, place in zip(gradient, own, places, strict=True)]
        sent = largest(torch.stack([target for target, _ in ready]), problem.k)
        own = [memory.commit(target, held, s) for (target, held), s in zip(ready, sent, strict=True)]
        update, shared = memory.receive(weights @ sent, shared, 1.0)
        x = x - gamma * update
        yield x


def steps_to(path: Iterator[Tensor], optimum: Tensor, wanted: float) -> int:
    return next(step for step, x in enumerate(path, 1) if (x - optimum).norm() < wanted * optimum.norm())


@pytest.mark.parametrize("seed", [1, 2])
def test_weights_allow_a_larger_step_and_save_as_many_rounds(seed: int) -> None:
    """Each at the step that its theory allows: rounds are saved in proportion to L_QM / L_AM.

    And at equal steps the two go the same way: topk(a x) = a topk(x), so that the weights cancel.
    """
    problem = least_squares(20, 30, 1, skew=1.0, seed=seed)
    smooth, of_clients = problem.smoothness
    quadratic, arithmetic = math.sqrt(sum(v * v for v in of_clients) / 20), sum(of_clients) / 20
    delta = 1 / 30
    xi = (1 + math.sqrt(1 - delta)) / delta - 1
    careful, bold = 1 / (smooth + quadratic * xi), 1 / (smooth + arithmetic * xi)
    optimum = problem.optimum
    plain = steps_to(descent(problem, ef21(problem.codec), careful, 20_000), optimum, 1e-3)
    weighted = steps_to(weighted_descent(problem, of_clients, bold), optimum, 1e-3)
    assert quadratic / arithmetic > 1.5
    assert plain / weighted == pytest.approx(quadratic / arithmetic, rel=0.1)
    assert steps_to(descent(problem, ef21(problem.codec), bold, 20_000), optimum, 1e-3) == pytest.approx(
        weighted, abs=1
    )


# Lost packets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [ef21(TEN.codec), econtrol(TEN.codec)], ids=str)
def test_a_fifth_of_the_packets_may_be_lost_if_memories_are_committed_with_the_round(memory: Feedback) -> None:
    assert error(TEN, memory, 0.1, 2500, lost=0.2) < ARITHMETIC
    assert error(TEN, memory, 0.1, 2500, lost=0.2, acknowledged=False) > 0.1
