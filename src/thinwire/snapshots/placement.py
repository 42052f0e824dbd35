"""Who holds which shard, with which code, and how often: pure functions that all members compute alike.

    shard j of the owner at place p of the members  ->  the member at place p + j, around the circle

So an owner keeps its shard 0, n - 1 others have one each, and everybody holds n: one of each of the n owners before it.
Losing members loses as many shards of any one snapshot at most; where n - k are lost, all can be recovered.

When members change, snapshots in force stay where they are and bear fewer losses (`bearable`); the next ones are dealt
among those present, and replace them. Lost shards are not repaired: to rebuild one takes k of them over the wires, and
the owner's next snapshot sends n - 1 and is newer.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from thinwire.errors import ConfigError
from thinwire.snapshots.erasure import Code


def code_for(members: int) -> Code | None:
    """The code for so many members: (6, 4) where there are six, else one that bears one loss; None for one alone."""
    if members >= 6:
        return Code(6, 4)
    return Code(members, members - 1) if members >= 2 else None


def holders(members: Sequence[int], code: Code) -> dict[int, tuple[int, ...]]:
    """Owner -> the member that holds shard 0, 1, ... of its snapshots.

    members  ranks, in any order; all members deal alike because they are sorted
    """
    circle = sorted(set(members))
    if len(circle) < code.shards:
        raise ConfigError(
            f"{code.shards} shards for {len(circle)} members",
            expected="at most one shard of a snapshot with a member: two would be lost together",
            mend=f"take code_for({len(circle)})",
        )
    return {
        owner: tuple(circle[(place + shard) % len(circle)] for shard in range(code.shards))
        for place, owner in enumerate(circle)
    }


def held_by(member: int, dealt: dict[int, tuple[int, ...]]) -> dict[int, int]:
    """Owner -> which of its shards a member holds."""
    return {owner: of.index(member) for owner, of in dealt.items() if member in of}


def bearable(of: Sequence[int], present: Collection[int], code: Code) -> int:
    """How many losses more a snapshot with these holders bears; below 0 it cannot be recovered."""
    return sum(holder in present for holder in of) - code.needed


def rounds_between(stall_s: float, between_failures_s: float, round_s: float) -> int:
    """How many rounds there should be from snapshot to snapshot.

        tau* = sqrt(2 C M)      the waste C / tau + tau / (2 M) is least there

    Source  Young 1974; Daly 2006. C: stall of a snapshot, M: mean time between failures.
    """
    if min(stall_s, between_failures_s, round_s) < 0 or round_s == 0:
        raise ConfigError(
            f"a stall of {stall_s} s, {between_failures_s} s between failures, rounds of {round_s} s",
            expected="durations of at least 0 s, and rounds that take time",
            mend="measure them: `Capture.stall_s`, and the time of a round",
        )
    return max(1, round(math.sqrt(2 * stall_s * between_failures_s) / round_s))
