"""DADAO against its rule written down naively, against what its theorem says, and against itself."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from thinwire.decentralized import events, optimal, path, ridge, ring, simulate, star, uniform
from thinwire.decentralized.dadao import advance, constants, gossip_event, gradient_event, offer, start
from thinwire.decentralized.graphs import barbell
from thinwire.errors import ConfigError, DivergedError


def run(problem, gossip, horizon, **options):
    d = problem.linear.shape[1]
    options = {"x0": torch.zeros(d, dtype=torch.float64), "smoothness": problem.smoothness,
               "convexity": problem.convexity, **options}  # fmt: skip
    return simulate(problem.gradients, gossip, horizon=horizon, **options)


def answers(nodes):
    return torch.stack([node.x for node in nodes])


def same(one, other):
    return all(torch.equal(a.rows, b.rows) and a.time == b.time for a, b in zip(one.nodes, other.nodes, strict=True))


# --- the rule ---------------------------------------------------------------------------------------------------


def naive(problem, gossip, x0, horizon, seed):
    """The card's lines with L, mu and the graph, all nodes advanced together by a general integrator."""
    n, d = problem.linear.shape
    smoothness, mu = problem.smoothness, problem.convexity
    nu = mu / 2
    r = math.sqrt(nu / smoothness)

    def flow(_, flat):
        x, xt, y, yt, z, zt = flat.reshape(6, n, d)
        eta, alpha, theta = r / 8, r / 4, math.sqrt(smoothness / nu) / 2
        return np.stack([
            eta * (xt - x), eta * (x - xt),
            alpha * (yt - y), -theta * (nu * xt + y + z),
            alpha * (zt - z), eta * (z - zt),
        ]).ravel()  # fmt: skip

    state = np.zeros((6, n, d))
    state[0] = x0.numpy()
    now = 0.0
    for event in [*events(gossip, seed, horizon), None]:
        then = horizon if event is None else event.time
        state = solve_ivp(flow, (now, then), state.ravel(), method="DOP853", rtol=1e-13, atol=1e-13).y[:, -1]
        state, now = state.reshape(6, n, d), then
        x, xt, y, yt, z, zt = state
        if event is None:
            break
        if len(event.nodes) == 1:
            (i,) = event.nodes
            g = problem.gradients[i](torch.from_numpy(x[i].copy())).numpy() - nu * x[i] - yt[i]
            x[i] -= g / (4 * smoothness)
            xt[i] -= g / (4 * math.sqrt(smoothness * nu))
            yt[i] += (r / 4 + 1) * g
        else:
            i, j = event.nodes
            apart = (y[i] + z[i]) - (y[j] + z[j])
            for end, sign in ((i, 1), (j, -1)):
                z[end] -= sign * apart / 2
                zt[end] -= sign * 2 * gossip.chi1 * math.sqrt(smoothness / nu) * apart
    return state


@pytest.mark.parametrize("graph", [ring(1), path(2), star(4)], ids=["one node", "two", "star"])
def test_the_rule_as_it_is_written(graph):
    problem = ridge(graph.nodes, dimension=3, samples=2, seed=1)
    x0 = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    expected = naive(problem, uniform(graph), x0, 8.0, seed=2)
    got = torch.stack([node.rows for node in run(problem, uniform(graph), 8.0, x0=x0, seed=2).nodes], dim=1)
    # the integrator's steps, each right to 1e-13, between some 50 events
    assert np.allclose(got.numpy(), expected, rtol=0, atol=1e-10)


def test_the_flow_in_two_strides_is_the_flow_in_one():
    c = constants(4.0, 0.3, uniform(ring(4)))
    node = start(torch.arange(5, dtype=torch.float64))
    node = gradient_event(c, node, 0.7, torch.ones(5, dtype=torch.float64))
    whole, halves = advance(c, node, 9.0), advance(c, advance(c, node, 3.1), 9.0)
    assert torch.allclose(whole.rows, halves.rows, rtol=0, atol=1e-13)
    assert advance(c, node, 0.7) is node


