"""A member's watch over a group that changes: words beside committed rounds, and what is found told once.

Calls are counted within a gathering: the rounds that were heard since it was settled, the same for all that are in it.
A round that ended in the gathering before is none of them: who was given the state did not hear it.
"""

from __future__ import annotations

from collections.abc import Callable

from thinwire.errors import LinkError, PacketError
from thinwire.links.base import Link
from thinwire.links.timings import Timings
from thinwire.watch import Finding, Kind, Policy, Watch, Word

Tell = Callable[[str, str, str], None]


class Watching:
    """One member's, for its loop.

    every  rounds from one call to the next
    tell   kind, who, evidence: what is found, once for as long as it holds
    """

    def __init__(self, policy: Policy, every: int, tell: Tell) -> None:
        self._policy, self._every, self._tell = policy, every, tell
        self._watch: Watch | None = None
        self._told: set[tuple[Kind, tuple[str, ...]]] = set()
        self._rounds = 0
        self._due = self._broken = False

    def gather(self, link: Link, names: tuple[str, ...], timings: Timings | None) -> None:
        """A gathering was settled; all its members say so before anything else is said in it."""
        if self._watch is None:
            self._watch = Watch(link, names=names, timings=timings, policy=self._policy)
        else:
            self._watch.gather(link, names=names, timings=timings)
        self._rounds, self._due, self._broken = 0, False, False

    def heard(self) -> None:
        """A round was committed."""
        self._rounds += 1
        self._due = self._rounds % self._every == 0

    def call(self, word: Word) -> None:
        """After a round, and after the meeting that follows it: tell a word, if it is time for one."""
        due, self._due = self._due, False
        if self._watch is None or not due or self._broken:
            return
        try:
            self._find(self._watch.last())
        except LinkError:  # the next round will find it too, and mends it
            self._broken = True
            return
        except PacketError as error:
            self._tell("unreadable word", "", error.wrong)
        self._watch.call(word)

    def isolates(self, name: str) -> str:
        """Why this member is to contribute nothing; empty if it is not so."""
        isolation = None if self._watch is None else self._watch.isolated.get(name)
        return "" if isolation is None else str(isolation)

    def _find(self, found: tuple[Finding, ...]) -> None:
        for each in found:
            if each.key not in self._told:
                self._tell(each.kind, " to ".join(each.who), each.because)
        self._told = {each.key for each in found}
