"""What a member knows of the run, for whoever asks: written by its loop, read by its registry.

Two sources. With every committed round each member says a few numbers, heard by all (`Said`): so any member can tell of
all, as of that round, without asking anybody. What changes between rounds (who computes, who waits since when) only the
member itself knows: it is fetched from the others' registries when somebody asks, with a short time limit, and a member
that does not answer is shown as the last round left it.
"""

from __future__ import annotations

import ipaddress
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

_MICRO = 1_000_000
JOINING, WITH_OTHERS = "joining", "with the others"
_KEPT = 200  # points, changes and findings that are remembered to be shown


@dataclass(frozen=True)
class Said:
    """What a member says as a round begins, in eight whole numbers.

    lease, used  of the ledger
    leaves       it goes after this round
    loss         mean training loss since the last round; None: it made no step
    units_per_s  of its own work, while it worked
    address      of its registry, HOST:PORT with an IPv4 address; empty: none that fits
    """

    lease: int
    used: int
    leaves: bool
    loss: float | None
    units_per_s: float
    sent_bytes: int
    received_bytes: int
    address: str

    def numbers(self) -> tuple[int, ...]:
        """Eight int64."""
        loss = -1 if self.loss is None else round(min(max(self.loss, 0.0), 1e12) * _MICRO)
        return (
            self.lease, self.used, int(self.leaves), loss, round(self.units_per_s * 1000), self.sent_bytes,
            self.received_bytes, address_number(self.address),
        )  # fmt: skip

    @staticmethod
    def of(numbers: Sequence[int]) -> Said:
        """The inverse of `numbers`, to a millionth."""
        lease, used, leaves, loss, rate, sent, received, address = numbers
        told = None if loss < 0 else loss / _MICRO
        return Said(lease, used, bool(leaves), told, rate / 1000, sent, received, address_text(address))


def address_number(address: str) -> int:
    """IPv4 and port as one number; 0 for what does not fit."""
    host, _, port = address.rpartition(":")
    try:
        return int(ipaddress.IPv4Address(host)) << 16 | int(port)
    except ValueError:
        return 0


def address_text(number: int) -> str:
    """The inverse of `address_number`; empty for 0."""
    return f"{ipaddress.IPv4Address(number >> 16 & 0xFFFFFFFF)}:{number & 0xFFFF}" if number else ""


