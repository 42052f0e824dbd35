"""One member of a group that watches itself: python rounds_member.py OUT ROUNDS. Rounds of 200 kB from all to all."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

import thinwire
from thinwire.watch import Watch, Word


def main(out: Path, rounds: int) -> None:
    with thinwire.join() as link:
        watch, channel = Watch(link, timings=link.timings), link.open("data")
        peers = [rank for rank in link.members if rank != link.rank]
        buffer = torch.zeros(200_000, dtype=torch.uint8)
        for number in range(rounds):
            began = time.monotonic()
            channel.exchange(dict.fromkeys(peers, buffer), dict.fromkeys(peers, buffer.numel()), f"round {number}")
            watch.call(Word(steps=1, norm=1.0))
            print(f"round {number}: {time.monotonic() - began:.2f} s", flush=True)
        watch.last()
        past = [[str(each) for each in heard.findings] for heard in watch.past]
        measured = {name: sorted(word.paces) for name, word in watch.past[-1].told.items()}
        (out / f"{link.rank}.json").write_text(json.dumps({"past": past, "measured": measured}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
