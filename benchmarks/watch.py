"""Fault detection: how often the rule for slow lines names the right member, on drawn matrices.

    OMP_NUM_THREADS=1 python benchmarks/watch.py [--members 16 4 3] [--trials 200] [--out FILE.md]

Every cell of the matrix is the median of 20 messages' log(seconds / byte), each with normal noise of a given standard
deviation; one member's row (slow sender), column (slow receiver), both (slow node) or one cell (slow link) is slower by
a factor. A trial is right if what is found is what was put in, and nothing else. Deterministic: nothing is timed.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
from collections.abc import Iterator
from pathlib import Path

from thinwire.links.timings import Timings
from thinwire.watch.findings import Kind
from thinwire.watch.judging import Settings, judge
from thinwire.watch.slowness import Limits, slow_lines
from thinwire.watch.words import Word

FAULTS = ("none", "sender", "receiver", "node", "link")
WINDOW = 20


def drawn(fault: str, factor: float, noise: float, members: int, random_: random.Random) -> tuple[bool, bool]:
    """One trial: whether what was put in was found and nothing else, and whether anything else was."""
    names = [str(rank) for rank in range(members)]
    bad, other = random_.sample(names, 2)
    slow = {
        "none": lambda i, j: False,
        "sender": lambda i, j: i == bad,
        "receiver": lambda i, j: j == bad,
        "node": lambda i, j: bad in (i, j),
        "link": lambda i, j: (i, j) == (bad, other),
    }[fault]
    timings = {name: Timings(least_bytes=1) for name in names}
    for receiver in names:
        for sender in names:
            usual = math.log(factor) if slow(sender, receiver) else 0.0
            for _ in range(WINDOW if sender != receiver else 0):
                timings[receiver].took(int(sender), 1, math.exp(usual + random_.gauss(0, noise)))
    matrix = {(str(i), j): pace for j in names for i, pace in timings[j].paces().items()}
    told = statistics.median(each.noise() for each in timings.values())
    found = {each.key for each in slow_lines(matrix, told, Limits())}
    right = {
        "none": set(),
        "sender": {(Kind.SLOW_SENDER, (bad,))},
        "receiver": {(Kind.SLOW_RECEIVER, (bad,))},
        "node": {(Kind.SLOW_SENDER, (bad,)), (Kind.SLOW_RECEIVER, (bad,))},
        "link": {(Kind.SLOW_LINK, (bad, other))},
    }[fault]
    return found == right, bool(found - right)


def table(members: int, trials: int, factors: tuple[float, ...], noises: tuple[float, ...]) -> Iterator[list[str]]:
    """Rows of noise, factor, and for each fault the share of right trials with that of false alarms."""
    for noise in noises:
        for factor in factors:
            row = [f"{noise:g}", f"{factor:g}"]
            for fault in FAULTS:
                random_ = random.Random(f"{fault} {factor} {noise}")
                ended = [drawn(fault, factor, noise, members, random_) for _ in range(trials)]
                right, false = (100 * sum(each[k] for each in ended) / trials for k in (0, 1))
                row.append(f"{right:.1f} ({false:.1f})")
            yield row


def steps(members: int, noise: float, factor: float, random_: random.Random, *, before: int = 40) -> tuple[int, int]:
    """A run of equal members' step times, of which one becomes slower by a factor after so many calls.

    returns  findings before that, and calls until the slow one was named; 40 if it was not
    """
    past: list[dict[str, Word]] = []
    alarms = 0
    for call in range(before + 40):
        usual = [math.log(factor) * (rank == 0 and call >= before) for rank in range(members)]
        past.append(
            {str(rank): Word(1, step_s=math.exp(log + random_.gauss(0, noise))) for rank, log in enumerate(usual)}
        )
        found = judge(past, Settings())
        if call < before:
            alarms += len(found)
        elif any(each.who == ("0",) for each in found):
            return alarms, call - before + 1
    return alarms, 40


def compute(trials: int) -> Iterator[list[str]]:
    """Rows of noise and factor: false alarms in 1000 words, and the median of calls until the slow one is named."""
    for noise in (0.05, 0.1, 0.3):
        for factor in (1.5, 2.0, 4.0):
            row = [f"{noise:g}", f"{factor:g}"]
            for members in (3, 8):
                random_ = random.Random(f"{members} {factor} {noise}")
                ended = [steps(members, noise, factor, random_) for _ in range(trials)]
                alarms = 1000 * sum(each[0] for each in ended) / (trials * 40 * members)
                row += [f"{alarms:.1f}", f"{statistics.median(each[1] for each in ended):g}"]
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, nargs="+", default=[16, 4, 3])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--out", type=Path)
    told = parser.parse_args()
    head, command = ["noise", "factor", *FAULTS], f"python benchmarks/watch.py --trials {told.trials}"
    lines = [
        f"# Slow lines: {told.trials} trials of each", "",
        "Percent of trials in which exactly what was put in was found; in brackets, in which anything else was. Noise",
        "is the standard deviation of the logarithm of one message's time; a cell is the median of 20.", "",
        f"`{command} --members {' '.join(map(str, told.members))}`, on drawn numbers: no machine matters here.",
    ]  # fmt: skip
    for members in told.members:
        lines += ["", f"## {members} members", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for row in table(members, told.trials, (1.5, 2.0, 4.0), (0.1, 0.2, 0.4)):
            lines.append("| " + " | ".join(row) + " |")
            print(members, lines[-1], flush=True)
    lines += [
        "", f"# Slow compute: {told.trials // 10} runs of each", "",
        "A word a call, 40 calls among equals, then one member is slower by a factor. Findings among 1000 words while",
        "nothing is wrong (one that lasts counts again), and calls until the slow one is named, median; 40: never.",
        "", "| noise | factor | false, 3 members | calls | false, 8 members | calls |", "|" + "---|" * 6,
    ]  # fmt: skip
    for row in compute(told.trials // 10):
        lines.append("| " + " | ".join(row) + " |")
        print(lines[-1], flush=True)
    lines.append("")
    if told.out:
        told.out.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
