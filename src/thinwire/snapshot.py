"""What a synchronizer keeps, as plain nested values (tensors, numbers, lists, dicts) for state_dict(), and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from thinwire.buffers import BufferRows
from thinwire.codecs import Staged
from thinwire.collectives import Carried, Combined
from thinwire.handshake import all_of
from thinwire.links.base import Handle, Link
from thinwire.method import Method
from thinwire.rounds import FragmentState, UnderWay
from thinwire.topologies import Islands


def pack_state(state: FragmentState) -> dict[str, Any]:
    """Tensors, numbers and lists only."""
    return {
        "anchor": state.anchor,
        "memory": dict(state.memory),
        "carried": _pack_carried(state.carried),
        "begun": state.begun,
        "committed": state.committed,
        "idle": {str(rank): count for rank, count in state.idle.items()},
    }


def unpack_state(saved: Mapping[str, Any], device: torch.device) -> FragmentState:
    """The inverse of `pack_state`."""
    return FragmentState(
        anchor=saved["anchor"].to(device),
        memory={name: value.to(device) for name, value in saved["memory"].items()},
        carried=_unpack_carried(saved["carried"], device),
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
        "carried": _pack_carried(combined.carried),
        "ranks": list(combined.ranks),
        "reason": combined.reason,
        "damaged": list(combined.damaged),
        "buffers": None if rows is None else {str(rank): list(row) for rank, row in rows.wait().items()},
    }


def unpack_under_way(saved: Mapping[str, Any], device: torch.device) -> tuple[UnderWay, Handle[BufferRows] | None]:
    """The inverse of `pack_under_way`: a round that has arrived."""
    update = None if saved["update"] is None else saved["update"].to(device)
    combined = Combined(
        update, _unpack_carried(saved["carried"], device), tuple(saved["ranks"]), saved["reason"],
        damaged=tuple(saved["damaged"]),
    )  # fmt: skip
    under_way = UnderWay(
        saved["fragment"], saved["round"], saved["due"], (saved["counted"][0], saved["counted"][1]),
        saved["sent"].to(device), _Arrived(combined),
    )  # fmt: skip
    rows = saved["buffers"]
    if rows is None:
        return under_way, None
    return under_way, _Arrived({int(rank): (row[0], row[1]) for rank, row in rows.items()})


def carrying(under_way: UnderWay, change: Callable[[Carried], Carried]) -> UnderWay:
    """A round that has arrived, with a change to what is to be remembered of it."""
    combined = under_way.result.wait()
    return replace(under_way, result=_Arrived(replace(combined, carried=change(combined.carried))))


def what_is_ours(saved: Mapping[str, Any], method: Method, link: Link) -> Callable[[Carried], Carried]:
    """What a member takes of saved memories; all members call it.

    Error memories are of one member in one group: the neutral value is none. Where members know the mean of each
    other's memories, one that comes without its own makes all begin anew. So it is over islands with what stages
    remember: leaders have it alone, and others may lead now.

    saved  the rank and the number of members that the state is of
    """
    ours = (saved["rank"], saved["members"]) == (link.rank, len(link.members))
    tracks = method.feedback is not None and method.feedback.tracks
    leads = isinstance(method.bare_codec, Staged) and isinstance(method.topology, Islands)
    forgotten = set() if ours else {"own", "dropped"}
    if (tracks or leads) and not all_of(link, ours):
        forgotten |= {"own", "dropped", "shared"} if tracks else {"stages"}
    return lambda carried: replace(carried, **{name: {} for name in forgotten})


def _pack_carried(carried: Carried) -> dict[str, dict[str, Tensor]]:
    return {memory.name: dict(getattr(carried, memory.name)) for memory in fields(carried)}


def _unpack_carried(saved: Mapping[str, Mapping[str, Tensor]], device: torch.device) -> Carried:
    return Carried(
        **{memory: {name: value.to(device) for name, value in held.items()} for memory, held in saved.items()}
    )
