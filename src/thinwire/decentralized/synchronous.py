"""Synchronous rivals: all nodes step together, and in every round all edges gossip. What DADAO is measured against.

    W = Lap / lambda_max            one application: every edge once    c = lambda_max / lambda_2
    P = 1 - T_K(...W) / T_K(...)    K of them, K = floor(sqrt(c)): Chebyshev's polynomial, nonzero eigenvalues in 1 +- a

    nids    x'' = (1 - W/2) (2x' - x - (grad f(x') - grad f(x)) / L)
    opapc   u = tau x + (1 - tau) z              h = (x - eta (grad f(u) - mu u + y)) / (1 + eta mu)
            y += theta P h                       x' = (x - eta (grad f(u) - mu u + y)) / (1 + eta mu)
            z = u + 2 tau / (2 - tau) (x' - x)
            tau = min(1, sqrt((1 + a) / (1 - a) mu/L) / 2)    eta = 1/(4 tau L)    theta = 1/(eta (1 + a))
    msda    y' = x - mu/(1 + a) P grad f*(x)     x' = y' + (r - 1)/(r + 1) (y' - y)
            r = sqrt((1 + a) / (1 - a) L/mu)

Cost    to precision eps, times log 1/eps: nids max(L/mu, c) of both; opapc and msda sqrt(L/mu) gradients a node and
        sqrt(c L/mu) applications of W.
Source  nids: Li, Shi & Yan 2017, arXiv:1704.07807. opapc: Kovalev, Salim & Richtarik 2020, arXiv:2006.11773.
        msda: Scaman et al. 2017, arXiv:1702.08704; needs gradients of conjugates, which few functions have cheaply.
Differs they run on stacked vectors in one process: the subject is how many gradients and gossip events they take.

An iterator yields the nodes' points [n, d] after each round, without end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.decentralized.graphs import Graph
from thinwire.decentralized.problems import Quadratics


@dataclass(frozen=True)
class Mixing:
    """A symmetric operator on [n, d] that takes away what nodes have in common.

    apply     x [n, d] -> [n, d]; nothing is left of equal rows, other eigenvalues are in [low, high]
    events    gossip events (an edge, both ways) of one application
    """

    apply: Callable[[Tensor], Tensor]
    low: float
    high: float
    events: int


def plain(graph: Graph) -> Mixing:
    """W: every edge once."""
    lap, low, high = _spectrum(graph)
    return Mixing(lambda x: lap @ x / high, low / high, 1.0, len(graph.edges))


def chebyshev(graph: Graph) -> Mixing:
    """P: the polynomial of degree K of W whose nonzero eigenvalues are nearest to 1."""
    lap, low, high = _spectrum(graph)
    rounds = max(1, math.floor(math.sqrt(high / low) + 1e-9))
    if rounds == 1:
        middle = (low + high) / 2
        return Mixing(lambda x: lap @ x / middle, low / middle, high / middle, len(graph.edges))
    wide = (high + low) / (high - low)

    def shifted(x: Tensor) -> Tensor:
        """The nonzero eigenvalues mapped to [-1, 1], 0 to `wide`."""
        return wide * x - 2 / (high - low) * (lap @ x)

    def apply(x: Tensor) -> Tensor:
        before, now, scale_before, scale = x, shifted(x), 1.0, wide
        for _ in range(rounds - 1):
            before, now = now, 2 * shifted(now) - before
            scale_before, scale = scale, 2 * wide * scale - scale_before
        return x - now / scale

    a = 1 / math.cosh(rounds * math.acosh(wide))
    return Mixing(apply, 1 - a, 1 + a, rounds * len(graph.edges))


def nids(problem: Quadratics, mixing: Mixing) -> Iterator[Tensor]:
    """Exact decentralised gradient descent, step 1/L."""
    step = 1 / problem.smoothness
    x = torch.zeros_like(problem.linear)
    old = problem.all_gradients(x)
    after = x - step * old
    while True:
        yield after
        gradient = problem.all_gradients(after)
        target = 2 * after - x - step * (gradient - old)
        x, old, after = after, gradient, target - mixing.apply(target) / (2 * mixing.high)


def opapc(problem: Quadratics, mixing: Mixing) -> Iterator[Tensor]:
    """The accelerated one with gradients of the functions themselves."""
    mu, smoothness = problem.convexity, problem.smoothness
    tau = min(1.0, math.sqrt(mixing.high / mixing.low * mu / smoothness) / 2)
    eta = 1 / (4 * tau * smoothness)
    theta = 1 / (eta * mixing.high)
    x = y = z = torch.zeros_like(problem.linear)
    while True:
        u = tau * x + (1 - tau) * z
        slope = problem.all_gradients(u) - mu * u
        y = y + theta * mixing.apply((x - eta * (slope + y)) / (1 + eta * mu))
        after = (x - eta * (slope + y)) / (1 + eta * mu)
        x, z = after, u + 2 * tau / (2 - tau) * (after - x)
        yield x


def msda(problem: Quadratics, mixing: Mixing) -> Iterator[Tensor]:
    """The accelerated one with gradients of conjugates: Nesterov's method on the dual."""
    mu, smoothness = problem.convexity, problem.smoothness
    root = math.sqrt(smoothness * mixing.high / (mu * mixing.low))
    x = y = torch.zeros_like(problem.linear)
    while True:
        theta = problem.all_conjugates(x)
        yield theta
        after = x - mu / mixing.high * mixing.apply(theta)
        x, y = after + (root - 1) / (root + 1) * (after - y), after


def _spectrum(graph: Graph) -> tuple[Tensor, float, float]:
    """The Laplacian, its smallest positive and its largest eigenvalue."""
    lap = graph.laplacian()
    values = torch.linalg.eigvalsh(lap)
    return lap, float(values[1]), float(values[-1])
