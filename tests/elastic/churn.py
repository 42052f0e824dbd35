"""A tiny model trained by members that come, go and crash, and what must hold of their logs.

Each life has a coordinate of its own in the parameter `marks`, and every local step adds exactly 1 there. So the common
model says how many of whose steps were counted, and the logs say how many should have been.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import nn

import thinwire
from thinwire.elastic.link import Change, ElasticLink
from thinwire.elastic.quorum import Rules
from thinwire.elastic.schedules import Crash, CrashSaying, Cut, Down, Fault, Life, Plan, Slow, Stop
from thinwire.elastic.simulated import SimulatedMeeting, simulate
from thinwire.elastic.world import Ended
from thinwire.errors import MeetingLost
from thinwire.fragments import digest
from thinwire.links.network import Network
from thinwire.rounds import Committed, Outcome

STEPS = 24
RATE = 0.125  # of the local steps; a power of two, so that a mark is exactly 1


class Marked(nn.Module):
    """A regression, and a coordinate for every life."""

    def __init__(self, lives: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.marks = nn.Parameter(torch.zeros(lives))
        self.weight = nn.Parameter(torch.randn(3, 5, generator=generator))
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.bias


@dataclass
class Heard:
    """A committed round of fragment 0, as one member heard of it."""

    run: str
    epoch: int
    round: int
    group: tuple[str, ...]
    counted: tuple[str, ...]
    said: dict[str, tuple[int, int]]  # local steps made so far, and at the last time that the state was given


@dataclass
class Log:
    """Of one life."""

    place: int
    made: int = 0
    since: int = 0
    run: str = ""  # who began it
    joined_s: float = math.inf
    heard: list[Heard] = field(default_factory=list)
    held: dict[tuple[object, ...], str] = field(default_factory=dict)  # run, epoch, fragment, round -> digest after it
    settled: dict[tuple[object, ...], str] = field(default_factory=dict)  # run, epoch -> digest at its beginning
    changes: list[Change] = field(default_factory=list)
    marks: torch.Tensor | None = None
    end: tuple[int, str] | None = None


@dataclass(frozen=True)
class Case:
    """A method, and what may be asked of it.

    most   local steps that a crash may cost
    again  as many more for every gathering that broke before: what runs beside the compute is not done again at once,
           its steps go with the next round
    exact  the common model is the sum of what was counted, over the members counted: no momentum, lossless codec
    alike  all members have one model
    """

    method: thinwire.Method
    most: int
    _: KW_ONLY
    again: int = 0
    exact: bool = False
    alike: bool = True


@dataclass
class Played:
    plan: Plan
    ends: dict[str, Ended[None]]
    logs: dict[str, Log]


def play(case: Case, plan: Plan, network: Network, steps: int = STEPS) -> Played:
    """Train through a schedule."""
    logs: dict[str, Log] = {}
    ends = simulate(plan, lambda meeting: _train(case, plan, logs, steps, meeting), network)
    return Played(plan, ends, logs)


def _train(case: Case, plan: Plan, logs: dict[str, Log], steps: int, meeting: SimulatedMeeting) -> None:
    names = sorted(life.name for life in plan.lives)
    mine = names.index(meeting.name)
    log = Log(mine)
    logs[meeting.name] = log
    link = ElasticLink(meeting, founds=meeting.name.endswith(".1"))
    model = Marked(len(names))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

    def common() -> str:
        return digest(*sync.consensus()).hex() if case.alike else ""

    def observe(outcome: Outcome) -> None:
        if isinstance(outcome, Committed) and case.alike:
            log.held[log.run, sync._group.epoch, outcome.fragment, outcome.round] = digest(
                sync.consensus()[outcome.fragment]
            ).hex()

    def hear(outcome: Committed, said: dict[int, tuple[int, ...]]) -> None:
        told = {link.names[rank]: (numbers[0], numbers[1]) for rank, numbers in said.items()}
        counted = tuple(link.names[rank] for rank in outcome.ranks)
        log.heard.append(Heard(log.run, sync._group.epoch, outcome.round, link.names, counted, told))

    def change(change: Change) -> None:
        log.changes.append(change)
        log.joined_s = min(log.joined_s, link.now())
        if sync._group.epoch == 1:
            log.run = ", ".join(change.names)
        log.settled[log.run, sync._group.epoch] = common()
        if change.healed:
            log.since = log.made

    def load(state: Mapping[str, str]) -> None:
        log.run = state["run"]

    link.carry("run", lambda: {"run": log.run}, load)
    link.beside_rounds(lambda: (log.made, log.since), hear)
    link.on_change(change)
    sync = thinwire.synchronize(model, optimizer, case.method, link, observer=observe)
    draw = torch.Generator().manual_seed(mine)
    with sync:
        while sync.step < steps:
            for _ in range(sync.parts or 1):
                x = torch.randn(4, 5, generator=draw)
                loss = (model(x) - x[:, :3]).square().mean() - model.marks[mine] / RATE
                (loss / (sync.parts or 1)).backward()
            log.made += 1
            optimizer.step()
            optimizer.zero_grad()
    log.end = sync.step, common()
    log.marks = sync.consensus()[0][: len(names)].clone() if case.alike else None
    link.close()


# --- what must hold ------------------------------------------------------------------------------------------------


def check(case: Case, played: Played) -> None:
    """All that the issue asks for."""
    plan, ends, logs = played.plan, played.ends, played.logs
    for name, end in ends.items():
        too_few = isinstance(end.error, MeetingLost) and _alive(played, end.at_s) < plan.rules.min_replicas
        outside = isinstance(end.error, MeetingLost) and not logs[name].changes
        too_late = outside and ("nobody of them is in the run" in str(end.error) or _over(played, end.at_s))
        assert end.how in ("returned", "crashed") or too_few or too_late, (
            f"{name} {end.how} at {end.at_s:g} s, {end.doing}: {end.error!r}"
        )
    _members_hold_the_same(logs)
    if all(isinstance(fault, Crash | CrashSaying | Slow) for fault in plan.faults):
        _crashes_cost_others_nothing(case, logs)
    _a_crash_costs_little(case, ends, logs)
    for log in logs.values():
        for heard in log.heard:
            assert len(heard.group) >= plan.rules.min_replicas, f"a minority committed: {heard}"
    ended = {name: log for name, log in logs.items() if log.end is not None}
    for run in {log.run for log in ended.values()}:
        together = {name: log.end for name, log in ended.items() if log.run == run}
        assert len(set(together.values())) == 1, f"{run}: {together}"
        if case.exact:
            _every_step_is_counted_once(run, logs, next(iter(together)))


def _over(played: Played, now: float) -> bool:
    """Whether nobody who was in a run is left."""
    return all(end.at_s <= now or played.logs[name].joined_s >= now for name, end in played.ends.items())


def _alive(played: Played, now: float) -> int:
    """How many processes had not ended just before."""
    return sum(end.at_s >= now for end in played.ends.values())


def _members_hold_the_same(logs: dict[str, Log]) -> None:
    held: dict[object, tuple[str, str]] = {}
    for name, log in logs.items():
        for key, found in [*log.held.items(), *log.settled.items()]:
            other, theirs = held.setdefault(key, (name, found))
            assert found == theirs, f"{name} and {other} hold different states after {key}"


def _crashes_cost_others_nothing(case: Case, logs: dict[str, Log]) -> None:
    """Whoever is in the run stays in it with its own local steps; gradients of one step may be lost."""
    if case.method.payload.kind != "gradient":
        for name, log in logs.items():
            assert not any(change.healed for change in log.changes[1:]), f"{name} was given the state, and lost its own"


def _a_crash_costs_little(case: Case, ends: dict[str, Ended[None]], logs: dict[str, Log]) -> None:
    for name, end in ends.items():
        if end.how == "crashed" and name in logs:
            log = logs[name]
            counted = max([log.since, *(heard.said[name][0] for heard in log.heard if name in heard.counted)])
            most = case.most + case.again * max(0, len(log.changes) - 1)
            assert log.made - counted <= most, f"{name} lost {log.made - counted} local steps"


def _every_step_is_counted_once(run: str, logs: dict[str, Log], last: str) -> None:
    """The common model's marks are what the rounds that hold say, each the mean over whoever was counted."""
    rounds: dict[int, Heard] = {}
    for log in logs.values():
        for heard in (heard for heard in log.heard if heard.run == run):
            if heard.round not in rounds or heard.epoch > rounds[heard.round].epoch:
                rounds[heard.round] = heard
    counted: Counter[str] = Counter()
    marks: Counter[str] = Counter()
    for _, heard in sorted(rounds.items()):
        for name in heard.counted:
            made, since = heard.said[name]
            new = made - max(counted[name], since)
            assert new >= 0, f"{name} counts steps of before: {heard}"
            counted[name] = made
            marks[name] += new / len(heard.counted)
    found = logs[last].marks
    assert found is not None
    for name, log in logs.items():
        has = float(found[log.place])
        assert abs(has - marks[name]) < 1e-3, (
            f"{name}: the model has {has:g} of its steps, {marks[name]:g} were counted"
        )


