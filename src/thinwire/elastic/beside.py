"""Before a newcomer meets the others: the state, fetched beside the run as far as that goes.

What is fetched goes to the shelf that the member's link gets. When it meets the others, only what changed since crosses
again; what never changes, such as a frozen part, crosses once. Should nothing come of it, all is handed over then, and
the others wait for that long.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from thinwire.elastic.fetching import Progress, fetch
from thinwire.elastic.shelf import Shelf
from thinwire.errors import ThinwireError


@dataclass(frozen=True)
class Bounds:
    """How long it may take: seconds for all of it, for a state to be shown, for the next bytes of one member."""

    limit_s: float = 1800.0
    answers_s: float = 180.0  # a state is shown after a committed round
    silence_s: float = 20.0


@dataclass(frozen=True)
class Beside:
    """What came of it.

    step   that the state is of; None: it did not come whole
    bytes  of pieces that arrived
    why    it did not come, a sentence; empty if it did
    """

    step: int | None = None
    bytes: int = 0
    seconds: float = 0.0
    why: str = ""


#: For one who has nobody to ask.
NOTHING = Beside()
_BOUNDS = Bounds()


def fetch_beside(
    addresses: Sequence[str], token: str, shelf: Shelf, stops: Callable[[], bool], bounds: Bounds = _BOUNDS
) -> Beside:
    """Fetch what members show, and go on without it if it cannot be had.

    addresses  "HOST:PORT" of members' services; none: there is nothing to fetch
    stops      ends it before its time
    """
    if not addresses:
        return NOTHING
    began, arrived = time.monotonic(), 0

    def tell(progress: Progress) -> None:
        nonlocal arrived
        arrived = progress.received_bytes

    try:
        got = fetch(
            addresses, token, shelf, limit_s=bounds.limit_s, answers_s=bounds.answers_s, silence_s=bounds.silence_s,
            tell=tell, stops=stops,
        )  # fmt: skip
    except ThinwireError as error:
        return Beside(None, arrived, time.monotonic() - began, error.wrong)
    return Beside(got.step, got.progress.received_bytes, got.progress.seconds)
