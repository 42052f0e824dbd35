"""State for those who lack it, over a gathering's link.

    donors ──► all of them, and takers       digests of their manifests; donors that differ are a StateMismatch
    a taker ──► a donor                      digests of pieces (a manifest is one)       ┐ until the taker has all:
    the donor ──► the taker                  these, end to end                           ┘ it says so by asking for none

A taker has such a conversation with every donor at once, each in a channel of its own, and asks in each for 4 MiB at
a time: that is what the link's time limits are reckoned by, and what is lost when a transfer is cut. Pieces on the
taker's shelf are not asked for; what arrives is put there. Every message is a packet (packet.py), every piece is
checked against its digest, and a damaged one is asked for again, of another donor if there is one; three times at most.

Size  the pieces that are missing, their digests (32 bytes to ask, 67 in the manifest), some 120 bytes a message
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from thinwire.elastic.dealing import ATTEMPTS, Deal
from thinwire.elastic.pieces import MANIFEST_BYTES, PIECE_BYTES, Assembly, check, cut, parse
from thinwire.elastic.shelf import Shelf
from thinwire.errors import LinkError, PacketError, PeerLost, StateMismatch, ThinwireError
from thinwire.links.base import Channel, Handle, Link
from thinwire.packet import Flag, Header, Kind, Layout, Packet, read, wire_bytes

#: Nested dicts (keys str or int) and lists of tensors, numbers, strings, booleans and None: what state_dict() returns.
State = Mapping[str, Any]

_PURPOSE = "state"
_ASKED = 4096  # digests in one question
_HELLO: Layout = {"digests": (torch.uint8, 64), "sizes": (torch.int64, 2)}
_ASK = "state pieces wanted"
_GIVE = "state pieces"
_NONE = bytes(32)
_Put = Callable[[str, bytes | memoryview], None]


@dataclass(frozen=True)
class _Roots:
    """Digests of the manifests that a donor has, and their bytes; "" and 0 for none."""

    common: tuple[str, int]
    lent: tuple[str, int] = ("", 0)


def hand_over(
    link: Link, donors: tuple[int, ...], takers: tuple[int, ...], common: State | None, lent: State | None, shelf: Shelf
) -> tuple[State, State]:
    """Bring the takers up to date; all members of the link call it, those who are neither return at once.

    donors  ranks that hold `common` alike, to the bit; each taker asks several of them for different pieces
    common  what all members hold alike: anchors, outer memories, the ledger. Given by donors, None on takers
    lent    what one member alone has and a taker may begin with (an inner optimizer's state): the first donor's
    shelf   of this member: pieces that a taker has there are not asked for; what arrives is put there
    returns  the common state and the lent one: on takers the donors' ({} if the first lends none; dicts come in the
             order of their keys, tuples as lists, tensors on the CPU), on donors and others their own
    raises   StateMismatch on donors and takers if donors differ. PeerLost in mid-transfer: the pieces that arrived are
             on the shelf, and the next call asks for the rest. PacketError for what came damaged three times
    """
    hello = link.open(_PURPOSE)
    channels = {(donor, taker): link.open(_PURPOSE) for donor in donors for taker in takers}
    own = {} if common is None else common, {} if lent is None else lent
    if not takers or link.rank not in donors + takers:
        return own
    if link.rank in takers:
        told = _greet(link, hello, donors, takers, None)
        mine = {donor: channels[donor, link.rank] for donor in donors}
        return _Taker(link, mine, told, shelf).take()
    assert common is not None, "a donor has the common state"
    held = [cut(common)] + ([cut(lent)] if lent is not None and link.rank == donors[0] else [])
    roots = _Roots(*((each.manifest.digest, len(each.manifest.text)) for each in held))
    _greet(link, hello, donors, takers, roots)
    shelved: dict[str, bytes | memoryview] = {}
    for each in held:
        shelved |= {each.manifest.digest: each.manifest.text, **each.views}
    jobs = [link.spawn(partial(_give, channels[link.rank, taker], taker, shelved), "state") for taker in takers]
    _wait(jobs)
    return own


def _greet(
    link: Link, channel: Channel, donors: Sequence[int], takers: Sequence[int], roots: _Roots | None
) -> dict[int, _Roots]:
    """Hear every donor's digests, and say this member's if it is one. StateMismatch, on all, if they differ."""
    size = ATTEMPTS * wire_bytes(_PURPOSE, _HELLO)
    others = [rank for rank in (*donors, *takers) if rank != link.rank]
    outgoing = {} if roots is None else dict.fromkeys(others, _hello(link.rank, roots))
    incoming = {rank: size for rank in donors if rank != link.rank}
    arrived = channel.exchange(outgoing, incoming, "comparing states")
    told = {rank: _heard(rank, buffer) for rank, buffer in arrived.items()}
    if roots is not None:
        told[link.rank] = roots
    if len({each.common for each in told.values()}) > 1:
        digests = ", ".join(f"{told[rank].common[0][:12]} on member {rank}" for rank in sorted(told))
        raise StateMismatch(
            f"the members that are to hand over their state hold different ones: {digests}",
            expected="equal states, to the bit, on all donors",
            mend="meet again: the state that most members hold wins; if it happens again, look for bad memory",
        )  # fmt: skip
    return told


def _hello(rank: int, roots: _Roots) -> Tensor:
    """The digests, as many times over as something may be damaged: nobody could ask for them again."""
    pairs = roots.common, roots.lent
    digests = b"".join(bytes.fromhex(digest) or _NONE for digest, _ in pairs)
    fields = {"digests": _tensor(digests), "sizes": torch.tensor([size for _, size in pairs])}
    return Packet(_PURPOSE, 0, fields, Header(Kind.HELLO, rank)).to_bytes().repeat(ATTEMPTS)


def _heard(rank: int, buffer: Tensor) -> _Roots:
    failed: PacketError | None = None
    size = wire_bytes(_PURPOSE, _HELLO)
    for at in range(0, ATTEMPTS * size, size):
        try:
            fields = _read(buffer[at : at + size], rank, _PURPOSE, Kind.HELLO).fields
            if {name: (value.dtype, len(value)) for name, value in fields.items()} != _HELLO:
                raise PacketError(f"member {rank} told of its state in other fields: {', '.join(fields)}")
            sizes = fields["sizes"].tolist()
            if not all(0 <= size <= MANIFEST_BYTES for size in sizes):
                raise PacketError(f"member {rank} has a manifest of {max(sizes)} bytes")
            both = bytes(fields["digests"].tolist())
            names = ["" if digest == _NONE else digest.hex() for digest in (both[:32], both[32:])]
            return _Roots((names[0], sizes[0]), (names[1], sizes[1]))
        except PacketError as error:
            failed = error
    assert failed is not None
    raise failed


def _give(channel: Channel, taker: int, held: Mapping[str, bytes | memoryview]) -> None:
    """A donor's side of a conversation: answer until the taker asks for nothing more."""
    most = wire_bytes(_ASK, {"digests": (torch.uint8, 32 * _ASKED)})
    what = f"handing the state to member {taker}"
    while True:
        question = channel.exchange({}, {taker: most}, what)[taker]
        wanted: list[str] | None
        try:
            wanted = _wanted(_read(question, taker, _ASK, Kind.HELLO))
            if sum(len(held[digest]) for digest in wanted) > MANIFEST_BYTES:
                raise PacketError("a question for too much at once")
        except (PacketError, KeyError):  # damaged on the way, or not ours: the taker asks again, or gives up
            wanted = None
        data = np.concatenate([np.empty(0, np.uint8), *(np.frombuffer(held[each], np.uint8) for each in wanted or ())])
        header = Header(Kind.RESULT, flags=Flag.FAILED if wanted is None else 0)
        answer = Packet(_GIVE, 0, {"pieces": torch.from_numpy(data)}, header).to_bytes()
        channel.exchange({taker: answer}, {}, what)
        if wanted == []:
            return


