"""Schedules of faults: who starts when, and what befalls whom, in simulated seconds.

A *life* is one process of one host: "a.1", after a restart "a.2". Faults of processes name lives; faults of the network
name hosts, and "lighthouse" is one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass

from thinwire.elastic.quorum import Rules
from thinwire.errors import ConfigError

#: Where the quorum is made, as hosts are named.
LIGHTHOUSE = "lighthouse"


@dataclass(frozen=True)
class Life:
    """A process starts, `at_s` after the simulation's beginning, or after another life has ended."""

    name: str
    at_s: float = 0.0
    after: str | None = None


@dataclass(frozen=True)
class Crash:
    """A process ends at a time, whatever it is doing. What it has sent arrives; then its peers see a reset."""

    who: str
    at_s: float


@dataclass(frozen=True)
class CrashSaying:
    """A process ends in the midst of an exchange.

    exchange  which of its exchanges, counted from 0
    sent      so many of that exchange's messages are sent before, in the order of ranks
    of        only exchanges whose label contains this are counted. A label is the channel's purpose and the codec of
              the first packet that is sent: "rounds verdict", "handshake"
    """

    who: str
    exchange: int
    _: KW_ONLY
    sent: int = 0
    of: str = ""


@dataclass(frozen=True)
class Stop:
    """A process does nothing meanwhile (SIGSTOP, SIGCONT): its heart does not beat, its connections stand."""

    who: str
    from_s: float
    until_s: float


@dataclass(frozen=True)
class Cut:
    """What a host and another one say to each other meanwhile is lost, resets too; without another: and anybody."""

    host: str
    other: str | None
    from_s: float
    until_s: float

    def is_between(self, here: str, there: str) -> bool:
        return self.host in (here, there) and self.other in (None, here, there)


@dataclass(frozen=True)
class Slow:
    """What a host says meanwhile arrives that much later."""

    host: str
    late_s: float
    from_s: float
    until_s: float


@dataclass(frozen=True)
class Down:
    """The lighthouse is down meanwhile. It comes back without memory."""

    from_s: float
    until_s: float


Fault = Crash | CrashSaying | Stop | Cut | Slow | Down


@dataclass(frozen=True)
class Plan:
    """What happens in a simulation.

    meeting_limit_s  so long a member waits for a gathering before MeetingLost
    connect_s        so long members of a new gathering wait for each other to connect, before they ask again
    heartbeat_s      time between two heartbeats
    tick_s           the lighthouse looks again so often while somebody waits
    end_s            who is still there then is cut short
    """

    lives: tuple[Life, ...]
    faults: tuple[Fault, ...] = ()
    _: KW_ONLY
    rules: Rules = Rules(min_replicas=1)  # noqa: RUF009  (frozen)
    meeting_limit_s: float = 300.0
    connect_s: float = 10.0
    heartbeat_s: float = 0.1
    tick_s: float = 0.1
    end_s: float = 1e6

    def __post_init__(self) -> None:
        names = [life.name for life in self.lives]
        for name in names:
            if names.count(name) > 1 or "." not in name or host_of(name) == LIGHTHOUSE:
                raise ConfigError(
                    f"a life is named {name!r}",
                    expected="the host, a point and a number: each life once, and none of the lighthouse",
                    mend="name the first life of host a 'a.1', the second one 'a.2'",
                )
        hosts = {*map(host_of, names), LIGHTHOUSE}
        for known, wanted in [(set(names), self._lives_named()), (hosts, self._hosts_named())]:
            for name in wanted:
                if name not in known:
                    raise ConfigError(
                        f"the schedule speaks of {name!r}", expected=f"one of {', '.join(sorted(known))}",
                        mend="correct the name, or add the life",
                    )  # fmt: skip
        if not math.isfinite(self.end_s):
            raise ConfigError("a simulation without an end", expected="a finite end_s", mend="give end_s in seconds")

    def _lives_named(self) -> Iterable[str]:
        yield from (fault.who for fault in self.faults if isinstance(fault, Crash | CrashSaying | Stop))
        yield from (life.after for life in self.lives if life.after is not None)

    def _hosts_named(self) -> Iterable[str]:
        for fault in self.faults:
            if isinstance(fault, Cut | Slow):
                yield fault.host
            if isinstance(fault, Cut) and fault.other is not None:
                yield fault.other


def host_of(name: str) -> str:
    """The host of a life."""
    return name.rpartition(".")[0]