def test_the_two_ends_of_an_edge_move_against_each_other():
    c = constants(4.0, 0.3, uniform(path(2)))
    generator = torch.Generator().manual_seed(0)
    a, b = (start(torch.zeros(6, dtype=torch.float64)) for _ in range(2))
    a = gradient_event(c, a, 0.0, torch.randn(6, generator=generator, dtype=torch.float64))
    a, b = advance(c, a, 1.0), advance(c, b, 1.0)
    new_a, new_b = gossip_event(c, a, offer(b)), gossip_event(c, b, offer(a))
    assert torch.equal(new_a.rows[4] - a.rows[4], -(new_b.rows[4] - b.rows[4]))
    assert torch.equal(new_a.rows[:4], a.rows[:4]), "nothing else moves"
    assert not torch.equal(new_a.rows[4], a.rows[4])


# --- the theorem ------------------------------------------------------------------------------------------------

RIDGE = ridge(6, condition=19.8)


@pytest.fixture(scope="module")
def long_run():
    """A thousand units of time, and the error at every tenth."""
    errors, apart = [], []

    def watch(event, nodes):
        if event.time >= 10 * (len(errors) + 1):
            errors.append(RIDGE.error(answers(nodes)))
            apart.append(float(sum(node.rows[4] for node in nodes).abs().max()))
        return False

    return run(RIDGE, uniform(ring(6)), 1000.0, watch=watch), errors, apart


def test_ridge_regression_to_the_last_digits(long_run):
    done, errors, _ = long_run
    assert done.gradients == pytest.approx(6000, abs=4 * math.sqrt(6000))
    assert errors[-1] < 1e-12
    assert RIDGE.error(answers(done.nodes)) < 1e-12
    assert errors[10] > 1e-7, "and not at once"


def test_the_error_falls_as_fast_as_the_theorem_says(long_run):
    """From 100 to 700 units of time, before it reaches rounding."""
    _, errors, _ = long_run
    rate = math.log(errors[9] / errors[69]) / 600
    assert rate >= math.sqrt(RIDGE.convexity / RIDGE.smoothness) / (8 * math.sqrt(2))


def test_what_gossip_moves_adds_up_to_nothing_at_one_time_only(long_run):
    done, _, apart = long_run
    largest = max(float(node.rows[4].abs().max()) for node in done.nodes)
    rounding = (done.gradients + 2 * done.gossips) * 2.0**-53 * 6 * largest  # a product of six terms for each advance
    assert float(sum(node.rows[4] for node in done.nodes).abs().max()) < rounding
    assert max(apart) > 1e-4, "nodes left at their own last events do not add up"


def test_gossip_is_as_frequent_as_the_rates_say(long_run):
    done, _, _ = long_run
    assert done.gossips == pytest.approx(1000 * math.sqrt(30), abs=4 * math.sqrt(1000 * math.sqrt(30)))


def test_rates_of_the_programme_converge_alike_with_less_talk():
    problem, gossips, errors = ridge(8, condition=8.0, seed=3), [], []
    for gossip in (uniform(barbell(4)), optimal(barbell(4))):
        done = run(problem, gossip, 60.0)
        gossips.append(done.gossips)
        errors.append(problem.error(answers(done.nodes)) / problem.error(torch.zeros(8, 10, dtype=torch.float64)))
    assert max(errors) < 0.02
    assert errors[1] < 3 * errors[0]
    assert gossips[1] < 0.65 * gossips[0]


def steps_to(condition, target):
    problem, taken = ridge(1, dimension=8, samples=6, condition=condition), []

    def watch(event, nodes):
        taken.append(event.time)
        return problem.error(answers(nodes)) < target * float(problem.minimiser.square().sum())

    run(problem, uniform(ring(1)), 5000.0, watch=watch)
    return len(taken)


def test_one_node_is_an_accelerated_gradient_method():
    """36 times the condition number costs about 6 times the gradients; gradient descent would take 36 times as many."""
    few, many = steps_to(30.0, 1e-6), steps_to(30.0 * 36, 1e-6)
    assert 3 * few < many < 9 * few


