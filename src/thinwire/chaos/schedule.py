"""Which faults when: lines that a person writes, or drawn from a seed.

    12s  kill host2                     kill -9 its trainer; whoever looks after it starts it again
    30s  kill lighthouse                kill -9 the lighthouse, wherever it runs
    45s  down host0 for 20s             kill -9 all that runs on a host, and start it again after 20 s
    70s  stop host1 for 15s             SIGSTOP to its trainer, SIGCONT after 15 s
    90s  cut host3 for 20s              pull its cable
    2min part host1 host2 for 20s       what these two send each other is lost
    3min throttle host2 1mbit for 30s   limit its line, both ways
    4min fill host1 for 20s             fill the disk that it writes to

A line a fault, in any order; # begins a comment. Times count from when all members are in the run. Without `for` a
killed host stays down, and the others last until the end, when everything is undone.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from thinwire.errors import ConfigError
from thinwire.units import Duration, Rate

_HOST = re.compile(r"host([0-9]+)")
LIGHTHOUSE = "lighthouse"


@dataclass(frozen=True)
class Verb:
    """What a fault does.

    hosts  how many it names
    lasts  whether it can be undone after a while
    rate   whether it names a rate
    """

    hosts: int
    lasts: bool
    rate: bool = False


VERBS = {
    "kill": Verb(1, lasts=False),
    "down": Verb(1, lasts=True),
    "stop": Verb(1, lasts=True),
    "cut": Verb(1, lasts=True),
    "part": Verb(2, lasts=True),
    "throttle": Verb(1, lasts=True, rate=True),
    "fill": Verb(1, lasts=True),
}


@dataclass(frozen=True)
class Fault:
    """One line of a schedule.

    at_s            from when all members are in the run
    hosts           numbers; none: the lighthouse
    for_s           after which it is undone; None: at the end
    rate_bits_per_s of a line that is throttled
    """

    at_s: float
    verb: str
    hosts: tuple[int, ...] = ()
    for_s: float | None = None
    rate_bits_per_s: float | None = None

    def __str__(self) -> str:
        words = [str(Duration(self.at_s)), self.verb, *(f"host{number}" for number in self.hosts)]
        if not self.hosts:
            words.append(LIGHTHOUSE)
        if self.rate_bits_per_s is not None:
            words.append(str(Rate(self.rate_bits_per_s)))
        if self.for_s is not None:
            words += ["for", str(Duration(self.for_s))]
        return " ".join(words)


def parse(text: str, hosts: int) -> tuple[Fault, ...]:
    """A script's faults in order of time.

    raises  ConfigError with the line's number
    """
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if words:
            try:
                found.append(_fault(words, hosts))
            except ConfigError as error:
                wrong = f"line {number}, {line.strip()!r}: {error.wrong}"
                raise ConfigError(wrong, expected=error.expected, mend=error.mend) from None
    if not found:
        raise ConfigError("a schedule without a fault", expected="a line like 12s kill host2", mend="write one")
    return tuple(sorted(found, key=lambda fault: fault.at_s))


def _fault(words: Sequence[str], hosts: int) -> Fault:
    at_s, rest = Duration.parse(words[0]).seconds, list(words[1:])
    verb = rest.pop(0) if rest else ""
    if verb not in VERBS:
        raise ConfigError(f"no fault {verb!r}", expected="one of " + ", ".join(VERBS), mend="12s kill host2")
    kind, for_s, rate = VERBS[verb], None, None
    if len(rest) > 1 and rest[-2] == "for":
        for_s = Duration.parse(rest[-1]).seconds
        rest = rest[:-2]
        if not kind.lasts or not for_s:
            raise ConfigError(
                f"{verb} for {Duration(for_s)}",
                expected="a time over 0 of what can last",
                mend="leave it out: who kills a trainer does not undo it; `down host2 for 20s` starts it again",
            )
    if kind.rate:
        rate = Rate.parse(rest.pop() if rest else "").bits_per_s
        if rate < 1000:
            raise ConfigError(f"a rate of {rate:g} bit/s", expected="1000 bit/s or more", mend="cut the line instead")
    if verb == "kill" and rest == [LIGHTHOUSE]:
        return Fault(at_s, verb)
    named = tuple(_number(word, hosts) for word in rest)
    if len(named) != kind.hosts or len(set(named)) != len(named):
        wanted = "host1 host2" if kind.hosts == 2 else "host1"
        raise ConfigError(f"{verb} {' '.join(rest)}", expected=f"{verb} {wanted}", mend="name as many, each once")
    return Fault(at_s, verb, named, for_s, rate)


def _number(word: str, hosts: int) -> int:
    match = _HOST.fullmatch(word)
    if match is None or int(match[1]) >= hosts:
        raise ConfigError(f"no host {word!r}", expected=f"host0 to host{hosts - 1}", mend="--hosts N has more of them")
    return int(match[1])


def drawn(seed: int, hosts: int, every_s: float, length_s: float) -> tuple[Fault, ...]:
    """Faults of all kinds, one about every so many seconds; the same for the same arguments.

    Of any moment at most half of the hosts, rounded down, are not what they should be, so that somebody goes on; and
    nothing lasts longer than `every_s`, nor beyond the length.
    """
    if hosts < 2 or every_s <= 0 or length_s <= every_s:
        raise ConfigError(
            f"faults every {every_s:g} s for {length_s:g} s on {hosts} hosts",
            expected="two hosts or more, and time for one fault at least",
            mend="for example --seed 7 --every 30s --for 10min --hosts 4",
        )
    random_ = random.Random(f"{seed} {hosts} {every_s} {length_s}")
    found: list[Fault] = []
    at_s = every_s * random_.uniform(0.3, 0.7)
    while at_s < length_s - 0.5 * every_s:
        fault = _draw(random_, round(at_s, 1), hosts, every_s)
        if len(_touched(found, fault)) <= max(1, hosts // 2):
            found.append(fault)
        at_s += every_s * random_.uniform(0.7, 1.3)
    return tuple(found)


_DRAWS = ("lighthouse", *VERBS)


def _draw(random_: random.Random, at_s: float, hosts: int, every_s: float) -> Fault:
    name = random_.choice(_DRAWS)
    if name == "lighthouse":
        return Fault(at_s, "kill")
    kind = VERBS[name]
    for_s = round(every_s * random_.uniform(0.2, 0.5), 1) if kind.lasts else None
    rate = random_.choice((1e6, 2e6, 5e6)) if kind.rate else None
    return Fault(at_s, name, tuple(random_.sample(range(hosts), kind.hosts)), for_s, rate)


def _touched(before: Sequence[Fault], now: Fault) -> set[int]:
    """Hosts that are not what they should be once this fault begins."""
    lasting = [each for each in before if each.for_s is not None and each.at_s + each.for_s > now.at_s]
    return {number for each in (*lasting, now) for number in each.hosts}


def end_s(faults: Sequence[Fault]) -> float:
    """When the last fault is undone that is not undone by the end."""
    return max((each.at_s + (each.for_s or 0.0) for each in faults), default=0.0)
