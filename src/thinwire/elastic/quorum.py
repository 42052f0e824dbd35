"""The rules by which torchft's lighthouse says who is there, as a function of what it has heard.

With Hb = names whose last heartbeat is younger than the time limit, and Q = those of Hb that ask for a quorum:

1. if all of the previous quorum are in Q, the answer is Q, whatever the rest of the rules says;
2. otherwise Q must have `min_replicas` members,
3. and more than half of Hb (so that no two halves go on, each for itself),
4. and be all of Hb, unless the first of Q has waited for `join_timeout_s`.
5. If one of Q asks for a group that only shrinks, nobody is in the answer who was not in the previous one.

An answer has a new id if other names are in it, or if one of them says that its last round failed; a member sets up
connections anew if and only if the id is not the one it has. All this is forgotten when the lighthouse is restarted:
ids begin at 1 again.

Source   torchft 0.2.0, src/lighthouse.rs: quorum_compute, quorum_tick
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

from thinwire.errors import ConfigError


@dataclass(frozen=True)
class Rules:
    """A lighthouse's options, by torchft's names.

    join_timeout_s  should be longer than a round takes: with less, members that are in time leave each other out
    """

    min_replicas: int
    _: KW_ONLY
    join_timeout_s: float = 60.0
    heartbeat_timeout_s: float = 5.0

    def __post_init__(self) -> None:
        if self.min_replicas < 1:
            raise ConfigError(
                f"a quorum of {self.min_replicas} members", expected="at least 1", mend="raise min_replicas"
            )
        for name in ("join_timeout_s", "heartbeat_timeout_s"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name):g}", expected="0 s or more", mend=f"raise {name}")


@dataclass(frozen=True)
class Request:
    """Somebody asks for a quorum.

    since_s  when it was heard, on the lighthouse's clock
    failed   its last round failed
    """

    since_s: float
    _: KW_ONLY
    failed: bool = False
    shrink_only: bool = False


@dataclass(frozen=True)
class Quorum:
    """An answer: names are sorted, and a member's place among them is its rank."""

    id: int
    names: tuple[str, ...]


def healthy(heartbeats: Mapping[str, float], rules: Rules, now_s: float) -> set[str]:
    """Hb: whose heart beats."""
    return {name for name, beat_s in heartbeats.items() if now_s - beat_s < rules.heartbeat_timeout_s}


def quorum(heartbeats: Mapping[str, float], requests: Mapping[str, Request], previous: Quorum | None, rules: Rules,
           now_s: float) -> Quorum | str:  # fmt: skip
    """Who is there, or in words why that cannot be said yet.

    heartbeats  name -> when its last one was heard, for everybody ever heard of
    requests    name -> what it asks, for those that were not answered yet
    previous    the last answer of this lighthouse since it was started
    """
    alive = healthy(heartbeats, rules, now_s)
    asking = {name: request for name, request in sorted(requests.items()) if name in alive}
    names = tuple(asking)
    if previous is not None:
        if any(request.shrink_only for request in asking.values()):
            names = tuple(name for name in names if name in previous.names)
        if asking.keys() >= set(previous.names):
            return _announced(names, asking, previous)
    if len(asking) < rules.min_replicas:
        return f"{len(asking)} members are there, {rules.min_replicas} are needed"
    if len(asking) <= len(alive) // 2:
        return f"{len(asking)} members are there of {len(alive)} whose hearts beat: more than half are needed"
    waited_s = now_s - min(request.since_s for request in asking.values())
    if len(asking) < len(alive) and waited_s < rules.join_timeout_s:
        return f"{len(asking)} members wait for {len(alive) - len(asking)} more whose hearts beat"
    return _announced(names, asking, previous)


def _announced(names: tuple[str, ...], asking: Mapping[str, Request], previous: Quorum | None) -> Quorum:
    if previous is None:
        return Quorum(1, names)
    anew = names != previous.names or any(asking[name].failed for name in names)
    return Quorum(previous.id + anew, names)
