"""What a link's numbers mean for training over it."""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Codec -> bits it writes for a parameter, without headers and scales.
BITS_PER_PARAMETER = {"fp32": 32, "bf16": 16, "int4": 4}
MODELS = {"1 M": 10**6, "100 M": 10**8, "1 B": 10**9}
STEP_S = 1.0  # assumed for a local step, as no model was seen; the advice scales with it
_CLOCKS_AGREE_S = 2.0
_LOPSIDED = 3.0


@dataclass(frozen=True)
class SyncCost:
    """One full synchronisation of two members.

    parameters  of the model
    codec       how they are written
    time_s      bytes over the slower direction, and one round trip; for many members up to twice that (2 (N-1) / N)
    every       local steps of `STEP_S` seconds that take as long: with overlap, `every` of at least this hides it
    """

    parameters: int
    codec: str
    time_s: float
    every: int


def sync_costs(*, rate_bits_per_s: float, round_trip_s: float) -> tuple[SyncCost, ...]:
    """For models of three sizes and three codecs."""
    costs = []
    for parameters in MODELS.values():
        for codec, bits in BITS_PER_PARAMETER.items():
            time_s = parameters * bits / rate_bits_per_s + round_trip_s
            costs.append(SyncCost(parameters, codec, time_s, max(1, math.ceil(time_s / STEP_S))))
    return tuple(costs)


def link_advice(
    *, sent_bits_per_s: float, received_bits_per_s: float, clock_ahead_s: float, differing: tuple[str, ...]
) -> tuple[str, ...]:
    """Sentences; the table of costs stands beside them.

    differing  "torch 2.6.0 here, 2.7.1 there" for each version that differs
    """
    advice = [f"versions differ ({text}): install the same on both, or results will not be equal" for text in differing]
    if abs(clock_ahead_s) > _CLOCKS_AGREE_S:
        way = "ahead of" if clock_ahead_s > 0 else "behind"
        advice.append(
            f"the other clock is {abs(clock_ahead_s):.1f} s {way} this one: training does not mind, certificates and "
            "logs do; switch on time synchronisation (timedatectl set-ntp true)"
        )
    slow, fast = sorted((sent_bits_per_s, received_bits_per_s))
    if fast > _LOPSIDED * slow:
        way = "to" if sent_bits_per_s < received_bits_per_s else "from"
        advice.append(
            f"the way {way} the other host is {fast / slow:.0f} times slower than the way back: a round waits for it"
        )
    example = sync_costs(rate_bits_per_s=slow, round_trip_s=0.0)
    full, small = (next(c for c in example if c.parameters == 10**8 and c.codec == name) for name in ("fp32", "int4"))
    if full.every == 1:
        advice.append("fast enough to synchronise 100 M parameters in fp32 within a step of 1 s")
    else:
        advice.append(
            f"for 100 M parameters and steps of {STEP_S:g} s: synchronise every {full.every} steps or more in fp32 "
            f"with overlap, every {small.every} in int4; `topk(1/64) | int4` sends about a fiftieth of fp32"
        )
    return tuple(advice)


def readable_time(seconds: float) -> str:
    """Two or three digits and a unit a person thinks in."""
    for limit_s, unit_s, unit in ((1e-3, 1e-6, "us"), (1.0, 1e-3, "ms"), (120.0, 1.0, "s"), (7200.0, 60.0, "min")):
        if seconds < limit_s:
            return f"{seconds / unit_s:.3g} {unit}"
    return f"{seconds / 3600:.3g} h"


def readable_rate(bits_per_s: float) -> str:
    """The same for a rate, in decimal units of bits."""
    for unit, size in (("Gbit/s", 1e9), ("Mbit/s", 1e6)):
        if bits_per_s >= size:
            return f"{bits_per_s / size:.3g} {unit}"
    return f"{bits_per_s / 1e3:.3g} kbit/s"
