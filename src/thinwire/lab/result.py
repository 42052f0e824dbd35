"""What a run in the lab came to, and how it is shown."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from rich.table import Table

from thinwire.lab.ledger import Ledger
from thinwire.lab.network import Counters
from thinwire.lab.spec import LabSpec


@dataclass(frozen=True)
class HostResult:
    """One host.

    counters          of its interface, from just before the command started until all had ended
    ledger            what the command wrote to THINWIRE_LEDGER; None if nothing, or nothing legible
    ledger_complaint  why a ledger is not legible; empty otherwise
    """

    rank: int
    address: str
    exit_code: int
    counters: Counters
    ledger: Ledger | None = None
    ledger_complaint: str = ""

    @property
    def sent_ratio(self) -> float | None:
        """Bytes at the interface for a byte in the ledger; None without one."""
        return None if self.ledger is None else _ratio(self.counters.sent_bytes, self.ledger.sent_bytes)

    @property
    def received_ratio(self) -> float | None:
        """The same for what came in."""
        return None if self.ledger is None else _ratio(self.counters.received_bytes, self.ledger.received_bytes)


@dataclass(frozen=True)
class LabResult:
    """A run: the exit code is the first in time that was not 0."""

    spec: LabSpec
    command: tuple[str, ...]
    exit_code: int
    elapsed_s: float
    hosts: tuple[HostResult, ...]

    def as_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        ratios = [{"sent_ratio": host.sent_ratio, "received_ratio": host.received_ratio} for host in self.hosts]
        hosts = [asdict(host) | ratio for host, ratio in zip(self.hosts, ratios, strict=True)]
        return asdict(self) | {"spec": self.spec.as_dict(), "hosts": hosts}


def table(result: LabResult) -> Table:
    """Interface counters beside the program's ledger, a row a host."""
    shown = Table(title=f"{result.spec.hosts} hosts, {result.elapsed_s:.1f} s, counted at their interfaces")
    for name in ("host", "exit", "sent bytes", "/ ledger", "received bytes", "/ ledger", "dropped"):
        shown.add_column(name, justify="right", no_wrap=True)
    for host in result.hosts:
        counted = host.counters
        shown.add_row(
            f"{host.rank}",
            f"{host.exit_code}",
            f"{counted.sent_bytes:,}",
            _shown(host.sent_ratio),
            f"{counted.received_bytes:,}",
            _shown(host.received_ratio),
            f"{counted.dropped_frames:,}",
        )
    complaints = [host.ledger_complaint for host in result.hosts if host.ledger_complaint]
    shown.caption = "\n".join(complaints) or None
    return shown


def _shown(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3f}"


def _ratio(counted: int, noted: int) -> float | None:
    return counted / noted if noted else None
