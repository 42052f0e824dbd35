"""A tiny model tuned by seeds at a meeting, in this process or as a program: python attending.py PORT FATE OUT."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import torch

from thinwire.randomness import mix, random_bytes
from thinwire.seeds.standing import Pace
from thinwire.seeds.store import attend

FACTS = {"recipe": "tiny", "base": "zeros"}
PACE = Pace(factor=4.0, least_s=1.5, most_s=30.0)
SIZE = 24


class Tiny:
    """w <- w - lr (code - 128) z(round, member), rounded at every step: any other order gives other bits."""

    def __init__(self):
        self.w = torch.zeros(SIZE)
        self.digests = []

    def codes(self, number, member, samples=4):
        """The signs of how well w matches what this member sees of a target."""
        target = torch.linspace(-1, 1, SIZE)
        errors = [float((self.w - target) @ direction(number, member, sample)) for sample in range(samples)]
        return torch.tensor([128 + max(-100, min(100, round(10 * error))) for error in errors], dtype=torch.uint8)

    def replay(self, closed):
        assert closed.number == len(self.digests)
        for member, codes in closed.codes.items():
            for sample, code in enumerate(codes):
                self.w -= closed.lr * (code - 128) * direction(closed.number, member, sample)
        self.digests.append(hashlib.blake2b(self.w.numpy().tobytes(), digest_size=8).hexdigest())


def direction(number, member, sample):
    return (random_bytes(mix(number, member, sample), SIZE) & 1).float() * 2 - 1


def take_part(meeting, model, fate, until=lambda closed: 0 in closed.left, facts=None):
    """Rounds until the founder said goodbye, or what fate has in store."""
    if facts is not None:
        meeting.meet(facts)
    rounds = 0
    while True:
        for closed in meeting.backlog():
            model.replay(closed)
            if until(closed):
                return
        if rounds == 8 and fate == "leaves":
            return
        if rounds == 8 and fate == "dies":
            os._exit(9)
        closed = meeting.round(meeting.number, model.codes(meeting.number, meeting.member), 0.003)
        model.replay(closed)
        rounds += 1
        if until(closed):
            return


def main():
    torch.set_num_threads(1)
    port, fate, out = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    model = Tiny()
    if fate == "late":
        sys.stdin.readline()
    with attend(f"127.0.0.1:{port}", pace=PACE) as meeting:
        take_part(meeting, model, fate, facts=FACTS)
    out.write_text(json.dumps(model.digests))


if __name__ == "__main__":
    main()
