"""DADAO: accelerated decentralised optimisation, with Poisson clocks for gradients and others for gossip.

    min_x sum_i f_i(x)     node i knows f_i: L-smooth, mu-strongly convex

    between events   X'  = eta (Xt - X)          Y'  = alpha (Yt - Y)               Z'  = alpha (Zt - Z)
                     Xt' = eta (X - Xt)          Yt' = -theta (nu Xt + Y + Z)       Zt' = eta (Z - Zt)
    gradient at i    G = grad f_i(X) - nu X - Yt
                     X -= gamma G                Xt -= gamma_t G                    Yt += (1 + delta) G
    gossip (i, j)    D = (Y + Z)_i - (Y + Z)_j
                     Z_i -= D/2                  Zt_i -= beta_t D                   and j with -D

    nu = mu/2    r = sqrt(nu/L)    alpha = delta = r/4    eta = r/8    theta = 1/(2r)
    gamma = 1/(4L)    gamma_t = r/(4 nu)    beta_t = 2 chi1/r

Error   E |X_i - x*|^2 falls by exp(-sqrt(mu/L) / (8 sqrt 2)) in a unit of time, if chi1 chi2 <= 1/2 (rates.py).
Size    one vector each way for a gossip event; `rate` events of the graph for n gradients.
State   six vectors a node; sum_i Z_i = 0 once all are advanced to one time. Everything starts at 0, X at x0.
Cost    O(n sqrt(L/mu) log 1/eps) gradients; gossip events O(n sqrt(chi1 chi2) sqrt(L/mu) log 1/eps), chi of the graph
        with rates that add up to n.
Source  Nabli & Oyallon 2023, arXiv:2208.00779; constants and rule as in their code (AdelNabli/DADAO).
Differs the gradient is taken at X as the flow since this node's last gradient gives it, not in steps from gossip to
        gossip: the same up to rounding, and known beforehand, so that it is computed while gossip goes on.
Avoid   for neural networks: nothing holds without convexity, and L and mu must be known. On small graphs synchronous
        methods need fewer gradients and fewer exchanges (benchmarks/results/dadao.md).

It is no method of six answers: there is no round, no anchor and no agreed model; what is due follows from clocks of
nodes and of edges. It is here as the reference for convex problems that gossip methods are measured against.

The rules below are functions of values. Who calls them in which order is virtual.py (one loop) or linked.py (members).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from thinwire.decentralized.graphs import Gossip
from thinwire.errors import ConfigError, DivergedError

#: x [d] -> the gradient of this node's function there [d], both float64.
Gradient = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Constants:
    """What follows from L, mu and chi1, over the six rows of a node.

    flow  float64 [6, 6]: between events d rows/dt = flow @ rows
    kick  float64 [6]: a gradient event takes kick G^T off the rows
    pull  float64 [6]: gossip takes pull D^T off the rows
    """

    nu: float
    flow: npt.NDArray[np.float64]
    kick: Tensor
    pull: Tensor


@dataclass(frozen=True)
class Node:
    """What a node knows. rows: float64 [6, d], X, Xt, Y, Yt, Z, Zt as they were at `time`."""

    rows: Tensor
    time: float = 0.0

    @property
    def x(self) -> Tensor:
        """Its answer [d]."""
        return self.rows[0]


def constants(smoothness: float, convexity: float, gossip: Gossip) -> Constants:
    """From L, mu and the edges' rates.

    raises  ConfigError if mu or L make no sense, or the edges gossip less than the theorem wants
    """
    if not 0 < convexity <= smoothness < math.inf:
        raise ConfigError(
            f"functions of smoothness {smoothness} and strong convexity {convexity}",
            expected="0 < convexity (mu) <= smoothness (L)",
            mend="take the smallest and the largest eigenvalue of all nodes' Hessians; a penalty raises the smallest",
        )
    product = gossip.chi1 * gossip.chi2
    if product > 0.5 * (1 + 1e-6):  # rates are solved for and scaled in floating point
        raise ConfigError(
            f"edges that gossip too seldom: chi1 chi2 = {product:.3g}",
            expected="chi1 chi2 <= 1/2",
            mend=f"use uniform(graph) or optimal(graph), or gossip.scaled({math.sqrt(2 * product):.3g})",
        )
    nu = convexity / 2
    r = math.sqrt(nu / smoothness)
    alpha, eta, theta = r / 4, r / 8, 1 / (2 * r)
    flow = np.zeros((6, 6))
    flow[0, :2] = -eta, eta
    flow[1, :2] = eta, -eta
    flow[2, 2:4] = -alpha, alpha
    flow[3, [1, 2, 4]] = -theta * nu, -theta, -theta
    flow[4, 4:] = -alpha, alpha
    flow[5, 4:] = eta, -eta
    gamma, gamma_t, delta, beta_t = 1 / (4 * smoothness), r / (4 * nu), r / 4, 2 * gossip.chi1 / r
    kick = torch.tensor([gamma, gamma_t, 0, -(1 + delta), 0, 0], dtype=torch.float64)
    pull = torch.tensor([0, 0, 0, 0, 1 / 2, beta_t], dtype=torch.float64)
    return Constants(nu, flow, kick, pull)


def start(x0: Tensor) -> Node:
    """x0 [d] -> the node at time 0."""
    rows = torch.zeros(6, len(x0), dtype=torch.float64)
    rows[0] = x0
    return Node(rows)


def advance(c: Constants, node: Node, time: float) -> Node:
    """The flow from the node's time to `time`."""
    if time == node.time:
        return node
    assert time > node.time, f"back from {node.time} to {time}"
    flow = torch.from_numpy(_scipy().expm(c.flow * (time - node.time)))
    return Node(flow @ node.rows, time)


def gradient_event(c: Constants, node: Node, time: float, gradient: Tensor) -> Node:
    """gradient: of f_i at `advance(c, node after its last gradient event, time).x`."""
    rows = advance(c, node, time).rows
    g = gradient - c.nu * rows[0] - rows[3]
    return Node(torch.addr(rows, c.kick, g, alpha=-1), time)


def offer(node: Node) -> Tensor:
    """What a node that was advanced to the event's time sends along the edge: Y + Z [d]."""
    return node.rows[2] + node.rows[4]


def gossip_event(c: Constants, node: Node, theirs: Tensor) -> Node:
    """One end of an edge, advanced to the event's time; theirs: the other end's offer, whose D is exactly -D."""
    return Node(torch.addr(node.rows, c.pull, offer(node) - theirs, alpha=-1), node.time)


def evaluate(gradient: Gradient, x: Tensor) -> Tensor:
    """The gradient, checked: what is not finite would spread through the whole graph."""
    found = gradient(x)
    if found.shape != x.shape or found.dtype != torch.float64:
        raise ConfigError(
            f"a gradient of {found.dtype} {list(found.shape)} at a point of float64 {list(x.shape)}",
            expected="the same shape, in float64",
            mend="return the derivative by the point it was asked for",
        )
    if not bool(torch.isfinite(found).all()):
        raise DivergedError(
            "a gradient that is not finite",
            expected="finite numbers: with the right L and mu the method converges",
            mend="give a smoothness that is at least the largest eigenvalue of every node's Hessian",
        )
    return found


def _scipy() -> Any:
    try:
        return importlib.import_module("scipy.linalg")
    except ImportError as error:
        raise ConfigError(
            f"DADAO needs the package scipy ({error})",
            expected="the extra `decentralized`, which brings it",
            mend="pip install 'thinwire[decentralized]' on all members",
        ) from error
