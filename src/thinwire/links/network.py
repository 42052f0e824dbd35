"""The simulated network: when a message that is handed over is where it is to go. Arithmetic, without threads.

A message of b bytes leaves when the sender's up-link is free and takes 8b/up_rate there, travels for the latency, and
takes 8b/down_rate on the receiver's down-link, which it shares with the other messages to that receiver, first come
first served: whose first bit is there earlier goes first. Messages of up to 576 bytes (verdicts, roll calls) do not
queue behind larger ones, but take their time from them: connections share a link frame by frame, so that a word passes
while megabytes are on their way. Framing (TCP, IP, Ethernet: about 5 % at full frames) is not simulated.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from statistics import NormalDist

from thinwire.errors import ConfigError

#: Of a message: channel, turn, from, to.
Address = tuple[int, int, int, int]

_NORMAL = NormalDist()
SMALL_BYTES = 576  # what every network passes in one piece


@dataclass(frozen=True)
class Network:
    """What is simulated. A single number holds for every member, a sequence gives one for each.

    up_bits_per_s, down_bits_per_s  None is unlimited
    latency_s                       one way, on top of the transmission; of unlike members the mean of both ends'
    jitter                          sigma of a log-normal factor on the latency, drawn anew for every message from its
                                    address: its median is 1, and the same call draws the same
    step_s                          cost of one local step
    patience_s                      simulated seconds a member waits for a message before its peer counts as lost
    """

    up_bits_per_s: float | Sequence[float] | None = None
    down_bits_per_s: float | Sequence[float] | None = None
    latency_s: float | Sequence[float] = 0.0
    _: KW_ONLY
    jitter: float = 0.0
    step_s: float | Sequence[float] = 0.0
    patience_s: float = 24 * 3600.0


class Wires:
    """The links of all members, and until when each is taken. Asked in the order of time."""

    def __init__(self, network: Network, members: int) -> None:
        self._up = [_Way(rate) for rate in each(network.up_bits_per_s, members)]
        self._down = [_Way(rate) for rate in each(network.down_bits_per_s, members)]
        self._latency_s = [seconds or 0.0 for seconds in each(network.latency_s, members)]
        self._jitter = network.jitter

    def leave(self, address: Address, size: int, now: float) -> tuple[float, float]:
        """When the first and the last bit of a message could be at the receiver's down-link."""
        first, last = self._up[address[2]].carry(size, now)
        latency_s = self._drawn_latency_s(address)
        return first + latency_s, last + latency_s

    def arrive(self, to: int, size: int, first: float, last: float) -> float:
        """When all of it is there; what a slow sender trickles in leaves room for others."""
        _, there = self._down[to].carry(size, first)
        return max(last, there)

    def _drawn_latency_s(self, address: Address) -> float:
        mean_s = (self._latency_s[address[2]] + self._latency_s[address[3]]) / 2
        if not self._jitter or not mean_s:
            return mean_s
        drawn = hashlib.blake2b(struct.pack("<4q", *address), digest_size=6).digest()
        uniform = (int.from_bytes(drawn, "little") + 0.5) / 2**48  # 48 bits and a half: never rounded to 0 or 1
        return mean_s * math.exp(self._jitter * _NORMAL.inv_cdf(uniform))


class _Way:
    """One direction of a member's link."""

    def __init__(self, rate_bits_per_s: float | None) -> None:
        self._rate = rate_bits_per_s
        self._free = self._free_for_small = 0.0  # from when on

    def carry(self, size: int, at: float) -> tuple[float, float]:
        """When a message that is there at a time begins and ends to pass."""
        if self._rate is None:
            return at, at
        takes = 8.0 * size / self._rate
        if size > SMALL_BYTES:
            start = max(at, self._free)
            self._free = start + takes
        else:
            start = max(at, self._free_for_small)
            self._free_for_small = start + takes
            self._free = max(self._free, start) + takes
        return start, start + takes


def each(value: float | Sequence[float] | None, members: int) -> list[float | None]:
    """A value for every member."""
    if value is None or isinstance(value, int | float):
        return [value] * members
    if len(value) != members:
        raise ConfigError(
            f"the network describes {len(value)} members, there are {members}",
            expected="one number for all members or one for each",
            mend=f"give {members} values",
        )
    return list(value)
