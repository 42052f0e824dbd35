"""What a lab looks like: how many hosts, and what the links between them can carry."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, asdict, dataclass

from thinwire.errors import ConfigError

MOST_HOSTS = 64
ETHERNET_BYTES = 14  # the frame header the kernel counts; preamble, checksum and gap are not counted
#: Ethernet 14 + IPv4 20 + TCP 20 + timestamp option 12: what a frame of a TCP stream carries beside the stream.
HEADER_BYTES = ETHERNET_BYTES + 20 + 20 + 12

_SLACK_BYTES = 256  # tbf's bucket is rounded down to clock ticks; a bucket under one frame would drop every frame
_SLACK_S = 0.002  # how late a timer may fire without the rate suffering
_LEAST_QUEUE_FRAMES = 64


@dataclass(frozen=True)
class LabSpec:
    """Hosts around one switch, each on its own link.

    hosts                 1 to 64
    rate_bits_per_s       from a host to the switch, Ethernet headers included; None: unlimited
    down_rate_bits_per_s  from the switch to a host; None: as `rate_bits_per_s`; math.inf: unlimited
    delay_s               from a host to any other, one way; a round trip takes twice that
    mtu                   bytes of a frame without its Ethernet header; docs/lab.md says why it is 9000
    queue_s               what waits at a full link before frames are dropped, in seconds at its rate
                          (64 frames at least): home routers hold 0.1 to 1 s
    subnet                s in the addresses 10.77.s.1, 10.77.s.2, ... of the hosts; None: a free one
    """

    hosts: int
    _: KW_ONLY
    rate_bits_per_s: float | None = None
    down_rate_bits_per_s: float | None = None
    delay_s: float = 0.0
    mtu: int = 9000
    queue_s: float = 0.25
    subnet: int | None = None

    def __post_init__(self) -> None:
        _check(1 <= self.hosts <= MOST_HOSTS, f"{self.hosts} hosts", f"1 to {MOST_HOSTS}", "ask for fewer hosts")
        for name in ("rate_bits_per_s", "down_rate_bits_per_s"):
            rate = getattr(self, name)
            fits = rate is None or rate >= 1000
            _check(fits, f"{name}={rate}", "1000 bit/s or more", "write 20e6 for 20 Mbit/s, None for unlimited")
        finite = math.isfinite(self.delay_s) and 0 <= self.delay_s <= 10
        _check(finite, f"delay_s={self.delay_s}", "0 to 10 seconds, one way", "write 0.040 for 40 ms")
        _check(576 <= self.mtu <= 65_000, f"mtu={self.mtu}", "576 to 65000 bytes", "1500 is the internet, 9000 jumbo")
        _check(0 < self.queue_s <= 10, f"queue_s={self.queue_s}", "over 0, up to 10 seconds", "write 0.25 for 250 ms")
        fits = self.subnet is None or 0 <= self.subnet <= 255
        _check(fits, f"subnet={self.subnet}", "0 to 255, or None", "leave it out and a free one is taken")

    @property
    def up_bits_per_s(self) -> float:
        """From a host to the switch; math.inf where unlimited."""
        return math.inf if self.rate_bits_per_s is None else self.rate_bits_per_s

    @property
    def down_bits_per_s(self) -> float:
        """From the switch to a host; math.inf where unlimited."""
        return self.up_bits_per_s if self.down_rate_bits_per_s is None else self.down_rate_bits_per_s

    def as_dict(self) -> dict[str, object]:
        """Plain values, for JSON; unlimited is None."""
        return {name: None if value == math.inf else value for name, value in asdict(self).items()}


def token_bucket(rate_bits_per_s: float, *, mtu: int, queue_s: float) -> str:
    """What `tc` is told so that it holds a link to a rate.

    The bucket is as small as the rate allows, since whatever it holds passes at full speed after a pause: one frame,
    and what flows during a late timer. The kernel charges whole frames, Ethernet header included.
    """
    frame = mtu + ETHERNET_BYTES
    bytes_per_s = rate_bits_per_s / 8
    bucket = frame + _SLACK_BYTES + math.ceil(bytes_per_s * _SLACK_S)
    queue = max(math.ceil(bytes_per_s * queue_s), _LEAST_QUEUE_FRAMES * frame)
    return f"tbf rate {round(rate_bits_per_s)}bit burst {bucket}b limit {queue}b"


def _check(holds: bool, wrong: str, expected: str, mend: str) -> None:
    if not holds:
        raise ConfigError(f"lab: {wrong}", expected=expected, mend=mend)
