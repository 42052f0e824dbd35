"""From the members' files of one step to a universal checkpoint, and whether those files agree.

    value   the anchor; where gradients are sent, the parameter; where each member has a model of its own, the mean
    outer   the outer step's memory, alike on all members
    inner   the mean of the members' optimizer state, one member's, or none
    buffer  the mean; integers: the maximum

Whatever of a state has no place there (error memories, local steps since the last round, rounds under way) is told.

Cost    memory for the states of all members taken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from thinwire.errors import ConfigError
from thinwire.fragments import digest
from thinwire.train import checkpoint
from thinwire.train.universal import Record, Universal

Inner = Literal["mean", "copy", "reset"]
States = Mapping[int, Mapping[str, Any]]
_MEMORIES = {
    "own": "error memories", "dropped": "memories of the second encoding", "shared": "feedback's common memory",
    "stages": "what a staged codec remembers",
}  # fmt: skip


def gather(
    folder: Path, *, step: int | None = None, ranks: Sequence[int] | None = None, inner: Inner = "mean"
) -> Universal:
    """A universal checkpoint of a run's step.

    step   the newest one that all members taken have a file of, if None
    ranks  members to take; all, if None
    inner  the inner optimizers' state: the members' `mean`; `copy`, the first taken member's; `reset`, none
    raises ConfigError if there is no such step, or members differ in what they have in common
    """
    step, ranks = _choose(folder, step, ranks)
    states = {rank: checkpoint.load(folder, step, rank) for rank in ranks}
    for rank, state in states.items():
        _check_kind(checkpoint.file_of(folder, step, rank), state)
    check_agree(folder, step, states)
    first = states[ranks[0]]
    told = _dropped(states)
    records = _records(states, inner, told)
    return Universal(
        step=step,
        members=first["members"],
        answers=first["sync"]["answers"],
        outer=first["sync"]["outer"],
        optimizer=first["optimizer_name"],
        position=max(s["batches"] for s in states.values()) * max(s["batch_samples"] for s in states.values())
        * first["members"],
        rounds=(first["sync"]["committed"], first["sync"]["skipped"]),
        config=first["config"],
        history=_history([state["history"] for state in states.values()]),
        aliases={name: role[1:] for name, role in first["roles"].items() if role.startswith("=")},
        told=tuple(told),
        records=records,
    )  # fmt: skip


def check_agree(folder: Path, step: int, states: States) -> None:
    """Whether members' states of a step are of one run and hold the same anchors.

    raises  ConfigError naming the file that differs from most others, or both of two
    """
    for what, told in (("is of another run", _run_of), ("holds another model", _shared)):
        found = {rank: told(state) for rank, state in states.items()}
        (most, count), *others = Counter(found.values()).most_common()
        if not others:
            continue
        wrong = [rank for rank in sorted(found) if found[rank] != most or count == others[0][1]]
        paths = ", ".join(str(checkpoint.file_of(folder, step, rank)) for rank in wrong)
        raise ConfigError(
            f"{paths}: {what} than the other members'" if count > others[0][1] else f"{paths}: members do not agree",
            expected="the same run, method and anchors in all members' files of a step",
            mend="take an earlier step with --step, or those that agree with --members",
        )


def is_gathered(state: Mapping[str, Any]) -> bool:
    """Whether a member's state says which of its numbers belong to which parameter."""
    return "roles" in state and "layout" in state["sync"]


def _run_of(state: Mapping[str, Any]) -> str:
    sync = state["sync"]
    return repr((state["members"], state["optimizer_name"], sync.get("answers"), sync.get("layout")))


def _shared(state: Mapping[str, Any]) -> str:
    """Digest of what all members of a method with a common model hold alike."""
    sync, model = state["sync"], state["model"]
    if "answers" not in sync:  # by seeds and scalars: one model at every moment
        return digest(*(model[name] for name in sorted(model))).hex()
    if not sync.get("consensus"):
        return ""
    fragments = sync["fragments"]
    held = [part[key] for part in fragments for part in ({"": part["anchor"]}, part["memory"]) for key in sorted(part)]
    held += [model[name] for name, role in state["roles"].items() if role == "frozen"]
    if sync["kind"] == "gradient":
        held += [model[name] for names in sync["layout"] for name in names]
    return digest(*held).hex()


