"""A strongly convex sum whose answer is known, to try methods on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.decentralized.dadao import Gradient
from thinwire.errors import ConfigError


@dataclass(frozen=True)
class Quadratics:
    """f_i(x) = x^T H_i x / 2 - b_i^T x. hessians H: float64 [n, d, d], positive definite; linear b: float64 [n, d]."""

    hessians: Tensor
    linear: Tensor

    @property
    def gradients(self) -> list[Gradient]:
        """H_i x - b_i, a function for each node."""
        return [_gradient(h, b) for h, b in zip(self.hessians, self.linear, strict=True)]

    def all_gradients(self, x: Tensor) -> Tensor:
        """x [n, d], a point for each node -> [n, d]."""
        return torch.einsum("nij,nj->ni", self.hessians, x) - self.linear

    def all_conjugates(self, y: Tensor) -> Tensor:
        """Gradients of the conjugates: the x at which node i's gradient is y_i. [n, d] -> [n, d]."""
        x: Tensor = torch.linalg.solve(self.hessians, y + self.linear)
        return x

    @property
    def smoothness(self) -> float:
        """L: the largest eigenvalue of any Hessian."""
        return float(torch.linalg.eigvalsh(self.hessians).max())

    @property
    def convexity(self) -> float:
        """mu: the smallest one."""
        return float(torch.linalg.eigvalsh(self.hessians).min())

    @property
    def minimiser(self) -> Tensor:
        """Of the sum: [d]."""
        x: Tensor = torch.linalg.solve(self.hessians.sum(dim=0), self.linear.sum(dim=0))
        return x

    def error(self, x: Tensor) -> float:
        """Mean over the nodes of the squared distance to the minimiser; x [n, d]."""
        return float((x - self.minimiser).square().sum(dim=1).mean())


def ridge(nodes: int, *, dimension: int = 10, samples: int = 10, condition: float = 20.0, seed: int = 0) -> Quadratics:
    """Ridge regression: f_i(x) = |A_i x - t_i|^2 / (2 samples) + penalty |x|^2 / 2, each node with data of its own.

    condition  L / mu; the penalty is chosen so that it comes out
    raises     ConfigError if no positive penalty gives this condition
    """
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(nodes, samples, dimension, generator=generator, dtype=torch.float64)
    answers = torch.randn(nodes, dimension, 1, generator=generator, dtype=torch.float64)  # nodes disagree on purpose
    t = a @ answers + 0.1 * torch.randn(nodes, samples, 1, generator=generator, dtype=torch.float64)
    plain = Quadratics(a.mT @ a / samples, (a.mT @ t / samples).squeeze(-1))
    penalty = (plain.smoothness - condition * plain.convexity) / (condition - 1) if condition > 1 else -1.0
    if penalty < 0:
        raise ConfigError(
            f"ridge regression of condition {condition:g}",
            expected=f"between 1 and {plain.smoothness / plain.convexity:.3g}, which these data have without a penalty",
            mend="ask for a condition in between, or for fewer samples a node",
        )
    return Quadratics(plain.hessians + penalty * torch.eye(dimension, dtype=torch.float64), plain.linear)


def _gradient(hessian: Tensor, linear: Tensor) -> Gradient:
    return lambda x: hessian @ x - linear
