"""State for those who lack it, over a gathering's link."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thinwire.links.base import Link

#: Nested dicts (keys str or int) and lists of tensors, numbers, strings, booleans and None: what state_dict() returns.
State = Mapping[str, Any]


class Shelf:
    """Pieces of states that a member holds, by their digest: what was fetched stays when a transfer is cut."""


def hand_over(link: Link, donors: tuple[int, ...], takers: tuple[int, ...], common: State | None, lent: State | None,
              shelf: Shelf) -> tuple[State, State]:  # fmt: skip
    """Bring the takers up to date; all members of the link call it, those who are neither return at once.

    donors  ranks that hold `common` alike, to the bit; each taker asks several of them for different pieces
    common  what all members hold alike: anchors, outer memories, the ledger. Given by donors, None on takers
    lent    what one member alone has and a taker may begin with (an inner optimizer's state): the first donor's
    shelf   of this member: pieces that a taker has there are not asked for; what arrives is put there
    returns  the common state and the lent one: on takers the donors', on donors their own
    raises  PeerLost in mid-transfer: the pieces that arrived are on the shelf, and the next call asks for the rest
    """
    raise NotImplementedError
