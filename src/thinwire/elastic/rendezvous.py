"""Those a lighthouse named connect: each tells the others its card, all judge the cards alike, and a group forms.

Everything here happens at a store under a prefix of this attempt alone, and ends alike on all who are there: the rule
is a pure function of the cards, and the group holds only when all of them say that they reached all others.
"""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import combinations

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from thinwire.links.torch import TELL_AFTER_S, first_line

_log = logging.getLogger("thinwire")

_PROBE_S = 3.0
_EXACT_UP_TO = 16  # members among whom the largest set that is connected is searched exhaustively


@dataclass(frozen=True)
class Card:
    """What a member tells the others as they connect.

    name       its name
    standby    "HOST:PORT" of the lighthouse it keeps
    number     of the last gathering it was in, 0 for none
    last       who was in that
    here       that one met at this same lighthouse
    base       of whom more than half must be there to go on at another one
    at_least   members without whom it does not go on
    founds     it may begin a run with others who were in no gathering
    """

    name: str
    standby: str
    number: int
    last: tuple[str, ...]
    here: bool
    at_least: int
    founds: bool
    base: tuple[str, ...]

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def decode(text: str) -> Card:
        read = json.loads(text)
        return Card(**read | {"last": tuple(read["last"]), "base": tuple(read["base"])})


