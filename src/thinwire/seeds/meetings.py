"""Where members exchange scalars: a meeting closes each round into one record, the same for all who were there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from thinwire.collectives import gather_packets
from thinwire.elastic.link import only_fixed
from thinwire.errors import StateMismatch
from thinwire.handshake import agree, tell
from thinwire.links.base import Link
from thinwire.packet import Header, Packet
from thinwire.seeds.log import Closed


class Meeting(Protocol):
    """A member's place among the others."""

    @property
    def member(self) -> int:
        """This member's number: its directions are drawn with it."""

    def meet(self, facts: Mapping[str, str]) -> Iterable[Closed]:
        """Find the others before the first round.

        facts    name -> what this member holds, e.g. {"weights": "9f0c..."}
        returns  the backlog
        raises   ConfigError naming the first fact that differs, and who differs
        """

    def backlog(self) -> Iterable[Closed]:
        """Rounds that were closed without this member, in order: to be taken in before it takes part in the next."""

    def local_step(self) -> None:
        """This member computed its losses: a simulated clock moves on."""

    def round(self, number: int, codes: Tensor, lr: float) -> Closed:
        """Tell this member's scalars and hear what counts.

        codes    uint8 [bytes], as the recipe's code wrote them
        lr       learning rate; that of the round's lowest member counts
        returns  the round as closed, the same on all members
        raises   PeerLost; nothing waits for ever
        """

    def compare(self, number: int, digest: str) -> None:
        """Compare weights after round `number`; all members come.

        raises  StateMismatch naming who differs
        """


class OverLink:
    """A meeting of the members of a link: a fixed group, in which everybody tells everybody else.

    Size  (N-1)(n + h) bytes sent a member and round: n scalars of a byte each in a packet whose frame h is 92 bytes.
    """

    def __init__(self, link: Link) -> None:
        only_fixed(link, "tune")
        self._link = link
        self._channel = link.open("scalars")
        self._context = 0

    @property
    def member(self) -> int:
        return self._link.rank

    def meet(self, facts: Mapping[str, str]) -> Iterable[Closed]:
        self._context = agree(self._link, facts)
        return ()

    def backlog(self) -> Iterable[Closed]:
        return ()

    def local_step(self) -> None:
        self._link.local_step()

    def round(self, number: int, codes: Tensor, lr: float) -> Closed:
        link = self._link
        header = Header(sender=link.rank, round=number, context=self._context, weight=lr)
        packet = Packet("scalars", len(codes), {"codes": codes}, header)
        layout = {"codes": (torch.uint8, len(codes))}
        what = f"scalars of round {number}"
        found = gather_packets(self._channel, link.rank, link.members, packet, layout, what)
        told = {rank: bytes(each.fields["codes"].numpy()) for rank, each in found.items()}
        return Closed(number, found[min(found)].header.weight, told)

    def compare(self, number: int, digest: str) -> None:
        found = {rank: facts["weights"] for rank, facts in tell(self._link, {"weights": digest}).items()}
        (most, _), *others = Counter(found.values()).most_common()
        if others:
            odd = [str(rank) for rank, each in found.items() if each != most]
            raise StateMismatch(
                f"after round {number} the weights of member {', '.join(odd)} are not those of the others",
                expected=f"digest {most} on all members, who applied the same scalars",
                mend="rebuild them from the base and the log (thinwire import), and look for a damaged memory or "
                "another version of thinwire on that machine",
            )
