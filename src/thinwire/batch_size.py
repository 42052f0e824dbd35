"""How large the next batch should be: as large as gradient noise asks for, and never smaller than it was.

    norm test            b' = ceil( sum Var_j(g_j) / (eta^2 |g|^2) )                    noise as long as eta |g| at most
    inner-product test   b' = ceil( Var_j(<g_j, g>) / (theta^2 |g|^4) )                 noise along the mean g
    orthogonality test   b' = ceil( sum Var_j(g_j - <g_j, g> / |g|^2 g) / (nu^2 |g|^2) )     and across it
    b <- min(max(b, b'), b_max)                                g = mean_j g_j,  Var_j over samples, n - 1 in its divisor

Per-sample gradients cost memory. Between members there is an estimate of the same noise for two numbers a member, from
gradients that were computed anyway: with N members' means g_i of b_i samples, n in all, and g = sum b_i g_i / n,

    sigma^2 = sum_i b_i |g_i - g|^2 / (N - 1) = (sum_i b_i |g_i|^2 - n |g|^2) / (N - 1)
    |grad|^2 = |g|^2 - sigma^2 / n                                                  the mean's own noise taken out

Error   sigma^2 and |grad|^2 are right in the mean where samples of all members are alike distributed, and noisy: smooth
        the two over steps before dividing. Where members' data differ, their differences count as noise.
Size    two numbers a member (Moments) beside the gradient.
State   b; the two running means and their count: numbers that all members hold alike.
Source  Lau, Liu & Kolar 2024, arXiv:2402.11215 (AdAdaGrad); norm test Byrd et al. 2012; the others Bollapragada, Byrd &
        Nocedal 2018, arXiv:1710.11258. eta 0.1 or 0.5, theta 0.5, nu 1, tested every step, from the authors' code. The
        estimate between members as in McCandlish et al. 2018, arXiv:1812.06162, app. A.1.
Differs the authors' code squares a sum in the orthogonality test of several processes; here it is the formula. The
        optimizer is any one: theirs is torch.optim.Adagrad, or AdaGradNorm, which no kept library has as one number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.errors import ConfigError


def norm_test(gradients: Tensor, *, eta: float = 0.5) -> float:
    """The batch size at which the mean gradient's noise is as long as eta times it.

    gradients  [samples, n] of single samples, two at least
    returns    not rounded: 0 without noise, infinite without a mean
    """
    mean = _mean(gradients)
    noise = (gradients.double() - mean).square().sum() / (len(gradients) - 1)
    return _ratio(float(noise), eta**2 * float(mean @ mean))


def inner_product_test(gradients: Tensor, *, theta: float = 0.5) -> float:
    """The batch size at which noise along the mean gradient is theta times as long as it.

    gradients  [samples, n] of single samples, two at least
    """
    mean = _mean(gradients)
    along = gradients.double() @ mean  # [samples]
    return _ratio(float(along.var()), theta**2 * float(mean @ mean) ** 2)


def orthogonality_test(gradients: Tensor, *, nu: float = 1.0) -> float:
    """The batch size at which noise across the mean gradient is nu times as long as it.

    gradients  [samples, n] of single samples, two at least
    """
    mean = _mean(gradients)
    square = float(mean @ mean)
    if square == 0:
        return norm_test(gradients, eta=nu)
    rows = gradients.double()
    across = rows - torch.outer(rows @ mean / square, mean)  # [samples, n], of mean zero
    return _ratio(float(across.square().sum()) / (len(rows) - 1), nu**2 * square)


@dataclass(frozen=True)
class Moments:
    """What a member tells of its gradient, in numbers that add up over members.

    samples  in its batch, or in those of the members added
    square   samples * |g_i|^2
    members  that are in it
    """

    samples: int
    square: float
    members: int = 1

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.samples + other.samples, self.square + other.square, self.members + other.members)


@dataclass(frozen=True)
class Noise:
    """Gradient noise and signal, alike on all members; smoothed over steps.

    variance  trace of the covariance of one sample's gradient
    signal    |grad|^2, the mean's own noise taken out; may be negative where there is hardly any
    weight    of the steps in it: 1 - decay^steps
    """

    variance: float = 0.0
    signal: float = 0.0
    weight: float = 0.0

    def after(self, total: Moments, mean_square: float, *, decay: float = 0.9) -> Noise:
        """With one more step in it.

        total        all members' moments
        mean_square  |g|^2 of the gradient that they combined to, weighed by samples
        decay        of what is remembered, in [0, 1)
        raises       ConfigError for a group of one: there is nothing to compare
        """
        if not 0 <= decay < 1:
            raise ConfigError(f"decay={decay}", expected="a number in [0, 1)", mend="0.9 remembers about ten steps")
        variance, signal = between_members(total, mean_square)
        keep, take = decay, 1 - decay
        return Noise(
            keep * self.variance + take * variance, keep * self.signal + take * signal, keep * self.weight + take
        )

    def asks_for(self, *, eta: float = 0.5) -> float:
        """The batch size of the norm test, over all members; 0 before the first step.

        The weights of variance and signal are the same, so their ratio needs no correction for the first steps.
        """
        return 0.0 if self.weight == 0 else _ratio(max(0.0, self.variance), eta**2 * max(0.0, self.signal))


def between_members(total: Moments, mean_square: float) -> tuple[float, float]:
    """Variance of one sample's gradient, and squared length of the true one, from members' mean gradients.

    total        all members' moments, two of them at least
    mean_square  |g|^2 of their mean weighed by samples
    returns      both right in the mean; either may be below 0 by chance
    """
    if total.members < 2:
        raise ConfigError(
            f"gradient noise between {total.members} member(s)",
            expected="two at least: the noise is seen in how members differ",
            mend="use norm_test on gradients of single samples",
        )
    variance = (total.square - total.samples * mean_square) / (total.members - 1)
    return variance, mean_square - variance / total.samples


def next_batch_size(now: int, asked: float | Sequence[float], *, largest: int) -> int:
    """The next batch size: the largest that any test asks for, never smaller than now, capped.

    now      samples of a step, over all members
    asked    what tests ask for
    largest  b_max above
    """
    if not 1 <= now <= largest:
        raise ConfigError(
            f"a batch of {now} samples where the largest is {largest}",
            expected="1 <= now <= largest",
            mend="raise the largest batch, or begin with a smaller one",
        )
    most = max(asked) if isinstance(asked, Sequence) else asked
    assert not math.isnan(most)
    return largest if most >= largest else max(now, math.ceil(most))


def _mean(gradients: Tensor) -> Tensor:
    """Mean gradient in float64: the same however samples are divided among members, to 1e-6 and better.  [n]"""
    if gradients.ndim != 2 or len(gradients) < 2:
        raise ConfigError(
            f"gradients of shape {tuple(gradients.shape)}",
            expected="[samples, n], with two samples at least: their variance is asked for",
            mend="torch.func.vmap(grad(loss)) gives them; for one sample a member use Noise",
        )
    return gradients.double().mean(dim=0)


def _ratio(noise: float, signal: float) -> float:
    if noise == 0:
        return 0.0
    return noise / signal if signal > 0 else math.inf
