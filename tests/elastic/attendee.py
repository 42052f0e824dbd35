"""A member in a process of its own, that does what its standard input says and answers each line with one of JSON."""

from __future__ import annotations

import json
import sys
import time

import torch

from thinwire.elastic import rendezvous, torchft_meeting
from thinwire.elastic.settings import Limits
from thinwire.elastic.torchft_meeting import TorchftMeeting
from thinwire.errors import ThinwireError


def main() -> None:
    options = json.loads(sys.argv[1])
    limits = Limits(**options.pop("limits", {}))
    if apart := options.pop("apart", None):
        keep_apart(apart)
    meeting = TorchftMeeting(limits=limits, **options)
    gathering, channel = None, None
    say(name=meeting.name, standby=meeting._standby.address)
    for line in sys.stdin:
        do, _, argument = line.strip().partition(" ")
        start = time.monotonic()
        try:
            if do == "meet":
                before, gathering = gathering, meeting.meet(broken=argument == "broken")
                if gathering is not before:
                    channel = gathering.link.open("test")
                told = {"number": gathering.number, "names": gathering.names, "rank": gathering.link.rank,
                        "same": gathering is before, "lighthouse": meeting.lighthouse}  # fmt: skip
            elif do == "exchange":  # with the ranks named, or all
                told = {"heard": exchange(gathering.link, channel, json.loads(argument or "null"))}
            elif do == "heart":
                told = {"heart": meeting._at.heart.pid}
            else:
                told = {}
                meeting.close()
        except ThinwireError as error:
            told = {"error": type(error).__name__, "text": str(error)}
        say(**told, seconds=time.monotonic() - start)
        if do == "close":
            return


def keep_apart(pair) -> None:
    """Let two members, by how their names begin, not connect with each other."""
    gloo, form = rendezvous._gloo, rendezvous.form

    def forms(address, rank, names, mine, *rest):
        others = [other for other in pair if not mine.name.startswith(other)] if mine.name[:2] in pair else []
        lost = [name for name in names if name[:2] in others]
        rendezvous._gloo = (lambda *given: (None, "connect timed out")) if lost else gloo
        rendezvous._unreachable = lambda cards, rank: lost
        if not lost and {name[:2] for name in names} >= set(pair):
            rendezvous._gloo = lambda *given: (None, "connect timed out")
        return form(address, rank, names, mine, *rest)

    torchft_meeting.form = forms


def exchange(link, channel, with_ranks) -> dict[int, int]:
    """Everybody sends its rank plus 1; returns rank -> what it said."""
    others = [rank for rank in link.members if rank != link.rank and (with_ranks is None or rank in with_ranks)]
    mine = torch.tensor([link.rank + 1], dtype=torch.uint8)
    arrived = channel.exchange(dict.fromkeys(others, mine), dict.fromkeys(others, 1), "a test")
    return {rank: int(buffer[0]) for rank, buffer in sorted(arrived.items())}


def say(**told: object) -> None:
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
