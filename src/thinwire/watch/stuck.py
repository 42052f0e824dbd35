"""Where nothing moves any more: whose compute is stuck, or which line.

    all who wait wait for X, and X has not come to the exchange    -> X is stuck, outside communication
    X has come to it and i waits for what X sends                  -> the line from X to i is stuck

What each member says of itself is given; one that says nothing has not come.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from thinwire.watch.findings import Finding, Kind

LEAST_S = 10.0
PREDICTED_TIMES = 5.0


@dataclass(frozen=True)
class Waiting:
    """Where a member is.

    entered    its compute finished and it came to the exchange
    waits_for  members whose messages it has not got
    seconds    how long it has waited
    """

    entered: bool
    waits_for: frozenset[str] = frozenset()
    seconds: float = 0.0


def limit_s(predicted_s: float) -> float:
    """How long an exchange may be without progress before it counts as stuck: max(10 s, 5 times the prediction)."""
    return max(LEAST_S, PREDICTED_TIMES * predicted_s)


def stuck(waiting: Mapping[str, Waiting], members: frozenset[str], predicted_s: float = 0.0) -> list[Finding]:
    """Who or what is stuck.

    waiting      what members say of themselves, by name; of those that do not answer nothing
    members      all who should be in the exchange
    predicted_s  what the exchange should take
    returns      members first, then lines; nothing while nobody has waited for as long as `limit_s`
    """
    limit = limit_s(predicted_s)
    long = {name: each for name, each in waiting.items() if each.entered and each.seconds >= limit}
    missing = Counter(name for each in long.values() for name in each.waits_for & members)
    here = {name for name in members if name in waiting and waiting[name].entered}
    found = []
    for name, count in sorted(missing.items()):
        if name in here:
            continue
        seconds = max(each.seconds for each in long.values() if name in each.waits_for)
        said = "does not answer" if name not in waiting else "still computes"
        because = f"has not come to the exchange and {said}; {count} members wait for it, {seconds:.0f} s by now"
        found.append(Finding(Kind.STUCK, (name,), because, {"waiting": float(count), "seconds": seconds}))
    for receiver, each in sorted(long.items()):
        for sender in sorted(each.waits_for & here):
            because = f"moves nothing for {each.seconds:.0f} s, though both came to the exchange"
            found.append(Finding(Kind.STUCK_LINK, (sender, receiver), because, {"seconds": each.seconds}))
    return found
