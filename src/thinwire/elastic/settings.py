"""Time limits of a group that changes: each follows from what was measured, and none is for ever.

    exchange      t   the longest exchange so far, in seconds
    round period  p   from one meeting to the next, the longest so far: local steps and what is exchanged between them

A limit that is too short forms groups without those who merely compute longer; one that is too long makes a crash
cost more. Where nothing was measured yet the limits are long: the first round compiles, loads and warms up.
"""

from __future__ import annotations

from dataclasses import dataclass

from thinwire.errors import ConfigError

UNMEASURED_PERIOD_S = 600.0  # until the first round was made


@dataclass(frozen=True)
class Limits:
    """What a member waits for, and how long. All in seconds.

    exchange_s    the longest exchange measured, t
    period_s      the longest round period measured, p; None before the first
    heartbeat_s   after which a silent member is gone: 2 to 5 between machines of one room, 10 to 15 over the sea
    connect_s     for connecting with one another once it is known who is there, and for reaching a lighthouse
    meet_s        overrides the limit of a whole meeting
    hang_s        overrides how long a heart beats for a trainer that comes to no meeting
    """

    exchange_s: float = 0.0
    period_s: float | None = None
    heartbeat_s: float = 5.0
    connect_s: float = 30.0
    meet_s: float | None = None
    hang_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("heartbeat_s", "connect_s", "meet_s", "hang_s", "period_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(
                    f"{name} is {value}",
                    expected="seconds above 0",
                    mend=f"leave {name} out for its default",
                )

    @property
    def round_s(self) -> float:
        """The round period that is reckoned with."""
        return UNMEASURED_PERIOD_S if self.period_s is None else self.period_s

    @property
    def join_s(self) -> float:
        """How long a lighthouse waits for members whose hearts beat: 1.5 p, lest those who come first pair up."""
        return max(1.5 * self.round_s, 2 * self.heartbeat_s)

    @property
    def meeting_s(self) -> float:
        """A whole meeting, over all lighthouses: 2 p, the lighthouse's wait, an exchange, connecting, and 30 s."""
        if self.meet_s is not None:
            return self.meet_s
        return 2 * self.round_s + self.join_s + max(20.0, 3 * self.exchange_s) + self.connect_s + 30.0

    @property
    def heart_s(self) -> float:
        """How long a heart beats for a trainer that comes to no meeting: 3 p and an exchange, at least a minute."""
        if self.hang_s is not None:
            return self.hang_s
        return max(60.0, 3 * self.round_s + max(20.0, 3 * self.exchange_s))