class Board:
    """One member's; every method may be called from any thread.

    facts  of the run: what `GET /run` says
    """

    def __init__(
        self, name: str, facts: Mapping[str, Any], *, address: str = "", clock: Callable[[], float] = time.time
    ) -> None:
        self.name, self.address, self.facts, self._clock = name, address, dict(facts), clock
        self._lock = threading.Lock()
        self._own: dict[str, Any] = {"phase": JOINING, "since": clock(), "step": 0}
        self._run: dict[str, Any] = {"step": 0, "round": 0, "ended": None}
        self._members: dict[str, dict[str, Any]] = {}
        self._names: tuple[str, ...] = ()
        self._changes: deque[dict[str, Any]] = deque(maxlen=_KEPT)
        self._findings: deque[dict[str, Any]] = deque(maxlen=_KEPT)
        self._curve: deque[tuple[int, float | None]] = deque(maxlen=_KEPT)

    def phase(self, phase: str, step: int) -> None:
        """What this member does now: joining, computing, with the others, evaluating, saving, ended."""
        with self._lock:
            if phase != self._own["phase"]:
                self._own["since"] = self._clock()
            self._own |= {"phase": phase, "step": step}

    def met(self, names: Sequence[str], came: Sequence[str] = (), left: Sequence[str] = ()) -> None:
        """The group as it is now."""
        with self._lock:
            self._names = tuple(names)
            if came or left:
                self._changes.append({"at": self._clock(), "came": list(came), "left": list(left)})

    def round(self, step: int, said: Mapping[str, Said], units: Mapping[str, int], **facts: Any) -> None:
        """A round has committed.

        said   what each member in it said
        units  how many of its units became done
        facts  of the run, as of now
        """
        with self._lock:
            now = self._clock()
            for name, each in said.items():
                before = self._members.get(name, {})
                told = asdict(each)
                told["units"] = before.get("units", 0) + units.get(name, 0)
                told["loss"] = each.loss if each.loss is not None else before.get("loss")
                self._members[name] = told | {"step": step, "last_seen": now}
            self._run |= {"step": step, **facts}
            losses = [each.loss for each in said.values() if each.loss is not None]
            self._curve.append((step, sum(losses) / len(losses) if losses else None))

    def tell(self, **facts: Any) -> None:
        """Facts of the run: valid_loss, ended, ..."""
        with self._lock:
            self._run |= facts

    def find(self, kind: str, who: str, evidence: str) -> None:
        """Something that a person should look at."""
        with self._lock:
            self._findings.append({"at": self._clock(), "kind": kind, "who": who, "evidence": evidence})

    def run(self) -> dict[str, Any]:
        """For `GET /run`: what a newcomer must know, and where else it may ask."""
        with self._lock:
            holds = self._own["phase"] != JOINING
            step = max(self._own["step"], self._run["step"])
            return {
                **self.facts,
                **self._run,
                "step": step,
                "holds": holds,
                "members": {name: self._address(name) for name in self._names},
            }

    def own(self) -> dict[str, Any]:
        """This member's present, as only it knows it."""
        with self._lock:
            return {"name": self.name, "address": self.address, "at": self._clock(), **self._own}

    def others(self) -> dict[str, str]:
        """Registries of the members that are there, by name, but for this one's."""
        with self._lock:
            told = {name: self._address(name) for name in self._names}
        return {name: address for name, address in told.items() if address and name != self.name}

    def _address(self, name: str) -> str:
        if name == self.name:
            return self.address
        told: str = self._members.get(name, {}).get("address", "")
        return told

    def view(self, present: Mapping[str, Mapping[str, Any] | None]) -> dict[str, Any]:
        """Everything, for `GET /status`.

        present  what the others' `own()` said just now; None where one did not answer
        """
        mine = self.own()
        with self._lock:
            total = sum(self._members.get(name, {}).get("units", 0) for name in self._names)
            rows = []
            for rank, name in enumerate(self._names):
                told = self._members.get(name, {})
                live = mine if name == self.name else present.get(name)
                share = told.get("units", 0) / total if total else None
                row = {"name": name, "rank": rank, "share": share, "units": told.get("units", 0)}
                row |= {key: told.get(key) for key in _ROW}
                rate, tokens = row["units_per_s"], self._run.get("tokens_per_unit")
                row["tokens_per_s"] = rate * tokens if rate is not None and tokens else None
                row |= {"phase": None, "since": None, "answers": live is not None}
                if live is not None:
                    row |= {
                        "phase": live["phase"],
                        "since": live["since"],
                        "step": live["step"],
                        "last_seen": live["at"],
                    }
                rows.append(row)
            return {
                "now": self._clock(), "asked": self.name, "run": {**self.facts, **self._run}, "members": rows,
                "waiting": waiting(rows), "changes": list(self._changes), "findings": list(self._findings),
                "curve": [list(point) for point in self._curve],
            }  # fmt: skip


_ROW = ("step", "loss", "units_per_s", "sent_bytes", "received_bytes", "address", "leaves", "last_seen")


def waiting(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """For whom members wait, and since when; None if nobody waits.

    Members that are in a round wait for those that compute still, or do not answer.
    """
    there = [row["since"] for row in rows if row["phase"] == WITH_OTHERS]
    absent = [row["name"] for row in rows if row["phase"] != WITH_OTHERS and row["phase"] != "ended"]
    if not there or not absent:
        return None
    return {"for": absent, "since": min(there)}