def _choose(folder: Path, step: int | None, ranks: Sequence[int] | None) -> tuple[int, tuple[int, ...]]:
    found = checkpoint.all_steps(folder)
    if not found:
        raise ConfigError(
            f"no checkpoint in {folder}",
            expected="a folder that a run has written checkpoints into",
            mend="name the run's own folder, which has a folder `checkpoints` in it",
        )
    wanted: dict[int, tuple[int, ...]] = {}
    for each, present in found.items():
        members = checkpoint.summary(checkpoint.file_of(folder, each, present[0]))[0]["members"]
        wanted[each] = tuple(sorted(set(ranks))) if ranks is not None else tuple(range(members))
    whole = [each for each in found if set(wanted[each]) <= set(found[each])]
    if step is None and whole:
        step = whole[-1]
    if step not in whole:
        have = "; ".join(f"step {each}: {_members(found[each])}" for each in found)
        lacking = f"step {step}" if step is not None else f"a step with {_members(wanted[max(found)])}"
        raise ConfigError(
            f"{folder} has no whole checkpoint of {lacking}",
            expected=f"the files of all members of one step; it has {have}",
            mend="copy the missing members' files there, choose another --step, or take those present: --members 0,1",
        )
    return step, wanted[step]


def _check_kind(path: Path, state: Mapping[str, Any]) -> None:
    sync = state["sync"]
    if "answers" not in sync:
        raise ConfigError(
            f"{path}: a run by seeds and scalars",
            expected="a checkpoint of a method of six answers",
            mend="its log is what fits any number of members: thinwire export --seeds FOLDER FILE",
        )
    if not is_gathered(state):
        raise ConfigError(
            f"{path}: written by a thinwire that did not note which numbers are which parameter's",
            expected="a checkpoint with the layout of its fragments",
            mend="resume the run with this thinwire, and convert the next checkpoint",
        )
    if sync["shards"]:
        raise ConfigError(
            f"{path}: {sync['shards']}",
            expected="checkpoints of whole models",
            mend="gather an island's shards with torch.distributed.checkpoint first",
        )


def _members(ranks: Iterable[int]) -> str:
    return "members " + ", ".join(map(str, ranks))


# ---- records


def _records(states: States, inner: Inner, told: list[str]) -> dict[str, Record]:
    first = next(iter(states.values()))
    trained = _trained(states, told)
    merged = _inner(states, inner, told)
    records = {}
    for name, role in first["roles"].items():
        if role.startswith("="):
            continue
        rows = [state["model"][name] for state in states.values()]
        dtype = str(rows[0].dtype).removeprefix("torch.")
        if role == "trained":
            value, rounds, outer = trained[name]
            records[name] = Record(role, value.view(rows[0].shape), dtype, rounds, outer, merged.get(name, {}))
        else:
            records[name] = Record(role, _mean(rows), dtype)
    return records


def _trained(states: States, told: list[str]) -> dict[str, tuple[Tensor, int, dict[str, Tensor]]]:
    """Value, rounds and outer memory of each trained parameter."""
    first = next(iter(states.values()))
    sync, lost = first["sync"], set()
    found: dict[str, tuple[Tensor, int, dict[str, Tensor]]] = {}
    for names, saved in zip(sync["layout"], sync["fragments"], strict=True):
        shapes = {name: first["model"][name].shape for name in names}
        sizes = [shape.numel() for shape in shapes.values()]
        memory: dict[str, dict[str, Tensor]] = {name: {} for name in names}
        for key, value in saved["memory"].items() if sync["consensus"] else ():
            if value.numel() == 1:
                memory = {name: {**memory[name], key: value} for name in names}
            elif value.numel() == sum(sizes):
                for name, piece in zip(names, value.reshape(-1).split(sizes), strict=True):
                    memory[name][key] = piece.view(shapes[name])
            else:
                lost.add(key)
        if not sync["consensus"]:
            lost |= set(saved["memory"])
            values = [torch.stack([s["model"][name].float() for s in states.values()]).mean(dim=0) for name in names]
        elif sync["kind"] == "gradient":
            values = [first["model"][name] for name in names]
        else:
            values = list(saved["anchor"].split(sizes))
        found |= {name: (value, saved["committed"], memory[name]) for name, value in zip(names, values, strict=True)}
    if not sync["consensus"]:
        told.append(f"each member has a model of its own: their mean is taken, of {_members(states)}")
    if lost:
        told.append(f"outer state {', '.join(sorted(lost))}: not of single parameters that all have alike; not taken")
    return found


