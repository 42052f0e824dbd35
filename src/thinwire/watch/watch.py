"""The watch: words gathered beside the rounds, answered one call later, judged by all members alike.

    watch = Watch(link)
    while training:
        ...                                                    # a round
        for finding in watch.call(Word(steps=50, step_s=0.1, norm=2.5)):
            print(finding)

What was told at one call is read at the next, so nobody waits for it. Seconds per byte come from the link's own
timings. When the group changes, `gather` goes on over the new one: members that heard a call's answers that others had
not heard forget them, and a newcomer is handed what the others remember; so all go on with the same history.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from thinwire.collectives import gather_packets
from thinwire.errors import ConfigError, PacketError
from thinwire.packet import Header, Kind, Packet
from thinwire.watch import history, words
from thinwire.watch.findings import Finding
from thinwire.watch.history import History
from thinwire.watch.judging import Settings
from thinwire.watch.policy import Isolation, Policy
from thinwire.watch.words import Told, Word

if TYPE_CHECKING:
    from thinwire.links.base import Channel, Handle, Link
    from thinwire.links.timings import Timings

_log = logging.getLogger("thinwire")


@dataclass(frozen=True)
class _Answer:
    """What came of a call.

    known  the last call whose answers all heard that heard any; -1 if nobody did
    given  what a newcomer was handed; None for all others
    """

    told: Told
    known: int
    given: History | None


class Watch:
    """A member's watch. All members make it, call it and gather it at the same places of their runs."""

    def __init__(
        self, link: Link, *, names: Sequence[str] = (), timings: Timings | None = None, policy: Policy | None = None,
        settings: Settings | None = None,
    ) -> None:  # fmt: skip
        """names: members' by rank, for groups that change; without them ranks are names.

        timings: what the link measures (`link.timings` of the local and the torch link); without it no line is judged
        """
        self.policy, self.settings = policy or Policy(), settings or Settings()
        self._past: History = ()
        self.gather(link, names=names, timings=timings)

    def gather(self, link: Link, *, names: Sequence[str] = (), timings: Timings | None = None) -> None:
        """Go on over another group, or the same one anew. What was asked and not answered is forgotten."""
        self._names = tuple(names) or tuple(map(str, link.members))
        if len(self._names) != len(link.members) or len(set(self._names)) != len(self._names):
            raise ConfigError(
                f"watch: names {', '.join(self._names)} for {len(link.members)} members",
                expected="a name for each member, by rank, no two alike",
                mend="leave names out in a group that does not change",
            )
        self._link, self._timings = link, timings
        self._channel: Channel = link.open("watch")
        self._asked: Handle[_Answer] | None = None

    def call(self, word: Word) -> tuple[Finding, ...]:
        """Tell this member's word.

        returns  what follows from all words of the call before, the same on all members
        raises   PeerLost, PacketError of that call; `gather` before the next one
        """
        found = self.last()
        word = replace(word, heard=self._past[-1].call if self._past else -1)
        if self._timings is not None:
            paces = {self._names[rank]: pace for rank, pace in self._timings.paces().items()}
            word = replace(word, paces=paces, noise=self._timings.noise())
        self._asked = self._ask(word)
        return found

    def last(self) -> tuple[Finding, ...]:
        """What follows from the last call, waiting for its answers if they are not there; nothing if they were read."""
        asked, self._asked = self._asked, None
        if asked is None:
            return ()
        answer = asked.wait()
        past = answer.given if answer.given is not None else history.until(self._past, answer.known)
        self._past = history.after(past, answer.told, self.policy, self.settings)
        now = self._past[-1]
        for each in (*(found for found in now.findings if found.since == now.call), *now.isolated):
            _log.warning("%s", each)
        return now.findings

    @property
    def past(self) -> History:
        """The last calls that were answered, oldest first."""
        return self._past

    @property
    def isolated(self) -> Mapping[str, Isolation]:
        """Who is to contribute nothing now, and why; by name."""
        if not self._past:
            return {}
        return self._past[-1].strikes.isolated(self._past[-1].call + 1)

    def _ask(self, word: Word) -> Handle[_Answer]:
        link, channel, names, past = self._link, self._channel, self._names, self._past
        text = torch.frombuffer(bytearray(words.write(word)), dtype=torch.uint8)
        packet = Packet("json", 0, {"text": text}, Header(kind=Kind.HELLO, sender=link.rank))
        most = words.most_bytes(len(names))
        if text.numel() > most:
            raise ConfigError(
                f"watch: a word of {text.numel()} bytes", expected=f"{most} at most", mend="give members shorter names"
            )

        def job() -> _Answer:
            found = gather_packets(channel, link.rank, link.members, packet, {"text": (torch.uint8, most)}, "the watch")
            heard = {rank: words.read(_bytes(each.fields["text"])) for rank, each in found.items()}
            known = min((each.heard for each in heard.values() if each.heard >= 0), default=-1)
            given = _handed(channel, link.rank, heard, history.until(past, known)) if known >= 0 else None
            return _Answer({names[rank]: each for rank, each in heard.items()}, known, given)

        return link.spawn(job, "watch")


def _handed(channel: Channel, rank: int, heard: Mapping[int, Word], past: History) -> History | None:
    """The first member that remembers anything hands it to all that remember nothing.

    returns  what a newcomer was given, None for others
    """
    new = [each for each in heard if heard[each].heard < 0]
    giver = min(each for each in heard if heard[each].heard >= 0)
    if rank == giver and new:
        text = torch.frombuffer(bytearray(history.written(past)), dtype=torch.uint8)
        size = torch.frombuffer(bytearray(text.numel().to_bytes(8, "little")), dtype=torch.uint8)
        for part in (size, text):
            channel.exchange(dict.fromkeys(new, part), {}, "the watch's history")
    elif rank in new:
        size = channel.exchange({}, {giver: 8}, "the watch's history")[giver]
        most = int.from_bytes(_bytes(size), "little")
        if most > history.MOST_BYTES:
            raise PacketError(f"member {giver} has a watch's history of {most} bytes for us")
        text = channel.exchange({}, {giver: most}, "the watch's history")[giver]
        return history.read(_bytes(text))
    return None


def _bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.numpy())
