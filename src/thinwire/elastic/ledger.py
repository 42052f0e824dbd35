"""Who works on which samples, and which are done: a part of the committed state, the same on all members to the bit.

A *unit* is one micro-batch's worth of samples, numbered from 0 through the epochs: unit u is of epoch
u // units_per_epoch.
A *lease* is the row of units that a member works through until the next round commits: the lowest free ones, dealt in
blocks, the member of rank i of n gets blocks i, i + n, i + 2n, ... It has no end but that of the run, so a fast member
takes more of its row and a slow one less. With the round that carries what was learnt from them, the units that a
member says it took are done; what a member did not come to, or had in hand when it was lost, is free again.

State   the runs of units that are done; to whom the present lease was dealt; what is kept from the one before. As
        members take the lowest free units, runs are few: about one a member.
Exact   a lease follows from the state and the names alone, so nobody is asked, and a member's few numbers, heard by all
        with the round, say which units it means. A round that fails changes nothing: what survivors have in hand stays
        theirs, and goes with the round that is done again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from thinwire.errors import ConfigError, StateMismatch

#: A run of units: the first one, and how many.
Run = tuple[int, int]
Runs = tuple[Run, ...]
_ENDLESS = 1 << 62


@dataclass(frozen=True)
class Ledger:
    """The common part: a value, replaced with every commit.

    units_per_epoch  how many units an epoch has
    block            units that are dealt at once: about as many as a member takes from round to round
    end              the run has this many units; None: it does not end by units
    reserve          units that a member may take beside a round under way: those of `overlap` local steps
    commits          how often units were committed: the number of the lease
    done             units that are done, ascending, apart
    leased           to whom the lease was dealt, by rank; (): to those who are there when the next unit is taken
    kept             units that a member may have in hand beyond what it contributed; they come first in its lease
    chain            digest of everything that was ever done, and in which order: what a log is proved by
    """

    units_per_epoch: int
    block: int = 1
    end: int | None = None
    reserve: int = 0
    commits: int = 0
    done: Runs = ()
    leased: tuple[str, ...] = ()
    kept: Mapping[str, Runs] = field(default_factory=dict)
    chain: str = ""

    def __post_init__(self) -> None:
        for name in ("units_per_epoch", "block"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"Ledger: {name} = {getattr(self, name)}", expected="at least 1", mend=f"give {name} units"
                )

    def dealt(self, names: Sequence[str]) -> Ledger:
        """The lease dealt to these members, unless it was dealt; what the others kept is free."""
        if self.leased:
            return self
        return replace(self, leased=tuple(names), kept={name: self.kept[name] for name in names if name in self.kept})

    def lease(self, name: str) -> Iterator[Run]:
        """The member's row of units, as runs, lazily; empty for one that came after the lease was dealt."""
        yield from self.kept.get(name, ())
        if name not in self.leased:
            return
        taken = united(self.done, *self.kept.values())
        members, mine, block = len(self.leased), self.leased.index(name), self._block(taken)
        position = 0
        for first, count in gaps(taken, _ENDLESS if self.end is None else self.end):
            at = 0
            while at < count:
                turn, inside = divmod(position + at, block)
                length = min(block - inside, count - at)
                if turn % members == mine:
                    yield first + at, length
                at += length
            position += count

    def committed(self, told: Mapping[str, int]) -> tuple[Ledger, dict[str, Runs]]:
        """After a round.

        told     who contributed -> how many units of its lease went into that
        returns  the new state, and which units each of them has done
        raises   StateMismatch if a member claims more than its lease holds: members do not mean the same lease
        """
        done: dict[str, Runs] = {}
        kept: dict[str, Runs] = {}
        for name in sorted(told):
            used = told[name]
            row = tuple(first_units(self.lease(name), used + self.reserve))
            if size(row) < used:
                raise StateMismatch(
                    f"member {name} has worked on {used} units, lease {self.commits} holds {size(row)} for it",
                    expected="units of the lease that all members deal alike",
                    mend="restart that member: it is given the state of the others",
                )
            done[name] = united(tuple(first_units(iter(row), used)))
            rest = tuple(without_first(row, used))
            if rest:
                kept[name] = rest
        after = united(self.done, *done.values())
        chain = link_of(self.chain, done)
        return replace(self, commits=self.commits + 1, done=after, leased=(), kept=kept, chain=chain), done

    @property
    def below(self) -> int:
        """All units below this one are done."""
        return self.done[0][1] if self.done and self.done[0][0] == 0 else 0

    @property
    def epochs(self) -> int:
        """Epochs of which every unit is done."""
        return self.below // self.units_per_epoch

    @property
    def units_done(self) -> int:
        """How many, of all epochs."""
        return size(self.done)

    @property
    def is_full(self) -> bool:
        """Whether the run has ended by its units."""
        return self.end is not None and self.below >= self.end

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "units_per_epoch": self.units_per_epoch,
            "block": self.block,
            "end": self.end,
            "reserve": self.reserve,
            "commits": self.commits,
            "done": [list(run) for run in self.done],
            "leased": list(self.leased),
            "kept": {name: [list(run) for run in self.kept[name]] for name in sorted(self.kept)},
            "chain": self.chain,
        }

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> Ledger:
        """The inverse of `state_dict`."""
        return Ledger(
            state["units_per_epoch"], state["block"], state["end"], state["reserve"], state["commits"],
            _runs(state["done"]), tuple(state["leased"]),
            {name: _runs(runs) for name, runs in state["kept"].items()}, state["chain"],
        )  # fmt: skip

    def _block(self, taken: Runs) -> int:
        """Smaller towards the end of the run, so that the last units are everybody's."""
        if self.end is None:
            return self.block
        left = max(0, self.end - size(taken))
        return max(1, min(self.block, -(-left // len(self.leased))))


class Book:
    """A member's copy of the ledger, and what it has in hand."""

    def __init__(self, ledger: Ledger, name: str) -> None:
        self.ledger, self.name = ledger, name
        self.taken = 0  # of the present lease
        self._carried: int | None = None  # by the round under way
        self._row: Iterator[int] | None = None

    def take(self, names: Sequence[str]) -> int | None:
        """The next unit to work on; None if there is none for this member until a round commits.

        names  who is there, by rank: the lease is dealt to them if it is still to be dealt
        """
        if self._row is None:
            self.ledger = self.ledger.dealt(names)
            self._row = islice(each(self.ledger.lease(self.name)), self.taken, None)
        reserve = self.ledger.reserve
        if self._carried is not None and reserve and self.taken >= self._carried + reserve:
            return None
        unit = next(self._row, None)
        self.taken += unit is not None
        return unit

    def tell(self, names: Sequence[str]) -> tuple[int, int]:
        """As a round begins: number of the lease, units whose learning the round carries."""
        self.ledger = self.ledger.dealt(names)
        self._carried = self.taken
        return self.ledger.commits, self.taken

    def hear(self, names: Sequence[str], told: Mapping[int, Sequence[int]], ranks: Iterable[int]) -> dict[str, Runs]:
        """A round has committed.

        names    who was in it, by rank
        told     rank -> what that member's `tell` said
        ranks    whose contribution counts
        returns  the units that are done now, by name
        raises   StateMismatch if somebody speaks of another lease
        """
        counted = {}
        for rank in ranks:
            number, used = told[rank][:2]
            if used and number != self.ledger.commits:
                raise StateMismatch(
                    f"member {names[rank]} has units of lease {number}, and lease {self.ledger.commits} is in force",
                    expected="units of one lease in one round",
                    mend="restart that member: it is given the state of the others",
                )
            counted[names[rank]] = used
        mine = counted.get(self.name)
        self.ledger, done = self.ledger.committed(counted)
        self.taken = 0 if mine is None else max(0, self.taken - mine)
        self._carried = self._row = None
        return done

    def skipped(self) -> None:
        """The round under way came to nothing: what it was to carry goes with the next."""
        self._carried = None

    def state_dict(self) -> dict[str, Any]:
        """What all members hold alike."""
        return self.ledger.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the others' ledger; this member has nothing in hand then."""
        self.ledger, self.taken, self._carried, self._row = Ledger.from_state(state), 0, None, None


def link_of(chain: str, done: Mapping[str, Runs]) -> str:
    """The chain after these units were done."""
    words = json.dumps([chain, {name: [list(run) for run in done[name]] for name in sorted(done)}])
    return hashlib.blake2b(words.encode(), digest_size=16).hexdigest()


def united(*runs: Runs) -> Runs:
    """All units of several rows of runs, ascending, adjoining runs made one.

    raises  StateMismatch if a unit is in two of them
    """
    found: list[Run] = []
    for first, count in sorted(run for row in runs for run in row if run[1]):
        end = found[-1][0] + found[-1][1] if found else -1
        if first < end:
            raise StateMismatch(
                f"unit {first} would be done twice",
                expected="every unit once",
                mend="this is a fault of thinwire: keep the members' logs, and report it",
            )
        if first == end:
            found[-1] = (found[-1][0], found[-1][1] + count)
        else:
            found.append((first, count))
    return tuple(found)


def gaps(taken: Runs, end: int) -> Iterator[Run]:
    """The runs below `end` that are not in `taken`, which is ascending and apart."""
    at = 0
    for first, count in taken:
        if min(first, end) > at:
            yield at, min(first, end) - at
        at = first + count
    if at < end:
        yield at, end - at


def first_units(row: Iterator[Run], count: int) -> Iterator[Run]:
    """The first `count` units of a row, in its order; fewer if it ends before."""
    while count > 0 and (run := next(row, None)) is not None:
        first, length = run
        yield first, min(length, count)
        count -= length


def without_first(row: Iterable[Run], count: int) -> Iterator[Run]:
    """The row without its first `count` units."""
    for first, length in row:
        if length > count:
            yield first + count, length - count
        count = max(0, count - length)


def each(row: Iterable[Run]) -> Iterator[int]:
    """The units one by one."""
    for first, count in row:
        yield from range(first, first + count)


def size(runs: Iterable[Run]) -> int:
    """How many units."""
    return sum(count for _, count in runs)


def _runs(saved: Iterable[Sequence[int]]) -> Runs:
    return tuple((first, count) for first, count in saved)
