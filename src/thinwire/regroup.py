"""How the members of an elastic run go on together after somebody came, went or crashed.

A synchronizer's state is values, so that a group that changes asks for little: what was under way is ended or
forgotten, on all members alike; whoever is behind is given the state; the rest is a round as before, in the new
gathering. Who ends what, and who is behind, is decided in thinwire.elastic.settle.

    meet         a new gathering: a link among whoever is there
    say          each one its word; those who mean something else are refused, and the others meet again
    conclude     rounds that anybody ended are ended by all that were in them; others are forgotten: what they were to
                 send is still in the parameters, or is owed
    compare      digests of what all should hold; who differs from the majority of those that know the run is behind
    hand over    the state to those behind
    go on        at one step, with rounds that broke begun again at once

A crash therefore costs no survivor anything, and the one that crashed its local steps since its last round.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Protocol

from thinwire.elastic.handing import State, hand_over
from thinwire.elastic.link import Change, ElasticLink
from thinwire.elastic.meeting import Gathering
from thinwire.elastic.settle import FragmentWord, Ruling, Word, judge, majority
from thinwire.errors import ConfigError, LinkError, MeetingLost, PacketError, PeerLost, StateMismatch, ThinwireError
from thinwire.handshake import tell

_log = logging.getLogger("thinwire")

#: What a group that changes can mend.
MENDABLE = (PeerLost, StateMismatch, PacketError)
_MOST_FAILURES = 20  # rounds in a row that broke


@dataclass(frozen=True)
class Settled:
    """How to go on.

    names    who is there, by rank
    same     nobody came, went or was behind since all settled last: only rounds under way broke
    healed   this member was given the state
    step     where all are
    ended    rounds of each fragment that are behind all
    redo     fragments whose rounds begin again now
    context  of packets from here on
    """

    names: tuple[str, ...]
    same: bool
    healed: bool
    step: int
    ended: tuple[int, ...]
    redo: tuple[int, ...]
    context: int


class Keeper(Protocol):
    """What is asked of whoever keeps the state: the synchronizer."""

    @property
    def common_step(self) -> int:
        """The newest step that all members have passed alike."""

    def word(self, epoch: int, founds: bool) -> Word:
        """Where it is. Waits for rounds under way to arrive or fail."""

    def conclude(self, certain: Mapping[int, tuple[int, ...]]) -> None:
        """End rounds that arrived or are certain (fragment -> who was in it), in the old gathering; forget the rest."""

    def common_digest(self) -> str:
        """Of all that members hold alike; before the run begins, of all that they begin it with."""

    def common(self, step: int) -> State:
        """All that members hold alike, with the step that they go on at."""

    def lent(self) -> State:
        """What is this member's own and another one may begin with."""

    def take(self, common: State, lent: State) -> None:
        """Be brought up to date."""

    def go_on(self, settled: Settled) -> None:
        """The new gathering holds."""