def _wanted(question: Packet) -> list[str]:
    raw = bytes(question.fields["digests"].numpy()) if "digests" in question.fields else b"?"
    if len(raw) % 32 or len(raw) > 32 * _ASKED:
        raise PacketError(f"a question of {len(raw)} bytes", expected="whole digests")
    return [raw[at : at + 32].hex() for at in range(0, len(raw), 32)]


class _Taker:
    """A taker's side of all its conversations."""

    def __init__(self, link: Link, channels: Mapping[int, Channel], told: Mapping[int, _Roots], shelf: Shelf) -> None:
        self._link, self._channels, self._told, self._shelf = link, channels, told, shelf
        self._donors = list(channels)

    def take(self) -> tuple[State, State]:
        try:
            common, lent = self._assemble()
        except LinkError:
            raise
        except ThinwireError:
            self._end()
            raise
        self._end()
        return common.state(), {} if lent is None else lent.state()

    def _assemble(self) -> tuple[Assembly, Assembly | None]:
        first = self._donors[0]
        roots = [self._told[first].common, self._told[first].lent]
        donors = {roots[1][0]: [first], roots[0][0]: self._donors}
        texts: dict[str, bytes | memoryview] = {}
        missing = {digest: size for digest, size in roots if digest and not self._shelved(digest, texts.__setitem__)}
        self._fetch(missing, donors, texts.__setitem__)
        manifests = [parse(texts[digest]) if digest else None for digest, _ in roots]
        made = [None if manifest is None else Assembly(manifest) for manifest in manifests]

        def put(digest: str, piece: bytes | memoryview) -> None:
            for assembly in made:
                if assembly is not None:
                    assembly.put(digest, piece)

        missing, holders = {}, {}
        for assembly, who in zip(made, (self._donors, [first]), strict=True):
            for digest, size in ({} if assembly is None else assembly.missing).items():
                if digest not in missing and not self._shelved(digest, put):
                    missing[digest], holders[digest] = size, who
        self._fetch(missing, holders, put)
        common, lent = made
        assert common is not None
        return common, lent

    def _shelved(self, digest: str, put: _Put) -> bool:
        piece = self._shelf.get(digest)
        if piece is not None:
            put(digest, piece)
        return piece is not None

    def _fetch(self, missing: Mapping[str, int], donors: Mapping[str, Sequence[int]], put: _Put) -> None:
        deal: Deal[int] = Deal(missing, donors)
        while deal.missing:
            _wait([self._link.spawn(partial(self._talk, donor, deal, missing, put), "state") for donor in self._donors])

    def _talk(self, donor: int, deal: Deal[int], sizes: Mapping[str, int], put: _Put) -> None:
        """Ask one donor until there is nothing to ask it for."""
        try:
            while wanted := deal.take(donor, PIECE_BYTES, _ASKED):
                self._take_from(donor, wanted, deal, sizes, put)
        except ThinwireError:
            deal.stop()
            raise

    def _take_from(
        self, donor: int, wanted: Sequence[str], deal: Deal[int], sizes: Mapping[str, int], put: _Put
    ) -> None:
        size = sum(sizes[digest] for digest in wanted)
        try:
            packet = self._ask(donor, wanted, size)
            if packet.header.flags or packet.fields["pieces"].numel() != size:
                raise PacketError(f"member {donor} did not give the {len(wanted)} pieces that it was asked for")
        except PacketError as error:
            for digest in wanted:
                deal.failed(donor, digest, error)
            return
        answer = packet.fields["pieces"].numpy().data
        at = 0
        for digest in wanted:
            piece = answer[at : at + sizes[digest]]
            at += sizes[digest]
            try:
                check(digest, sizes[digest], piece)
            except PacketError as error:
                deal.failed(donor, digest, error)
                continue
            self._shelf.put(digest, piece)
            put(digest, piece)
            deal.arrived(digest)

    def _ask(self, donor: int, wanted: Sequence[str], size: int) -> Packet:
        """One question and its answer. PacketError if the answer came damaged; it has FAILED if the question did."""
        digests = _tensor(bytes.fromhex("".join(wanted)))
        question = Packet(_ASK, 0, {"digests": digests}, Header(Kind.HELLO, self._link.rank)).to_bytes()
        most = wire_bytes(_GIVE, {"pieces": (torch.uint8, size)})
        what = f"taking over the state from member {donor}"
        channel = self._channels[donor]
        channel.exchange({donor: question}, {}, what)
        answer = _read(channel.exchange({}, {donor: most}, what)[donor], donor, _GIVE, Kind.RESULT)
        if set(answer.fields) != {"pieces"}:
            raise PacketError(f"member {donor} answered with {', '.join(answer.fields)}", expected="pieces")
        return answer

    def _end(self) -> None:
        """Tell all donors that nothing more is wanted; again, if one answers that it did not understand."""

        def end(donor: int) -> None:
            with suppress(PacketError):  # an answer came damaged: so the question did arrive
                for _ in range(ATTEMPTS):
                    if not self._ask(donor, (), 0).header.flags:
                        return

        _wait([self._link.spawn(partial(end, donor), "state") for donor in self._donors])


def _read(buffer: Tensor, sender: int, codec: str, kind: Kind) -> Packet:
    packet = read(buffer)
    if packet.codec != codec or packet.header.kind != kind:
        raise PacketError(f"member {sender} sent {packet.codec!r}", expected=repr(codec))
    return packet


def _tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)


def _wait(jobs: Sequence[Handle[None]]) -> None:
    """Until all have ended; then the error of one that lost somebody, or of the first that failed."""
    errors: list[ThinwireError] = []
    for job in jobs:
        try:
            job.wait()
        except ThinwireError as error:
            errors.append(error)
    if errors:
        raise next((error for error in errors if isinstance(error, PeerLost)), errors[0])
