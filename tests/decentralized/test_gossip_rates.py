"""Graphs, what they cost, and the rates that cost least."""

from __future__ import annotations

import math
import sys

import pytest

from thinwire.decentralized import Gossip, Graph, barbell, complete, grid, optimal, path, ring, star, uniform
from thinwire.decentralized.rates import _least
from thinwire.errors import ConfigError

GRAPHS = {
    "path": path(7),
    "ring": ring(8),
    "star": star(9),
    "complete": complete(6),
    "grid": grid(3, 4),
    "square": grid(4, 4),
    "torus": grid(3, 3, torus=True),
    "barbell": barbell(5),
    "kite": Graph(5, ((0, 1), (0, 2), (1, 2), (2, 3), (3, 4))),
}
ALIKE = ["ring", "star", "complete", "torus"]  # an automorphism takes any edge to any other


def test_shapes():
    assert [len(GRAPHS[name].edges) for name in ("path", "ring", "star", "complete")] == [6, 8, 8, 15]
    assert len(grid(3, 4).edges) == 3 * 3 + 2 * 4
    assert len(grid(3, 3, torus=True).edges) == 18
    assert len(barbell(5).edges) == 2 * 10 + 1
    assert (4, 5) in barbell(5).edges
    assert ring(2).edges == ((0, 1),), "not twice"
    assert grid(1, 4, torus=True).edges == ring(4).edges
    assert ring(1).edges == ()


@pytest.mark.parametrize("nodes", [2, 5, 8])
def test_known_spectra(nodes):
    whole = Gossip(complete(nodes), (0.5,) * (nodes * (nodes - 1) // 2))
    assert whole.chi1 == pytest.approx(1 / (0.5 * nodes))
    assert whole.chi2 == pytest.approx(1 / (0.5 * nodes))  # R = 2/n at weight 1
    spokes = Gossip(star(nodes), (2.0,) * (nodes - 1))
    assert spokes.chi2 == pytest.approx(0.25)
    assert Gossip(path(nodes), (3.0,) * (nodes - 1)).chi2 == pytest.approx(1 / 6)


@pytest.mark.parametrize("name", GRAPHS)
def test_resistances_add_up(name):
    """Foster: rates times resistances add up to n - 1; so half the largest is at least (n-1)/(2 sum of rates)."""
    gossip = uniform(GRAPHS[name])
    least = (gossip.graph.nodes - 1) / (2 * gossip.rate)
    assert gossip.chi2 >= least * (1 - 1e-9)
    if name in ALIKE:
        assert gossip.chi2 == pytest.approx(least)


def test_the_sums_of_uniform_rates_that_are_known():
    assert uniform(ring(6)).rate == pytest.approx(math.sqrt(30))
    assert uniform(complete(6)).rate == pytest.approx(5 / math.sqrt(2))


def test_both_chi_fall_as_rates_rise():
    gossip = uniform(GRAPHS["kite"])
    assert gossip.scaled(4).chi1 == pytest.approx(gossip.chi1 / 4)
    assert gossip.scaled(4).chi2 == pytest.approx(gossip.chi2 / 4)


@pytest.mark.parametrize("name", GRAPHS)
def test_optimal_rates_are_allowed_and_no_worse(name):
    best, even = optimal(GRAPHS[name]), uniform(GRAPHS[name])
    assert best.chi1 * best.chi2 == pytest.approx(0.5)
    assert even.chi1 * even.chi2 == pytest.approx(0.5)
    assert (best.graph.nodes - 1) / math.sqrt(2) * (1 - 1e-6) <= best.rate <= even.rate * (1 + 1e-6)


@pytest.mark.parametrize("name", ALIKE)
def test_where_all_edges_are_alike_uniform_rates_are_best(name):
    assert optimal(GRAPHS[name]).rates == pytest.approx(uniform(GRAPHS[name]).rates, rel=1e-3)


DOUBLE_STAR = Graph(10, (*((0, i) for i in range(2, 6)), *((1, i) for i in range(6, 10)), (0, 1)))


@pytest.mark.parametrize("graph", [barbell(4), DOUBLE_STAR, GRAPHS["kite"]], ids=["barbell", "double star", "kite"])
def test_no_other_rates_cost_less(graph):
    """By symmetry edges of one kind have one rate; what is left is searched on a grid of factors."""
    best = optimal(graph)
    hubs = sorted(range(graph.nodes), key=lambda node: -sum(node in edge for edge in graph.edges))[:2]
    kinds = [sum(node in edge for node in hubs) for edge in graph.edges]  # 2: the bridge, 1: beside it, 0: further away
    if graph == GRAPHS["kite"]:
        kinds = [0, 1, 1, 2, 3]
    factors = [2.0 ** (step / 4) for step in range(-6, 11)]
    least = min(
        _least(Gossip(graph, tuple((1.0, beside, bridge, bridge * beside)[kind] for kind in kinds))).rate
        for beside in factors
        for bridge in factors
    )
    assert best.rate <= least <= 1.05 * best.rate, "a grid as coarse as 19 % finds nothing better, and nearly as good"


def test_both_conditions_count():
    """Least resistance alone wants equal rates on every tree; the bridge of two stars has to talk more than that."""
    best = optimal(DOUBLE_STAR)
    assert best.rate < 0.9 * uniform(DOUBLE_STAR).rate
    assert dict(zip(best.graph.edges, best.rates, strict=True))[0, 1] == max(best.rates)


def test_a_bridge_talks_most_and_the_saving_grows_with_the_cliques():
    small, large = ((optimal(barbell(each)), uniform(barbell(each))) for each in (4, 8))
    for best, _ in (small, large):
        right = best.graph.nodes // 2
        assert max(zip(best.rates, best.graph.edges, strict=True))[1] == (right - 1, right)
    assert small[1].rate / small[0].rate > 1.6
    assert large[1].rate / large[0].rate > 3.6


def test_one_node_needs_no_rates():
    assert optimal(ring(1)) == uniform(ring(1)) == Gossip(ring(1), ())
    assert uniform(ring(1)).chi1 == uniform(ring(1)).chi2 == 0.0


def test_an_edge_that_is_not_used_does_not_count():
    gossip = Gossip(ring(4), (1.0, 1.0, 1.0, 0.0))
    assert gossip.chi2 == pytest.approx(Gossip(path(4), (1.0,) * 3).chi2)
    assert len(gossip.used) == 3


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    with pytest.raises(ConfigError, match=r"(?s)cvxpy.*extra `decentralized`.*pip install.*uniform\(graph\)"):
        optimal(ring(3))
    assert uniform(ring(3)).rate > 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Graph(0, ()), "a graph of 0 nodes"),
        (lambda: Graph(3, ((0, 1), (2, 1))), r"(?s)edges \[\(2, 1\)\].*i < j"),
        (lambda: Graph(2, ((0, 1), (0, 1))), "listed twice"),
        (lambda: Graph(4, ((0, 1), (2, 3))), r"(?s)from node 0 to \[2, 3\].*connected"),
        (lambda: Gossip(path(3), (1.0,)), r"(?s)for 2 edges.*one finite rate.*uniform\(graph\)"),
        (lambda: Gossip(path(3), (1.0, -1.0)), "at least 0"),
        (lambda: Gossip(path(3), (1.0, math.inf)), "finite"),
        (lambda: Gossip(path(3), (1.0, 0.0)), r"from node 0 to \[2\]"),
    ],
)
def test_graphs_that_make_no_sense(make, words):
    with pytest.raises(ConfigError, match=words):
        make()
