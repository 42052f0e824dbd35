"""What a synchronizer keeps, as plain nested values (tensors, numbers, lists, dicts) for state_dict(), and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from thinwire.buffers import BufferRows
from thinwire.collectives import Combined, Residuals
from thinwire.links.base import Handle
from thinwire.rounds import FragmentState, UnderWay


def pack_state(state: FragmentState) -> dict[str, Any]:
    """Tensors, numbers and lists only."""
    return {
        "anchor": state.anchor,
        "memory": dict(state.memory),
        "residuals": [state.residuals.own, state.residuals.shard],
        "begun": state.begun,
        "committed": state.committed,
        "idle": {str(rank): count for rank, count in state.idle.items()},
    }


def unpack_state(saved: Mapping[str, Any], device: torch.device) -> FragmentState:
    """The inverse of `pack_state`."""
    return FragmentState(
        anchor=saved["anchor"].to(device),
        memory={name: value.to(device) for name, value in saved["memory"].items()},
        residuals=_residuals(saved, device),
        begun=saved["begun"],
        committed=saved["committed"],
        idle={int(rank): count for rank, count in saved["idle"].items()},
    )


class _Arrived:
    """A handle on a result that is there: a round under way, as a checkpoint brings it back."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def done(self) -> bool:
        return True

    def wait(self) -> Any:
        return self._value


def pack_under_way(under_way: UnderWay, rows: Handle[BufferRows] | None) -> dict[str, Any]:
    """Waits for the round to arrive, without applying it."""
    combined = under_way.result.wait()
    return {
        "fragment": under_way.fragment,
        "round": under_way.round,
        "due": under_way.due,
        "counted": list(under_way.counted),
        "sent": under_way.sent,
        "update": combined.update,
        "residuals": [combined.residuals.own, combined.residuals.shard],
        "ranks": list(combined.ranks),
        "reason": combined.reason,
        "buffers": None if rows is None else {str(rank): list(row) for rank, row in rows.wait().items()},
    }


def unpack_under_way(saved: Mapping[str, Any], device: torch.device) -> tuple[UnderWay, Handle[BufferRows] | None]:
    """The inverse of `pack_under_way`: a round that has arrived."""
    update = None if saved["update"] is None else saved["update"].to(device)
    combined = Combined(update, _residuals(saved, device), tuple(saved["ranks"]), saved["reason"])
    under_way = UnderWay(
        saved["fragment"], saved["round"], saved["due"], (saved["counted"][0], saved["counted"][1]),
        saved["sent"].to(device), _Arrived(combined),
    )  # fmt: skip
    rows = saved["buffers"]
    if rows is None:
        return under_way, None
    return under_way, _Arrived({int(rank): (row[0], row[1]) for rank, row in rows.items()})


def _residuals(saved: Mapping[str, Any], device: torch.device) -> Residuals:
    own, shard = (None if value is None else value.to(device) for value in saved["residuals"])
    return Residuals(own, shard)
