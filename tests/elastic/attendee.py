"""A member in a process of its own, that does what its standard input says and answers each line with one of JSON."""

from __future__ import annotations

import json
import sys
import time

import torch

from thinwire.elastic.settings import Limits
from thinwire.elastic.torchft_meeting import TorchftMeeting
from thinwire.errors import ThinwireError


def main() -> None:
    options = json.loads(sys.argv[1])
    limits = Limits(**options.pop("limits", {}))
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
            elif do == "close":
                told = {}
                meeting.close()
            else:
                told = {"sum": eval(argument, {"meeting": meeting})}
        except ThinwireError as error:
            told = {"error": type(error).__name__, "text": str(error)}
        say(**told, seconds=time.monotonic() - start)
        if do == "close":
            return


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
