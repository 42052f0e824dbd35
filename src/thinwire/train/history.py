"""What a member remembers of a run, and the record of it that all members make together at the end."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil
import torch
from torch import nn

from thinwire.collectives import gather_packets
from thinwire.config import Run, SimulatedLink, dump
from thinwire.fragments import digest
from thinwire.links.base import Link
from thinwire.packet import Header, Kind, Packet
from thinwire.report.record import Event, Member, Point, RunRecord
from thinwire.synchronizer import Synchronizer, Timing
from thinwire.train.tuning import Tuned
from thinwire.version import __version__

_MOST_FACTS_BYTES = 1 << 16
_MOST_TOLD = 5  # of a member's failed checkpoints, in the record
#: The kind of the events that tell of a checkpoint that could not be written.
NOT_SAVED = "checkpoint failed"


@dataclass
class History:
    """What a member remembers of the run for its record; travels in checkpoints, so that a resumed run tells it all."""

    seconds: float = 0.0
    samples: int = 0
    tokens: int = 0
    timing: Timing = field(default_factory=Timing)
    bytes_by_purpose: dict[str, tuple[int, int]] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    evaluating_s: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @staticmethod
    def from_dict(saved: Mapping[str, Any]) -> History:
        """The inverse of `as_dict`."""
        return History(
            seconds=saved["seconds"],
            samples=saved["samples"],
            tokens=saved["tokens"],
            timing=Timing(**saved["timing"]),
            bytes_by_purpose={name: (pair[0], pair[1]) for name, pair in saved["bytes_by_purpose"].items()},
            points=[Point(**point) for point in saved["points"]],
            events=[Event(**event) for event in saved["events"]],
            evaluating_s=saved["evaluating_s"],
        )


def make_record(
    run: Run, link: Link, sync: Synchronizer | Tuned, model: nn.Module, whole: History, final: Mapping[str, float]
) -> RunRecord:
    """The record of a run that has ended; all members call it.

    whole  this member's history, earlier sessions included
    final  the last evaluation; empty on members that did not evaluate
    """
    told = gather_json(link, facts_of(link.rank, sync, whole), "the record")
    return record_of(run, link.rank, sync, model, whole, final, told)


def facts_of(rank: int, sync: Synchronizer | Tuned, whole: History) -> dict[str, Any]:
    """What a member tells of itself for the record."""
    sent, received = totals(whole)
    timing = whole.timing
    spent = timing.wait_s + timing.encode_s + timing.apply_s + whole.evaluating_s
    member = Member(
        rank=rank, samples=whole.samples, tokens=whole.tokens, sent_bytes=sent, received_bytes=received,
        compute_s=max(0.0, whole.seconds - spent), encode_s=timing.encode_s, wait_s=timing.wait_s,
        apply_s=timing.apply_s, hidden_s=timing.hidden_s, rounds=sync.committed,
    )  # fmt: skip
    unsaved = [asdict(event) for event in whole.events if event.kind == NOT_SAVED][-_MOST_TOLD:]
    return {"member": asdict(member), "bytes": whole.bytes_by_purpose, "unsaved": unsaved}


def record_of(
    run: Run, rank: int, sync: Synchronizer | Tuned, model: nn.Module, whole: History, final: Mapping[str, float],
    told: Mapping[int, Mapping[str, Any]],
) -> RunRecord:  # fmt: skip
    """The record, of what members have told.

    rank  this member's, whose history is the curve
    told  `facts_of` members, by rank
    """
    purposes: dict[str, tuple[int, int]] = {}
    for facts in told.values():
        for name, (out, into) in facts["bytes"].items():
            before = purposes.get(name, (0, 0))
            purposes[name] = (before[0] + out, before[1] + into)
    theirs = [Event(**each) for each_rank in told if each_rank != rank for each in told[each_rank]["unsaved"]]
    weights = digest(*sync.consensus()).hex()
    return RunRecord(
        label=run.method.name,
        method=run.method.build().answers(),
        config=dump(run),
        versions={
            "thinwire": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        machine=_machine(next(model.parameters()).device),
        clock="simulated" if isinstance(run.link, SimulatedLink) else "wall",
        network=_network(run),
        seed=run.seed,
        parameters=sum(p.numel() for p in model.parameters()),
        members=tuple(Member(**facts["member"]) for facts in told.values()),
        curve=tuple(whole.points),
        bytes_by_purpose=purposes,
        rounds_committed=sync.committed,
        rounds_skipped=sync.skipped,
        events=tuple(sorted([*whole.events, *theirs], key=lambda event: event.step)),
        final=final,
        digest=weights,
    )


def gather_json(link: Link, facts: Mapping[str, Any], what: str) -> dict[int, dict[str, Any]]:
    """What every member tells, by rank; all members call it."""
    text = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
    packet = Packet("json", 0, {"text": text}, Header(kind=Kind.HELLO, sender=link.rank))
    layout = {"text": (torch.uint8, _MOST_FACTS_BYTES)}
    found = gather_packets(link.open("roll call"), link.rank, link.members, packet, layout, what)
    return {rank: json.loads(bytes(each.fields["text"].numpy()).decode()) for rank, each in found.items()}


def totals(history: History) -> tuple[int, int]:
    """Bytes sent and received, over all purposes."""
    pairs = history.bytes_by_purpose.values()
    return sum(sent for sent, _ in pairs), sum(received for _, received in pairs)


def _machine(device: torch.device) -> str:
    memory = psutil.virtual_memory().total / 2**30
    words = f"{psutil.cpu_count()} processors, {memory:.0f} GiB, {platform.system()} {platform.machine()}"
    return f"{words}, {torch.cuda.get_device_name(device)}" if device.type == "cuda" else words


def _network(run: Run) -> str:
    link = run.link
    if isinstance(link, SimulatedLink):
        return f"simulated: {link.rate} up and down, {link.delay} one way, {link.step_time} a local step"
    return f"torch.distributed ({link.backend})"
