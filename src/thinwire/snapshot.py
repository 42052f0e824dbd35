"""What a synchronizer keeps, as plain nested values (tensors, numbers, lists, dicts) for state_dict(), and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from typing import Any

import torch
from torch import Tensor

from thinwire.buffers import BufferRows
from thinwire.codecs import Staged
from thinwire.collectives import Carried, Combined, finite
from thinwire.errors import PeerLost
from thinwire.handshake import all_of
from thinwire.links.base import Handle, Link
from thinwire.method import Method
from thinwire.pace import Pace, Pacing, Told
from thinwire.rounds import FragmentState, UnderWay
from thinwire.topologies import Islands


def pack_state(state: FragmentState) -> dict[str, Any]:
    """Tensors, numbers and lists only."""
    return {
        "anchor": state.anchor,
        "memory": dict(state.memory),
        "own": dict(state.own),
        "owed": state.owed,
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
        own={name: value.to(device) for name, value in saved["own"].items()},
        owed=saved["owed"].to(device),
        carried=_unpack_carried(saved["carried"], device),
        begun=saved["begun"],
        committed=saved["committed"],
        idle={int(rank): count for rank, count in saved["idle"].items()},
    )


class Arrived:
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
        "live": under_way.live,
        "x": under_way.x,
        "update": combined.update,
        "counted_as_ours": combined.counted,
        "carried": _pack_carried(combined.carried),
        "ranks": list(combined.ranks),
        "reason": combined.reason,
        "damaged": list(combined.damaged),
        "job_s": combined.job_s,
        "buffers": None if rows is None else {str(rank): list(row) for rank, row in rows.wait().items()},
    }


def unpack_under_way(saved: Mapping[str, Any], device: torch.device) -> tuple[UnderWay, Handle[BufferRows] | None]:
    """The inverse of `pack_under_way`: a round that has arrived."""
    update, counted = (None if v is None else v.to(device) for v in (saved["update"], saved["counted_as_ours"]))
    carried = _unpack_carried(saved["carried"], device)
    combined = Combined(
        update, carried, tuple(saved["ranks"]), saved["reason"], counted, job_s=saved["job_s"],
        damaged=tuple(saved["damaged"]),
    )  # fmt: skip
    under_way = UnderWay(
        saved["fragment"], saved["round"], saved["due"], (saved["counted"][0], saved["counted"][1]),
        saved["live"].to(device), saved["x"].to(device), Arrived(combined),
    )  # fmt: skip
    rows = saved["buffers"]
    if rows is None:
        return under_way, None
    return under_way, Arrived({int(rank): (row[0], row[1]) for rank, row in rows.items()})


def pack_pacing(pacing: Pacing, asked: Handle[dict[int, Told]] | None, *, rescue: bool) -> dict[str, Any]:
    """Waits for what members tell of a round under way, without deciding by it."""
    told: dict[int, Told] | None = None
    try:
        told = None if asked is None else asked.wait()
    except PeerLost:
        if not rescue:
            raise
    return {**asdict(pacing), "told": None if told is None else {rank: asdict(each) for rank, each in told.items()}}


def unpack_pacing(saved: Mapping[str, Any]) -> tuple[Pacing, Handle[dict[int, Told]] | None]:
    """The inverse of `pack_pacing`."""
    decided, told = saved["decided"], saved["told"]
    pacing = Pacing(
        Pace(**saved["pace"]), saved["since"], saved["local"], saved["size2"], tuple(saved["last"]),
        None if decided is None else Pace(**decided),
    )  # fmt: skip
    return pacing, None if told is None else Arrived({rank: Told(**each) for rank, each in told.items()})


def carrying(under_way: UnderWay, change: Callable[[Carried], Carried]) -> UnderWay:
    """A round that has arrived, with a change to what is to be remembered of it."""
    combined = under_way.result.wait()
    return replace(under_way, result=Arrived(replace(combined, carried=change(combined.carried))))


def is_ours(saved: Mapping[str, Any], link: Link) -> bool:
    """Whether a state was saved by this member in a group of this size."""
    return (saved["rank"], saved["members"]) == (link.rank, len(link.members))


def owing(state: FragmentState, under_way: UnderWay) -> FragmentState:
    """The state without a round that parameters hold nothing of any more: what it was to send is owed.

    Together with the local steps since it began, which are counted from the anchor after this.
    """
    unsent = under_way.x if finite(under_way.x) else torch.zeros_like(under_way.x)
    return replace(state, owed=unsent + (under_way.live - state.anchor))


def without_own(state: FragmentState) -> FragmentState:
    """The state as another member may take it over, with the parameters that go with it: it owes what they owe."""
    return replace(state, own={})


def what_is_ours(saved: Mapping[str, Any], method: Method, link: Link) -> Callable[[Carried], Carried]:
    """What a member takes of saved memories; all members call it.

    Error memories are of one member in one group: the neutral value is none. Where members know the mean of each
    other's memories, one that comes without its own makes all begin anew. So it is over islands with what stages
    remember: leaders have it alone, and others may lead now.

    saved  the rank and the number of members that the state is of
    """
    ours = is_ours(saved, link)
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
