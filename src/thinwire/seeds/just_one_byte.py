"""Just One Byte: every parameter of a model is tuned while members tell each other a byte for every gradient.

    member i, sample s of round t:  z = z(seed, t, i, s);  g = (L(w + eps z) - L(w - eps z)) / (2 eps);  sends C(g)
    all:                            w <- w - (lr / n) sum_(i, s) C(g_is) z(seed, t, i, s)

C writes a sign and a logarithm of seven bits, rounded at random to one of two neighbours, relative to a scale on which
all agree: the median of the last scalars.

Error   E[g z] = grad L + O(eps^2). One estimate is far off: E |g z|^2 = P |grad L|^2 for P parameters, an n-th of it
        for n scalars. That it works on pretrained models owes to their losses having few steep directions. The byte
        adds nothing in the mean, and 0.2 % to the variance. A member that sends nonsense moves the model like `clip`
        honest scalars at most.
Size    a byte a scalar, whatever the size of the model: (N-1)(n + h) sent a member and round, where the packet's frame
        h (92 bytes) outweighs a few scalars: see `samples`. A newcomer needs the base and the log, N n bytes a round.
State   none beside the weights: base and log are the model, to the bit.
Cost    two forward passes a sample, and N n directions replayed: a pass over the weights for every eight of them.
Memory  of inference, and of the largest parameter.
Source  E. Zelikman et al. 2023, arXiv:2306.10015 (shared randomness and the byte); Malladi et al. 2023,
        arXiv:2305.17333 (MeZO: eps 1e-3, learning rates about 1e-6 for models of 1e9 parameters); Spall 1992 (SPSA).
Differs z is +-1 (the papers': normal), so that c z is exact and all machines round alike; the byte's scale follows the
        scalars (theirs is fixed, their code sends raw values); the mean over scalars, where their code divides by the
        root of their number (divide="root"); weights are never walked to and fro, so they do not drift.
"""

from __future__ import annotations

from typing import Literal

from thinwire.seeds.recipe import Recipe


def just_one_byte(
    *,
    samples: int = 1,
    eps: float = 1e-3,
    noise: str = "rademacher",
    rule: str = "sgd",
    code: str = "byte",
    clip: float | None = 6.0,
    trim: float = 0.0,
    divide: Literal["count", "root"] = "count",
    decay: float = 0.0,
    rounding: Literal["stochastic", "nearest"] = "stochastic",
    seed: int = 0,
) -> Recipe:
    """A recipe for `thinwire.tune`, the same on all members.

    samples   directions a member tries in a round, so bytes that it sends; more of them: less noise, longer rounds
    eps       how far apart losses are computed; 1e-2 for adapters and bfloat16 weights
    noise     what directions are made of: "rademacher", "binomial", "sparse(0.25)" for a share of the layers each
    rule      what becomes of scalars: "sgd", "momentum(0.9)", "adam(0.9, 0.99)"
    code      how one is written: "byte", "half", "whole"
    clip      how much a scalar counts at most, in units of their median
    trim      share of a round's scalars that are left out, the largest
    divide    the sum over scalars by their "count", or by its "root"
    decay     weight decay of matrices, decoupled
    rounding  of float16 and bfloat16 weights
    seed      of all directions
    """
    return Recipe(
        samples=samples, eps=eps, noise=noise, rule=rule, code=code, clip=clip, trim=trim, divide=divide, decay=decay,
        rounding=rounding, seed=seed,
    )  # fmt: skip
