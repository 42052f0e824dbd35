"""How much delay an outer step bears: whether it settles on the scalar quadratic, where what a round does is linear.

    members' phases:  x = kappa theta_i, theta_i <- (1 - kappa) theta_i        kappa the share of the way they cover
    outer steps:      as the method's, in time or a round late

Stable for kappa below             in time   a round late   eager, 2, 4, 8 members
    SGD(0.7)                       2.86      1.43           2.86  1.90  1.63
    SGD(1.0)                       2.00      1.00           2.00  1.33  1.14
    Nesterov(0.7, 0.9)             1.94      0.36           1.10  0.59  0.46
    Nesterov(0.4, 0.9)             3.39      0.63           1.92  1.04  0.80

Long phases come near to kappa = 1. Momentum and delay add up, and eager updates come near to plain delay as members get
many. Closed forms: Nesterov in time lr kappa < (2 + 2 mu) / (1 + 2 mu), heavy ball in time lr kappa < 2 (1 + mu), heavy
ball a round late lr kappa < 1 - mu.
"""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
from torch import Tensor

from thinwire.method import Method
from thinwire.outer import Memory, Mine, Now, Outer
from thinwire.schedules import back_to_back

_log = logging.getLogger("thinwire")

_ROUNDS = 400  # a growth of 1 % a round is then a factor of 50
_SMALL, _LARGE = 2.0**-40, 2.0**-20  # where to begin, and what is growth for certain: both far below what is clipped


def settles(outer: Outer, kappa: Tensor, *, late: bool, members: int = 1, rounds: int = _ROUNDS) -> Tensor:
    """Whether an outer step that is linear settles, for each kappa; by carrying it out.  bool, like kappa

    late  rounds end as the next ones begin
    """
    anchor = start = torch.full_like(kappa, _SMALL, dtype=torch.float64)
    memory: Memory = {}
    own: Memory = {}
    under_way = None
    early = lately = grown = torch.zeros_like(anchor)
    for number in range(rounds):
        fresh = kappa * start
        update = under_way if late else fresh
        if update is not None:
            anchor, memory = outer.step(anchor, update, memory, Now(number))
        mine = Mine(start - fresh, start, update, update, fresh if late else fresh[:0], members)
        start, own = outer.merge(mine, anchor, own, Now(number))
        under_way, size = fresh, start.abs().nan_to_num(nan=torch.inf)
        grown = grown.maximum(size)
        early = early.maximum(size) if 4 * number < rounds else early
        lately = lately.maximum(size) if 4 * number >= 3 * rounds else lately
    return (grown < _LARGE) & (lately <= early)


def largest_kappa(outer: Outer, *, late: bool, members: int = 1, rounds: int = _ROUNDS) -> float:
    """The share of the way to an optimum up to which rounds settle, to half a percent; between 0.02 and 20."""
    kappas = 0.02 * 1.005 ** torch.arange(1387, dtype=torch.float64)
    settled = settles(outer, kappas, late=late, members=members, rounds=rounds)
    return float(kappas[max(0, int(settled.long().cumprod(0).sum()) - 1)])


def warn(method: Method, members: int) -> None:
    """Say so if long phases between the rounds of a method would make it unstable."""
    late = back_to_back(method.schedule)
    if method.payload.kind != "delta" or not method.outer.linear or (method.schedule.overlap and not late):
        return  # nothing is known of these
    told = _told(method.outer, late, members)
    if told:
        _log.warning(told)


@lru_cache(maxsize=64)
def _told(outer: Outer, late: bool, members: int) -> str:
    if bool(settles(outer, torch.ones(1), late=late, members=members, rounds=_ROUNDS // 2)):
        return ""
    most = largest_kappa(outer, late=late, members=members)
    when = f"with rounds that end as the next ones begin, among {members} members," if late else "in time"
    return (
        f"{outer!r} {when} is stable only while local steps cover less than {most:.0%} of the way to an optimum "
        "between rounds: lower its learning rate or momentum, or let rounds be more frequent (thinwire.stability)"
    )