# --- runs -------------------------------------------------------------------------------------------------------


def test_replays_to_the_bit():
    problem, gossip = ridge(5), uniform(star(5))
    once = run(problem, gossip, 20.0, seed=4)
    assert same(once, run(problem, gossip, 20.0, seed=4))
    assert not same(once, run(problem, gossip, 20.0, seed=5))
    assert {node.time for node in once.nodes} == {20.0}
    assert once.gradients + once.gossips == len(events(gossip, 4, 20.0))


def test_a_start_elsewhere():
    problem, gossip = ridge(3), uniform(ring(3))
    x0 = torch.ones(10, dtype=torch.float64)
    assert torch.equal(run(problem, gossip, 0.0, x0=x0).nodes[1].x, x0)
    assert not same(run(problem, gossip, 5.0, x0=x0), run(problem, gossip, 5.0))


def test_watching_may_end_a_run():
    problem, gossip = ridge(3), uniform(ring(3))
    stopped = run(problem, gossip, 50.0, watch=lambda event, nodes: event.time > 9)
    last = next(event.time for event in events(gossip, 0, 50.0) if event.time > 9)
    assert same(stopped, run(problem, gossip, last + 1e-12, watch=lambda event, nodes: event.time == last))
    assert stopped.nodes[0].time == last


def test_smoothness_and_convexity_matter():
    problem, gossip = ridge(3), uniform(ring(3))
    plain = run(problem, gossip, 5.0)
    assert not same(plain, run(problem, gossip, 5.0, smoothness=2 * problem.smoothness))
    assert not same(plain, run(problem, gossip, 5.0, convexity=problem.convexity / 2))


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("smoothness", "convexity"), [(1.0, 0.0), (1.0, 2.0), (math.inf, 1.0), (math.nan, 1.0)])
def test_constants_that_make_no_sense(smoothness, convexity):
    with pytest.raises(ConfigError, match=r"(?s)smoothness .* strong convexity .*0 < convexity.*eigenvalue"):
        constants(smoothness, convexity, uniform(ring(3)))


def test_edges_that_gossip_too_seldom():
    with pytest.raises(ConfigError, match=r"(?s)too seldom: chi1 chi2 = 2.*<= 1/2.*gossip.scaled\(2\)"):
        constants(2.0, 1.0, uniform(ring(4)).scaled(0.5))
    constants(2.0, 1.0, uniform(ring(4)).scaled(2.0))


def test_functions_for_another_graph():
    with pytest.raises(ConfigError, match=r"(?s)4 functions on a graph of 3 nodes.*one function a node"):
        run(ridge(4), uniform(ring(3)), 1.0)


def test_gradients_that_are_none():
    gossip, x0 = uniform(path(2)), torch.zeros(3, dtype=torch.float64)
    for gradient, error, words in (
        (lambda x: x.float(), ConfigError, r"(?s)gradient of torch.float32 \[3\].*float64"),
        (lambda x: x[:2], ConfigError, r"gradient of torch.float64 \[2\] at a point of float64 \[3\]"),
        (lambda x: x / 0, DivergedError, r"(?s)not finite.*smoothness"),
    ):
        with pytest.raises(error, match=words):
            simulate([gradient] * 2, gossip, smoothness=2.0, convexity=1.0, x0=x0, horizon=9.0)


def test_a_ridge_no_penalty_makes():
    with pytest.raises(ConfigError, match=r"(?s)condition 1e\+09.*between 1 and"):
        ridge(3, samples=20, condition=1e9)
    problem = ridge(3, condition=50.0)
    assert problem.smoothness / problem.convexity == pytest.approx(50.0)


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.linalg", None)
    with pytest.raises(ConfigError, match=r"(?s)scipy.*extra `decentralized`.*pip install 'thinwire\[decentralized\]'"):
        run(ridge(2), uniform(path(2)), 5.0)
