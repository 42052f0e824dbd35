"""How much of a vector each member should combine for all, on lines of unlike speed.

    minimise t + s  such that  c (1 - w_i) <= t u_i,  c (N - 1) w_i <= t d_i        contributions go to who combines
                               c (N - 1) w_i <= s u_i,  c (1 - w_i) <= s d_i        results come back
                               sum_i w_i = 1,  w_i >= 0

with c the bits of a vector, u_i and d_i what member i's line carries up and down in a second, w_i its share, and t, s
the seconds of the two halves of a round.

Error   exact for lines that carry both directions at once and nothing else: a linear programme (HiGHS). Latency and
        verdicts come on top. Where all lines are alike, even shares are best, at 2 (N - 1) / N vectors each way; where
        a line is slower up than down, as most are at home, it pays to combine little there.
Source  Diskin et al. 2021, arXiv:2106.10207 (DeDLOC).
Differs the halves of their rounds overlap, so that each direction counts as a whole; ours follow one another. They also
        deal out roles to peers that nobody can reach, or that do not compute: members here all do both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from thinwire.errors import ConfigError
from thinwire.train.tasks import import_extra


@dataclass(frozen=True)
class Shares:
    """A plan.

    shares   of each member, in order of rank; for `Everyone(shares)`
    seconds  that a round takes
    even     the same for even shares
    """

    shares: tuple[float, ...]
    seconds: float
    even: float


def shares(up_bits_per_s: Sequence[float], down_bits_per_s: Sequence[float], vector_bytes: int) -> Shares:
    """The shares that end a round soonest.

    up_bits_per_s, down_bits_per_s  of each member's line, in order of rank
    vector_bytes                    that a member's whole vector takes as the codec writes it
    raises                          ConfigError for rates that cannot be
    """
    members = len(up_bits_per_s)
    if members != len(down_bits_per_s) or members < 2:
        raise ConfigError(
            f"{members} rates up and {len(down_bits_per_s)} down",
            expected="one of each for every member, of two members at least",
            mend="give both in order of rank; `thinwire doctor` measures them",
        )
    rates = (*up_bits_per_s, *down_bits_per_s)
    if not all(0 < rate < float("inf") for rate in rates):
        raise ConfigError(
            f"rates {rates}", expected="numbers above 0, in bits a second", mend="leave out who cannot be reached"
        )
    optimize: Any = import_extra("scipy.optimize", extra="decentralized", purpose="a plan of shares")
    unit = min(rates)  # keeps the programme's numbers near 1
    # Variables w_1..w_N, t, s; each limit as row @ variables <= bound, in vectors over units.
    rows, bounds = [], []
    for rank, (up, down) in enumerate(zip(up_bits_per_s, down_bits_per_s, strict=True)):
        for half, (own, others) in enumerate(((up, down), (down, up))):
            for share, constant, rate in ((-1.0, 1.0, own), (members - 1.0, 0.0, others)):
                row = [0.0] * (members + 2)
                row[rank], row[members + half] = share, -rate / unit
                rows.append(row)
                bounds.append(-constant)
    found = optimize.linprog(
        [0.0] * members + [1.0, 1.0], A_ub=rows, b_ub=bounds, A_eq=[[1.0] * members + [0.0, 0.0]], b_eq=[1.0],
        bounds=[(0, None)] * (members + 2), method="highs",
    )  # fmt: skip
    assert found.success, found.message
    vector_s = 8.0 * vector_bytes / unit
    best = tuple(float(share) for share in found.x[:members])
    even = _seconds((1 / members,) * members, up_bits_per_s, down_bits_per_s)
    return Shares(best, float(found.fun) * vector_s, even * 8.0 * vector_bytes)


def _seconds(shares: Sequence[float], up: Sequence[float], down: Sequence[float]) -> float:
    """Of a round with these shares, for a vector of one bit."""
    others = len(shares) - 1
    lines = list(zip(shares, up, down, strict=True))
    there = max(max((1 - w) / u, others * w / d) for w, u, d in lines)
    back = max(max(others * w / u, (1 - w) / d) for w, u, d in lines)
    return there + back