def _inner(states: States, rule: Inner, told: list[str]) -> dict[str, dict[str, Any]]:
    """Inner optimizer state by parameter."""
    if rule == "reset":
        told.append("inner optimizer state: not taken, as asked")
        return {}
    ranks = list(states) if rule == "mean" else list(states)[:1]
    told.append(
        f"inner optimizer state: {'the mean of' if rule == 'mean' else 'a copy of'} {_members(ranks)}’s"
        + (", of counts the largest" if rule == "mean" else "")
    )
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for rank in ranks:
        for optimizer, names in zip(states[rank]["optimizers"], states[rank]["optimized"], strict=True):
            for index, held in optimizer["state"].items():
                rows.setdefault(names[index], []).append(held)
    odd: set[str] = set()
    merged = {name: _merge(held, odd) for name, held in rows.items()}
    if odd:
        told.append(f"inner optimizer state {', '.join(sorted(odd))}: neither tensors nor numbers; not taken")
    return merged


def _merge(rows: Sequence[Mapping[str, Any]], odd: set[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in rows[0].items():
        column = [row[key] for row in rows if key in row]
        if isinstance(value, Tensor):
            found[key] = torch.stack(column).amax(dim=0) if value.ndim == 0 and len(column) > 1 else _mean(column)
        elif value is None or isinstance(value, bool | int | float | str):
            found[key] = value if value is None or isinstance(value, bool | str) else max(column)
        else:
            odd.add(key)
    return found


def _mean(rows: Sequence[Tensor]) -> Tensor:
    """Of rows that are equal, the first to the bit; of floats the mean in float32; else the maximum."""
    if all(torch.equal(row, rows[0]) for row in rows[1:]):
        return rows[0]
    if rows[0].is_floating_point():
        return torch.stack([row.float() for row in rows]).mean(dim=0).to(rows[0].dtype)
    return torch.stack(list(rows)).amax(dim=0)


# ---- what is told


def _dropped(states: States) -> list[str]:
    """A sentence for each thing that has no place in a universal checkpoint."""
    told: list[str] = []
    first = next(iter(states.values()))
    missing = sorted(set(range(first["members"])) - set(states))
    if missing:
        told.append(f"{_members(missing)}: not taken, as asked")

    def tell(what: str, ranks: list[int]) -> None:
        if ranks:
            told.append(f"{what} of {_members(ranks)}: not taken")

    syncs = {rank: state["sync"] for rank, state in states.items()}
    if first["sync"]["consensus"] and first["sync"]["kind"] != "gradient":
        tell("local steps since the last round", [rank for rank, state in states.items() if _is_ahead(state)])
    for key, words in _MEMORIES.items():
        tell(words, [r for r, sync in syncs.items() if any(part["carried"][key] for part in sync["fragments"])])
    tell("the outer step's own memory", [r for r, sync in syncs.items() if any(p["own"] for p in sync["fragments"])])
    tell("what is owed of rounds without effect",
         [r for r, sync in syncs.items() if any(p["owed"].numel() for p in sync["fragments"])])  # fmt: skip
    tell("rounds under way", [rank for rank, sync in syncs.items() if sync["under_way"]])
    tell("the pace that a pacer decided", [rank for rank, sync in syncs.items() if _is_paced(sync)])
    tell("random generators", list(states))
    return told


def _is_ahead(state: Mapping[str, Any]) -> bool:
    """Whether a member's parameters are not its anchor."""
    for names, saved in zip(state["sync"]["layout"], state["sync"]["fragments"], strict=True):
        values = [state["model"][name] for name in names]
        pieces = saved["anchor"].split([value.numel() for value in values])
        pairs = zip(pieces, values, strict=True)
        if any(not torch.equal(piece.view(value.shape).to(value.dtype), value) for piece, value in pairs):
            return True
    return False


def _is_paced(sync: Mapping[str, Any]) -> bool:
    pacing = sync["pacing"]
    return any(pacing["pace"][key] for key in ("local", "parts", "memory")) or pacing["decided"] is not None


def _history(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The first member's, with all members' samples, tokens and bytes."""
    purposes: dict[str, list[int]] = {}
    for row in rows:
        for name, (sent, received) in row["bytes_by_purpose"].items():
            before = purposes.get(name, [0, 0])
            purposes[name] = [before[0] + sent, before[1] + received]
    sums = {key: sum(row[key] for row in rows) for key in ("samples", "tokens")}
    whole: dict[str, Any] = _plain({**rows[0], **sums, "bytes_by_purpose": purposes})
    return whole


def _plain(value: Any) -> Any:
    """As JSON keeps it."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
