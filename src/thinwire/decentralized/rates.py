"""How often each edge should gossip.

DADAO converges as its theorem says once the edges' rates satisfy chi1 chi2 <= 1/2 (graphs.py), and its speed per unit
of time is then the same on every graph. So the fewest communications are those of the smallest total rate:

    min sum_e rate_e   subject to   chi1 chi2 <= 1/2, rates >= 0

With R_e the effective resistance of edge e this reads max_e R_e <= lambda_2, which is convex: there is a number s with

    Lap >= s (I - 11^T/n)    [Lap + 11^T/n, I; I, M] >= 0    M_ii + M_jj - 2 M_ij <= s  for every edge (i, j)

(the second says that M is at least the inverse; all three are linear in rates, M, s: a semidefinite programme).

Size    never below (n-1)/sqrt(2) events in a unit of time, which uniform rates on the complete graph reach. By symmetry
        uniform rates are best wherever all edges are alike (ring, star, torus of equal sides, complete graph). Much is
        gained where few edges carry everything: about a factor of the clique's size on a barbell.
Cost    a programme over a matrix of side 2n - 2, which grows fast: 2 seconds at 20 nodes and 31 edges, on one core.
Source  Nabli & Oyallon 2023, arXiv:2208.00779, chooses rates by "a SDP relaxation"; their code has uniform rates only.
Differs their programme could not be read; this one follows from the condition that their code's total rate
        sqrt(2 chi1 chi2) meets, and is no relaxation of it. Edges that come out at 0 are dropped and the programme is
        solved again: their resistance counts no more.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np

from thinwire.decentralized.graphs import Gossip, Graph
from thinwire.errors import ConfigError

_NEGLIGIBLE = 1e-5  # of the largest rate: below it is the solver's rounding of 0
# Seven digits: at its own 1e-8 the solver stalls on some symmetric graphs, and rates are scaled to be allowed anyway.
_TOLERANCES = {"tol_gap_abs": 1e-7, "tol_gap_rel": 1e-7, "tol_feas": 1e-7}


def uniform(graph: Graph) -> Gossip:
    """The same rate for every edge, and the least that the theorem allows: chi1 chi2 = 1/2."""
    return _least(Gossip(graph, (1.0,) * len(graph.edges)))


def optimal(graph: Graph) -> Gossip:
    """The rates of smallest sum that the theorem allows.

    raises  ConfigError without the extra `decentralized` (cvxpy), or if its solver gives up
    """
    if not graph.edges:
        return Gossip(graph, ())
    rates = _solve(graph)
    edges = tuple(edge for edge, rate in zip(graph.edges, rates, strict=True) if rate > _NEGLIGIBLE * max(rates))
    if len(edges) < len(graph.edges):
        fewer = optimal(Graph(graph.nodes, edges))
        rates = [dict(zip(fewer.graph.edges, fewer.rates, strict=True)).get(edge, 0.0) for edge in graph.edges]
    return _least(Gossip(graph, tuple(rates)))


def _least(gossip: Gossip) -> Gossip:
    """Scaled to chi1 chi2 = 1/2."""
    return gossip.scaled(math.sqrt(2 * gossip.chi1 * gossip.chi2)) if gossip.graph.edges else gossip


def _solve(graph: Graph) -> list[float]:
    cp = _cvxpy()
    n, m = graph.nodes, len(graph.edges)
    ends = np.zeros((n, m))  # column e is e_i - e_j
    for at, (i, j) in enumerate(graph.edges):
        ends[i, at], ends[j, at] = 1.0, -1.0
    across = np.linalg.svd(np.eye(n) - 1.0 / n)[0][:, : n - 1]  # a basis of what sums to 0: Lap is positive there
    ends, one = across.T @ ends, np.eye(n - 1)
    rates, s, inverse = cp.Variable(m, nonneg=True), cp.Variable(), cp.Variable((n - 1, n - 1), symmetric=True)
    lap = ends @ cp.diag(rates) @ ends.T
    problem = cp.Problem(
        cp.Minimize(cp.sum(rates)),
        [
            lap >> s * one,
            cp.bmat([[lap, one], [one, inverse]]) >> 0,
            cp.sum(cp.multiply(ends, inverse @ ends), axis=0) <= s,
        ],
    )
    problem.solve(solver="CLARABEL", **_TOLERANCES)
    if problem.status != "optimal":
        raise ConfigError(
            f"the solver ended with {problem.status!r} on a graph of {n} nodes and {m} edges",
            expected="rates of least sum",
            mend="use uniform(graph)",
        )
    return [max(float(rate), 0.0) for rate in rates.value]


def _cvxpy() -> Any:
    try:
        return importlib.import_module("cvxpy")
    except ImportError as error:
        raise ConfigError(
            f"optimal rates need the package cvxpy ({error})",
            expected="the extra `decentralized`, which brings it",
            mend="pip install 'thinwire[decentralized]', or use uniform(graph)",
        ) from error