class Regrouping:
    """An elastic link's meetings, around one keeper."""

    def __init__(self, link: ElasticLink, keeper: Keeper) -> None:
        self.link, self.epoch = link, 0
        self._keeper = keeper
        self._failures = 0

    def common(self) -> State:
        """What a newcomer would be given now, of all that members hold alike; after a round, before the next step."""
        return self._common(self._keeper.common_step, self.epoch)

    def worked(self) -> None:
        """A round was committed."""
        self._failures = 0

    def meet(self, broken: ThinwireError | None = None) -> Settled | None:
        """Meet; settle, if it is a new gathering.

        broken   what ended the gathering that holds
        returns  None if it still holds
        raises   MeetingLost; ConfigError if this member is refused; `broken` itself after too many in a row
        """
        if broken is not None:
            self._count(broken)
        began, received = self.link.now(), self.link.meter.total().received_bytes
        why: ThinwireError | None = broken
        while True:
            gathering = self.link.meet(broken=why is not None)
            if gathering is self.link.holds:
                return None
            before = self.link.holds
            try:
                settled, behind = self._settle(gathering, before)
            except MENDABLE as error:
                self._count(error)
                why = self._gone(error, gathering)
                continue
            except _Refused as refused:
                _log.warning("%s", refused)
                why = LinkError(str(refused), expected="members that mean the same", mend="see there")
                continue
            here, there = set(gathering.names), set(before.names if before else (self.link.name,))
            change = Change(
                gathering.names, tuple(sorted(here - there)), tuple(sorted(there - here)), settled.healed, behind,
                self.link.now() - began, self.link.meter.total().received_bytes - received,
            )  # fmt: skip
            self.link.tell_change(change)
            return settled

    def _count(self, error: ThinwireError) -> None:
        self._failures += 1
        if self._failures > _MOST_FAILURES:
            raise error
        _log.warning("%s; meeting again", error.wrong)

    def _gone(self, error: ThinwireError, gathering: Gathering) -> ThinwireError:
        """Somebody else went while we settled."""
        gathering.link.close()
        if isinstance(error, PeerLost):
            who = ", ".join(gathering.names[rank] for rank in error.ranks if rank < len(gathering.names))
            _log.warning("lost %s while settling; meeting again", who)
        return error

    def _settle(self, gathering: Gathering, before: Gathering | None) -> tuple[Settled, tuple[str, ...]]:
        keeper, link, me = self._keeper, gathering.link, gathering.link.rank
        mine = keeper.word(self.epoch, self.link.founds)
        words = _say(gathering, mine)
        ruling = judge(words)
        self._refuse(ruling, gathering)
        told = {fragment: ruling.present[fragment] for fragment in ruling.certain.get(me, ())}
        if me not in ruling.behind:
            keeper.conclude(told)
        behind = self._compare(gathering, words, ruling)
        donors = tuple(rank for rank in link.members if rank not in behind)
        takers = tuple(sorted(behind))
        if takers:
            names = ", ".join(gathering.names[rank] for rank in takers)
            _log.info("%s: given the state of step %d by %d members", names, ruling.step, len(donors))
            gives = me in donors
            common = self._common(ruling.step, ruling.epoch)
            given = hand_over(
                link, donors, takers, common if gives else None, keeper.lent() if gives else None, self.link.shelf
            )
            if not gives:
                keeper.take(given[0]["keeper"], given[1])
                for key, (_, load) in self.link.carried.items():
                    load(given[0]["carried"][key])
        self.epoch = ruling.epoch
        self.link.enter(gathering)
        together = all(word.epoch == mine.epoch for word in words.values())  # all settled the last one
        same = before is not None and before.names == gathering.names and together and not takers
        context = _context(mine.facts, gathering.names, ruling.epoch)
        settled = Settled(gathering.names, same, me in behind, ruling.step, ruling.ended, ruling.redo, context)
        keeper.go_on(settled)
        return settled, tuple(gathering.names[rank] for rank in takers)

    def _common(self, step: int, epoch: int) -> State:
        carried = {key: save() for key, (save, _) in self.link.carried.items()}
        return {"keeper": self._keeper.common(step), "epoch": epoch, "carried": carried}

    def _refuse(self, ruling: Ruling, gathering: Gathering) -> None:
        me = gathering.link.rank
        if me in ruling.refused:
            gathering.link.close()
            raise ConfigError(
                f"this member was refused: {ruling.refused[me]}",
                expected="what the other members of the run have",
                mend="join with the run's own configuration and the same version of thinwire",
            )
        if ruling.strays:
            gathering.link.close()
            raise MeetingLost(
                f"{', '.join(gathering.names)} came together, and nobody of them is in the run",
                expected="members that are in it: this one may not begin it anew",
                mend="see whether the run has ended; members that were in it go on from their last checkpoint",
            )
        if ruling.refused:
            gathering.link.close()
            told = "; ".join(f"{gathering.names[rank]} ({why})" for rank, why in sorted(ruling.refused.items()))
            raise _Refused(f"refused: {told}")

    def _compare(self, gathering: Gathering, words: Mapping[int, Word], ruling: Ruling) -> set[int]:
        """Who is behind, by digests too."""
        me, behind = gathering.link.rank, set(ruling.behind)
        mine = "" if me in behind else self._keeper.common_digest()
        digests = {rank: each["digest"] for rank, each in tell(gathering.link, {"digest": mine}).items()}
        newest = max(words[rank].epoch for rank in digests.keys() - behind)
        sure = {rank: each for rank, each in digests.items() if rank not in behind and words[rank].epoch == newest}
        right = majority(sure) if newest else sure[min(sure)]
        if right is None:
            told = ", ".join(gathering.names[rank] for rank in sorted(sure))
            raise MeetingLost(
                f"{told} hold different states of one run, and no majority of them is right",
                expected="the same bits on every member",
                mend="look for broken memory or other library versions; resume all members from the last checkpoint",
            )
        odd = {rank for rank, each in digests.items() if rank not in behind and each != right}
        for rank in sorted(odd) if newest else ():
            _log.warning("%s holds another state than the others, and is given theirs", gathering.names[rank])
        return behind | odd


class _Refused(Exception):
    """Members that mean something else were found in a gathering."""


def _say(gathering: Gathering, word: Word) -> dict[int, Word]:
    """Everybody's word, by rank."""
    told = tell(gathering.link, {"word": json.dumps(asdict(word))})
    return {rank: _read(each.get("word", ""), gathering.names[rank]) for rank, each in told.items()}


def _read(text: str, name: str) -> Word:
    """A word; of another version's at least what it means, by which it is refused, or refuses us."""
    try:
        found = json.loads(text)
        facts, epoch = {str(key): str(value) for key, value in found["facts"].items()}, int(found["epoch"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PacketError(f"{name} did not say where it is in words of ours") from error
    try:
        return Word(
            facts,
            epoch,
            int(found["step"]),
            tuple(
                FragmentWord(int(f["ended"]), tuple(map(int, f["present"])), str(f["last"]), str(f["doubt"]))
                for f in found["fragments"]
            ),
            {int(fragment): int(number) for fragment, number in found["redo"].items()},
            int(found["model_step"]),
            bool(found["common"]),
            bool(found["founds"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return Word(facts, epoch)


def _context(facts: Mapping[str, str], names: tuple[str, ...], epoch: int) -> int:
    whole = json.dumps([sorted(facts.items()), names, epoch]).encode()
    return int.from_bytes(hashlib.blake2b(whole, digest_size=8).digest(), "little")