# --- schedules -----------------------------------------------------------------------------------------------------

#: Labels of exchanges (see CrashSaying) that a script may break; "" is any.
SPOTS = ("", "rounds", "verdict", "handshake", "said", "hand")


def schedule(seed: int, duration_s: float) -> tuple[Plan, Network]:
    """A random schedule. Enough hosts outlive it, or come back, for a quorum."""
    draw = random.Random(seed)
    hosts = "abcde"[: draw.choice([3, 3, 3, 4, 4, 5])]
    lives = [Life(f"{host}.1", draw.choice([0.0, 0.0, 0.0, draw.uniform(0, duration_s / 2)])) for host in hosts]
    faults: list[Fault] = []
    lost, enough = 0, len(hosts) // 2 + 1
    apart = draw.random() < 0.6
    for _ in range(draw.choice([1, 2, 2, 3, 3, 4])):
        at, host = draw.uniform(0, duration_s), draw.choice(hosts)
        name = f"{host}.1"
        kinds = ["crash", "saying", "saying", "saying", "slow"] + ["stop", "cut", "down"] * 2 * apart
        kind = draw.choice(kinds)
        if kind in ("crash", "saying") and any(getattr(fault, "who", "") == name for fault in faults):
            continue
        if kind in ("crash", "saying"):
            back = draw.random() < 0.6 or lost + 1 > len(hosts) - enough
            lost += not back
            if back:
                lives.append(Life(f"{host}.2", draw.uniform(0.2, 10.0), after=name))
            spot = draw.choice(SPOTS)
            number = draw.randrange(40 if spot in ("", "rounds") else 8 if spot in ("verdict", "said") else 3)
            faults.append(
                Crash(name, at)
                if kind == "crash"
                else CrashSaying(name, number, sent=draw.randrange(len(hosts)), of=spot)
            )
        elif kind == "stop":
            faults.append(Stop(name, at, at + draw.choice([1.0, 4.0, 12.0, 40.0])))
        elif kind == "slow":
            faults.append(Slow(host, draw.uniform(0.1, 5.0), at, at + draw.uniform(1, 20)))
        elif kind == "cut":
            other = draw.choice([None, "lighthouse", *(each for each in hosts if each != host)])
            faults.append(Cut(host, other, at, at + draw.choice([0.5, 3.0, 15.0, 40.0])))
        else:
            faults.append(Down(at, at + draw.choice([0.3, 3.0, 15.0])))
    rules = Rules(enough if apart else 1, join_timeout_s=30.0, heartbeat_timeout_s=5.0)
    network = Network(
        latency_s=draw.choice([0.01, 0.2]), jitter=draw.choice([0.0, 0.5]), patience_s=20.0,
        step_s=[draw.uniform(0.7, 1.3) for _ in hosts],
    )  # fmt: skip
    return Plan(tuple(lives), tuple(faults), rules=rules, meeting_limit_s=600.0, end_s=4000.0, tick_s=0.5), network


def struck(played: Played) -> Counter[tuple[str, str]]:
    """What struck whom at what: kind of the fault, and the label of what a process that crashed was doing."""
    found: Counter[tuple[str, str]] = Counter()
    for fault in played.plan.faults:
        if isinstance(fault, Crash | CrashSaying):
            end = played.ends.get(fault.who)
            if end is not None and end.how == "crashed":
                found[type(fault).__name__, end.doing or "computing"] += 1
        else:
            found[type(fault).__name__, ""] += 1
    return found