class NotFormed(Exception):
    """No group among those the lighthouse named.

    refused      the rule says no: the others are elsewhere, or too few
    unreachable  name -> those it cannot reach, as each found
    """

    def __init__(
        self, why: str, *, refused: bool = False, unreachable: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        super().__init__(why)
        self.refused = refused
        self.unreachable = {name: tuple(others) for name, others in (unreachable or {}).items() if others}


def refusal(cards: Sequence[Card]) -> str | None:
    """Why these may not go on as the run's group, or None if they may: all who hold the cards find the same.

    At the lighthouse where the newest gathering met that any of them was in, half of it is enough: there can be only
    one group at a time. At another one more than half of its *base* must be there (see `base_after`), so that of two
    parts that cannot see each other at most one goes on: whoever went on with half alone is bound to where it did.
    Where nobody was in any, one of them must be there to begin a run.
    """
    at_least = max(card.at_least for card in cards)
    if len(cards) < at_least:
        return f"{len(cards)} of the {at_least} members that it takes are here"
    here, newest = {card.name for card in cards}, max(card.number for card in cards)
    if newest == 0:
        return None if any(card.founds for card in cards) else "nobody is here who was in the run"
    for last in {card.last for card in cards if card.number == newest}:
        those = [card for card in cards if card.number == newest and card.last == last]
        same_place = all(card.here for card in those)
        needed = last if same_place else those[0].base
        there = sum(name in here for name in needed)
        if 2 * there < len(needed) + (not same_place):
            return f"{there} of the {len(needed)} members of the last gathering are here"
    return None


def base_after(cards: Sequence[Card]) -> tuple[str, ...]:
    """The base of the group that these form: they themselves, if more than half of the last base is among them."""
    names, newest = tuple(card.name for card in cards), max(cards, key=lambda card: card.number)
    there = sum(name in names for name in newest.base)
    return names if newest.number == 0 or 2 * there > len(newest.base) else newest.base


def form(
    address: str, rank: int, names: Sequence[str], mine: Card, host: str, limit_s: float
) -> tuple[tuple[Card, ...], dist.ProcessGroup]:
    """Meet the others at a store; returns everybody's cards by rank and a new Gloo group.

    address  "HOST:PORT/PREFIX" of the store, the prefix used for nothing else ever
    names    by rank, as the lighthouse has them
    host     this machine's address, as the others see it
    limit_s  for each of the three steps: cards, connections, everybody's word that it is connected
    raises   NotFormed
    """
    place, _, prefix = address.partition("/")
    store_host, _, port = place.rpartition(":")
    limit = timedelta(seconds=limit_s)
    try:
        server = TCPStore(store_host, int(port), is_master=False, timeout=limit, wait_for_workers=False)
        store = PrefixStore(prefix, server)
        store.set(f"card/{rank}", mine.encode())
        _await_all(store, "card", names, limit_s, "connects")
        cards = tuple(Card.decode(store.get(f"card/{peer}").decode()) for peer in range(len(names)))
        if (why := refusal(cards)) is not None:
            raise NotFormed(why, refused=True)
        group, failed = _gloo(PrefixStore("gloo", store), rank, len(names), host, limit)
        cut_off = [] if failed is None else _unreachable(cards, rank)
        store.set(f"word/{rank}", json.dumps([failed, cut_off]))
        _await_all(store, "word", names, limit_s + 2 * _PROBE_S, "says whether it is connected")
        words = [json.loads(store.get(f"word/{peer}")) for peer in range(len(names))]
    except (RuntimeError, OSError) as error:  # the store's errors are RuntimeErrors
        raise NotFormed(f"the store of this gathering does not answer: {first_line(error)}") from error
    if why := next((f"{name}: {word[0]}" for name, word in zip(names, words, strict=True) if word[0]), None):
        raise NotFormed(why, unreachable={name: word[1] for name, word in zip(names, words, strict=True)})
    assert group is not None
    return cards, group


def connected(names: Sequence[str], unreachable: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The largest set whose members all reach each other; among equals the one of the lowest ranks. All find the same.

    Beyond 16 members: one by one, whoever lacks most others is left out.
    """
    apart = {frozenset((name, other)) for name, others in unreachable.items() for other in others}

    def whole(some: Sequence[str]) -> bool:
        return not any(frozenset(pair) in apart for pair in combinations(some, 2))

    if len(names) <= _EXACT_UP_TO:
        return next(some for size in range(len(names), 0, -1) for some in combinations(names, size) if whole(some))
    kept = list(names)
    while not whole(kept):
        lacks = [sum(frozenset((name, other)) in apart for other in kept) for name in kept]
        kept.pop(max(range(len(kept)), key=lambda place: (lacks[place], place)))
    return tuple(kept)


def _gloo(
    store: Store, rank: int, world: int, host: str, limit: timedelta
) -> tuple[dist.ProcessGroup | None, str | None]:
    """A group over this machine's address `host`, or why there is none."""
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = limit
    try:
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        backend = dist.ProcessGroupGloo(store, rank, world, options)
    except RuntimeError as error:
        return None, first_line(error)
    group = dist.ProcessGroup(store, rank, world)
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
    return group, None


def _unreachable(cards: Sequence[Card], rank: int) -> list[str]:
    """Members whose standby lighthouses do not accept a connection from here: all keep one, at a port that is open."""

    def cut_off(card: Card) -> bool:
        host, _, port = card.standby.rpartition(":")
        try:
            socket.create_connection((host, int(port)), _PROBE_S).close()
        except OSError:
            return True
        return False

    others = [card for peer, card in enumerate(cards) if peer != rank]
    with ThreadPoolExecutor(max(1, len(others))) as threads:
        return [card.name for card, lost in zip(others, threads.map(cut_off, others), strict=True) if lost]


def _await_all(store: Store, kind: str, names: Sequence[str], limit_s: float, does: str) -> None:
    """Until everybody's key is there; every five seconds say whose is not."""
    keys = [f"{kind}/{rank}" for rank in range(len(names))]
    start = time.monotonic()
    while True:
        left_s = limit_s - (time.monotonic() - start)
        try:
            store.wait(keys, timedelta(seconds=max(0.1, min(TELL_AFTER_S, left_s))))
            return
        except RuntimeError:
            missing = ", ".join(name for name, key in zip(names, keys, strict=True) if not store.check([key]))
        if missing and limit_s - (time.monotonic() - start) <= 0:
            raise NotFormed(f"{missing} was there and does not answer: nothing within {limit_s:g} s")
        if missing:
            _log.warning("waiting until %s %s (gives up in %.0f s)", missing, does, left_s)
