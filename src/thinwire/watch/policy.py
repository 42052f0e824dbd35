"""What follows a finding: nothing but telling, or some rounds apart for a member that is found again and again."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from thinwire.errors import ConfigError
from thinwire.watch.findings import Finding, Kind

#: Findings that isolate: a slow line has two ends, and a member that flaps or idles is out already.
ISOLATING = frozenset(
    {Kind.SLOW_SENDER, Kind.SLOW_RECEIVER, Kind.SLOW_COMPUTE, Kind.SLOW_ENCODING, Kind.NOT_FINITE, Kind.TOO_LARGE}
)


@dataclass(frozen=True)
class Isolation:
    """A member is to contribute nothing from this call on, until another.

    because  the findings' sentences
    times    how often it was isolated by now
    """

    who: str
    since: int
    until: int
    times: int
    because: tuple[str, ...]

    def __str__(self) -> str:
        told = "; ".join(self.because)
        times = "once" if self.times == 1 else f"{self.times} times"
        return f"member {self.who} is isolated from call {self.since} to {self.until} ({times} so far): {told}"


@dataclass(frozen=True)
class Strikes:
    """What a policy remembers, the same on all members.

    found   member -> calls at which something was found of it, within the last ones
    apart   member -> its last isolation, over or not
    """

    found: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    apart: Mapping[str, Isolation] = field(default_factory=dict)

    def isolated(self, call: int) -> dict[str, Isolation]:
        """Who is apart at a call."""
        return {name: each for name, each in sorted(self.apart.items()) if each.since <= call < each.until}


@dataclass(frozen=True)
class Policy:
    """When a finding has consequences.

    isolate   whether it has any; otherwise it is only told
    strikes   calls with a finding of a member, among the last `within`, that isolate it
    first     calls that it is apart the first time; twice as many every time after, `most` at most
    kinds     findings that count
    keep      share of the members that is never isolated, at least
    """

    isolate: bool = False
    strikes: int = 3
    within: int = 10
    first: int = 10
    most: int = 640
    kinds: Collection[Kind] = ISOLATING
    keep: float = 0.5

    def __post_init__(self) -> None:
        if not (1 <= self.strikes <= self.within and 1 <= self.first <= self.most and 0 < self.keep <= 1):
            raise ConfigError(
                f"Policy(strikes={self.strikes}, within={self.within}, first={self.first}, most={self.most}, "
                f"keep={self.keep})",
                expected="1 <= strikes <= within, 1 <= first <= most, 0 < keep <= 1",
                mend="Policy(isolate=True) isolates after 3 in 10 calls, for 10, 20, 40, ... calls",
            )

    def decide(
        self, before: Strikes, call: int, findings: Iterable[Finding], members: Collection[str]
    ) -> tuple[Strikes, tuple[Isolation, ...]]:
        """What is remembered after a call, and who is isolated by it, in the order of their names.

        Findings of a member that is apart do not count: it is told of, not punished for it again.
        """
        if not self.isolate:
            return before, ()
        apart = before.isolated(call)
        reasons: dict[str, list[str]] = {}
        for each in findings:
            if each.kind in self.kinds and len(each.who) == 1 and each.who[0] not in apart:
                reasons.setdefault(each.who[0], []).append(str(each))
        found = {name: (*calls, call) if name in reasons else calls for name, calls in before.found.items()}
        found |= {name: (call,) for name in reasons if name not in before.found}
        found = {name: kept for name, calls in found.items() if (kept := self._recent(calls, call))}
        room = len(members) - len([name for name in apart if name in members]) - self._least(len(members))
        new: list[Isolation] = []
        for name in sorted(reasons):
            if len(found[name]) >= self.strikes and name in members and len(new) < room:
                times = before.apart[name].times + 1 if name in before.apart else 1
                until = call + 1 + min(self.most, self.first * 2 ** (times - 1))
                new.append(Isolation(name, call + 1, until, times, tuple(reasons[name])))
                del found[name]
        return replace(before, found=found, apart={**before.apart, **{each.who: each for each in new}}), tuple(new)

    def _recent(self, calls: tuple[int, ...], call: int) -> tuple[int, ...]:
        return tuple(each for each in calls if each > call - self.within)

    def _least(self, members: int) -> int:
        """Members that are to stay."""
        return max(1, math.ceil(self.keep * members))
