"""The roll call: every few steps members tell each other how they are, beside the compute.

What was told at one call is read at the next, so nobody waits for it; all members read the same, at the same step, and
can therefore decide alike: to stop, above all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from thinwire.collectives import gather_packets
from thinwire.links.base import Handle, Link
from thinwire.packet import Header, Kind, Packet

_MOST_BYTES = 1024
_PACE_S = 2.0  # of the link's clock between calls,
_MOST_STEPS = 50  # but never more steps than these


@dataclass(frozen=True)
class Status:
    """A member's words at a step; counts are from the start of the run.

    loss   mean training loss since the last call
    stops  it was asked to stop
    late   its time is up
    """

    step: int
    seconds: float
    loss: float
    samples: int
    tokens: int
    sent_bytes: int
    received_bytes: int
    stops: bool
    late: bool


class RollCall:
    """Calls that are answered one call later."""

    def __init__(self, link: Link) -> None:
        self._link = link
        # One channel for all calls: where members' local steps are unlike, rounds begin between other calls for each.
        self._channel = link.open("roll call")
        self._asked: Handle[dict[int, Status]] | None = None
        self._every = self._next = 1
        self._before: Status | None = None
        #: This member's own words at the last call, until the others' have been read.
        self.unanswered: Status | None = None

    def _pace(self, answered: Mapping[int, Status]) -> None:
        """About a call every two seconds, by member 0's clock."""
        status, before = answered[0], self._before
        self._before = status
        if before is not None and status.step > before.step and status.seconds > before.seconds:
            steps_per_s = (status.step - before.step) / (status.seconds - before.seconds)
            self._every = max(1, min(_MOST_STEPS, round(_PACE_S * steps_per_s)))

    def call(self, status: Status) -> dict[int, Status] | None:
        """Tell this member's status; what all told at the last call, by rank, if there was one."""
        answered = self.last()
        self._next = status.step + self._every
        self._asked, self.unanswered = self._ask(status), status
        return answered

    def due(self, step: int) -> bool:
        """Whether to call after this step; the same on all members, since it follows from what all were told."""
        return step >= self._next

    def last(self) -> dict[int, Status] | None:
        """What all told at the last call."""
        asked, self._asked = self._asked, None
        if asked is None:
            return None
        answered = asked.wait()
        self.unanswered = None
        self._pace(answered)
        return answered

    def state_dict(self) -> dict[str, Any]:
        """When to call next and what that follows from; for between calls, when all that was told has been read."""
        assert self._asked is None
        before = None if self._before is None else asdict(self._before)
        return {"every": self._every, "next": self._next, "before": before}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on calling as `state_dict()` says; the same on all members."""
        self._every, self._next = state["every"], state["next"]
        self._before = None if state["before"] is None else Status(**state["before"])

    def _ask(self, status: Status) -> Handle[dict[int, Status]]:
        link, channel = self._link, self._channel
        text = torch.frombuffer(bytearray(json.dumps(asdict(status)).encode()), dtype=torch.uint8)
        packet = Packet("json", 0, {"text": text}, Header(kind=Kind.HELLO, sender=link.rank, round=status.step))

        def job() -> dict[int, Status]:
            what = f"the roll call at step {status.step}"
            found = gather_packets(channel, link.rank, link.members, packet, {"text": (torch.uint8, _MOST_BYTES)}, what)
            return {rank: _read(packet) for rank, packet in found.items()}

        return link.spawn(job, f"roll call {status.step}")


def _read(packet: Packet) -> Status:
    told: Mapping[str, object] = json.loads(bytes(packet.fields["text"].numpy()).decode())
    return Status(**told)  # type: ignore[arg-type]
