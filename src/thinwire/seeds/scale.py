"""How large scalars are, as all members agree: from it follow the byte's top and how far one member's word goes.

    m       the median of |g| over the last rounds that together hold 32 scalars or more, this round's among them; of an
            even number the lower one of the two. 0 counts as 0
    bound   |g| <= clip m          in this round
    E       16 m < 2^E <= 32 m     in the next round

A median of 0 (half lie below the byte's lowest level) counts as about that level, so that E falls by 11; a median at
the top lets it rise by 5. It is all order and powers of two: no rounding, the same on every machine.

Why 16 to 32 times: the byte reaches 15.75 octaves below its top, so to between 1/1700 and 1/3500 of the median. Scalars
of one gradient are spread as a normal distribution: fewer than 1 in 3000 lies below (and is rounded to 0 or up, right
in the mean), and none beyond 10 deviations. The room above is for a scale that grows from one round to the next.

Error   while fewer than half of the scalars in the window lie, m is among those of the others. With one of four it is
        from their 33rd to their 67th percentile: 0.64 to 1.44 times their median, if they are normal; E moves by one.
State   the magnitudes of the last rounds: 32, or those of one round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from thinwire.seeds.codes import HIGHEST, OCTAVES

_ENOUGH = 32  # scalars: a median is then within a fifth of where it would settle, two times of three
_ABOVE = 4  # octaves from the median up to the top, at least


@dataclass(frozen=True)
class Scale:
    """What is agreed before a round.

    exponent  E: codes of the round are relative to it
    seen      magnitudes of the last rounds, oldest first
    """

    exponent: int
    seen: tuple[tuple[float, ...], ...] = ()

    def after(self, magnitudes: Sequence[float], least: int) -> tuple[Scale, float]:
        """The scale of the next round, and m.

        magnitudes  |g| of a round, one or more
        least       what E may not fall below
        """
        seen = (*self.seen, tuple(magnitudes))
        while sum(map(len, seen[1:])) >= _ENOUGH:
            seen = seen[1:]
        ordered = sorted(each for round_ in seen for each in round_)
        median = ordered[(len(ordered) - 1) // 2] or math.ldexp(1.0, self.exponent - OCTAVES)
        _, above = math.frexp(median)  # 2^(above - 1) <= median < 2^above
        return Scale(min(HIGHEST, max(least, above + _ABOVE)), seen), median
