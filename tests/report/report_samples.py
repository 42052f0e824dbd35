"""Small records to report on."""

from __future__ import annotations

from thinwire.report import Event, Member, Point, RunRecord


def member(rank: int = 0, *, sent_bytes: int = 1_000_000, wait_s: float = 2.0, hidden_s: float = 0.5) -> Member:
    return Member(
        rank=rank,
        samples=320,
        tokens=0,
        sent_bytes=sent_bytes,
        received_bytes=sent_bytes,
        compute_s=6.0,
        encode_s=1.0,
        wait_s=wait_s,
        apply_s=0.5,
        hidden_s=hidden_s,
        rounds=4,
    )


def record(
    label: str = "diloco",
    losses: tuple[float | None, ...] = (4.0, 2.0, 1.0),
    *,
    every_s: float = 10.0,
    members: tuple[Member, ...] = (member(0), member(1)),
    events: tuple[Event, ...] = (),
    config: str = "[method]\nevery = 50\n",
) -> RunRecord:
    """A run with an evaluation every 50 steps and `every_s` seconds; None is a point without one."""
    curve = tuple(
        Point(
            step=50 * i,
            seconds=every_s * i,
            sent_bytes=500_000 * i,
            train_loss=5.0 - i,
            valid_loss=loss,
            accuracy=None if loss is None else 0.25 * i,
        )
        for i, loss in enumerate(losses)
    )
    return RunRecord(
        label=label,
        method={
            "schedule": "every 50 steps",
            "payload": "delta",
            "codec": "topk(0.015625) | int4",
            "topology": "everyone",
            "aggregator": "mean",
            "outer": "Nesterov(0.7, 0.9)",
        },
        config=config,
        versions={"thinwire": "0.1.0", "torch": "2.6.0"},
        machine="2 processors",
        clock="simulated",
        network="20 Mbit/s up and down, 40 ms",
        seed=7,
        parameters=1234567,
        members=members,
        curve=curve,
        bytes_by_purpose={"round": (1_990_000, 1_990_000), "hello": (10_000, 10_000)},
        rounds_committed=4,
        rounds_skipped=len(events),
        events=events,
        final={"loss": 1.0, "accuracy": 0.5},
        digest="00ff" * 16,
    )
