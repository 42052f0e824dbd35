"""The synchronous rivals: they converge as they should, so that a comparison with them is fair."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from thinwire.decentralized import barbell, complete, grid, ridge, ring, star
from thinwire.decentralized.problems import Quadratics
from thinwire.decentralized.synchronous import chebyshev, msda, nids, opapc, plain

GRAPHS = {"ring": ring(8), "star": star(8), "complete": complete(8), "grid": grid(2, 4), "barbell": barbell(4)}
METHODS = {"nids": nids, "opapc": opapc, "msda": msda}


def last(points, rounds):
    return next(islice(points, rounds - 1, None))


@pytest.mark.parametrize("mixing", [plain, chebyshev])
@pytest.mark.parametrize("graph", GRAPHS)
def test_mixing_is_what_it_declares(graph, mixing):
    way = mixing(GRAPHS[graph])
    matrix = way.apply(torch.eye(8, dtype=torch.float64))
    assert torch.allclose(matrix, matrix.T, atol=1e-12)
    values = torch.linalg.eigvalsh(matrix)
    assert abs(values[0]) < 1e-12, "nothing is left of what all have in common"
    assert way.low - 1e-9 <= values[1]
    assert values[-1] <= way.high + 1e-9
    assert way.events % len(GRAPHS[graph].edges) == 0


def test_chebyshev_pays_with_rounds_for_a_better_spectrum():
    way, bare = chebyshev(ring(20)), plain(ring(20))
    assert way.events == 6 * bare.events  # floor(sqrt(4 / (2 - 2 cos(pi/10))))
    assert way.high / way.low < 2.5 < 40 < bare.high / bare.low


@pytest.mark.parametrize("mixing", [plain, chebyshev])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("graph", GRAPHS)
def test_all_find_the_minimiser(graph, method, mixing):
    problem = ridge(8, seed=1)
    assert problem.error(last(METHODS[method](problem, mixing(GRAPHS[graph])), 1500)) < 1e-10


@pytest.mark.parametrize("method", METHODS)
def test_nodes_with_one_function_in_common_need_no_gossip(method):
    """Equal functions: all nodes stay together, as if one were alone."""
    one = ridge(1, seed=2)
    problem = Quadratics(one.hessians.expand(8, -1, -1), one.linear.expand(8, -1))
    points = last(METHODS[method](problem, plain(ring(8))), 20)
    assert torch.allclose(points, points[:1].expand_as(points), atol=1e-12)


@pytest.mark.parametrize("method", ["opapc", "msda"])
def test_the_accelerated_ones_are(method):
    """36 times the condition number: about 6 times the rounds."""

    def rounds(condition):
        problem = ridge(8, samples=6, condition=condition, seed=1)
        start = problem.error(torch.zeros(8, 10, dtype=torch.float64))
        points = METHODS[method](problem, chebyshev(ring(8)))
        return next(at for at, x in enumerate(points, 1) if problem.error(x) < 1e-6 * start)

    assert 3 * rounds(20.0) < rounds(720.0) < 9 * rounds(20.0)


def test_gradients_of_conjugates_undo_gradients():
    problem = ridge(3)
    x = torch.randn(3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(problem.all_conjugates(problem.all_gradients(x)), x, atol=1e-10)
    for i, gradient in enumerate(problem.gradients):
        assert torch.allclose(gradient(x[i]), problem.all_gradients(x)[i], atol=1e-12)
    assert sum(gradient(problem.minimiser) for gradient in problem.gradients).abs().max() < 1e-9
