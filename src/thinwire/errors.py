"""What can go wrong, split by whose fault it is.

    ThinwireError
    ├── ConfigError        the request: an option, a composition, members that do not fit together
    ├── PacketError        bytes that cannot be right, with the offset and the reason
    ├── LinkError          the wire
    │   ├── PeerLost       a member that left or stopped answering, by rank
    │   └── MeetingLost    no group forms: the meeting place, or enough members, cannot be reached
    ├── StateMismatch      members that should agree bit for bit and do not, by rank
    └── DivergedError      the learning: updates that are no longer finite

Every message has three parts: what was wrong (with the value found), what was expected, how to mend it.
"""

from __future__ import annotations

from collections.abc import Iterable


class ThinwireError(Exception):
    """Base of every error thinwire raises on purpose.

    wrong     what was found, with the value
    expected  what would have been right
    mend      what the reader can do about it
    """

    def __init__(self, wrong: str, *, expected: str, mend: str) -> None:
        super().__init__(wrong, expected, mend)
        self.wrong = wrong
        self.expected = expected
        self.mend = mend

    def __str__(self) -> str:
        return f"{self.wrong}\n  expected  {self.expected}\n  mend      {self.mend}"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.wrong, self.expected, self.mend, self.__dict__)


def _rebuild(
    kind: type[ThinwireError], wrong: str, expected: str, mend: str, extra: dict[str, object]
) -> ThinwireError:
    """Pickle support (errors cross process borders in test runners and launchers)."""
    error = ThinwireError.__new__(kind)
    ThinwireError.__init__(error, wrong, expected=expected, mend=mend)
    error.__dict__.update(extra)
    return error


class ConfigError(ThinwireError):
    """The request cannot be carried out as written."""


class PacketError(ThinwireError):
    """Bytes that cannot be a packet of ours, or not the packet that was due.

    offset  byte position at which reading stopped making sense; None where no single byte is to blame
    """

    def __init__(
        self,
        wrong: str,
        *,
        offset: int | None = None,
        expected: str = "an intact thinwire packet",
        mend: str = "have the sender send it again; if it keeps happening, compare thinwire versions on both sides",
    ) -> None:
        at = "" if offset is None else f" (at byte {offset})"
        super().__init__(wrong + at, expected=expected, mend=mend)
        self.offset = offset


class LinkError(ThinwireError):
    """The wire did not do its work."""


class PeerLost(LinkError):
    """Members that left or did not answer within the time limit.

    ranks  who, in ascending order
    """

    def __init__(self, ranks: Iterable[int], *, during: str, why: str) -> None:
        self.ranks = tuple(sorted(ranks))
        who = f"member {self.ranks[0]}" if len(self.ranks) == 1 else "members " + ", ".join(map(str, self.ranks))
        super().__init__(
            f"lost {who} during {during}: {why}",
            expected="every member to answer within the time limit",
            mend="see that member's own output; nothing committed is lost: resume all members from the last checkpoint",
        )


class MeetingLost(LinkError):
    """No gathering formed within the time limit. What was committed is kept, and one may ask again."""


class StateMismatch(ThinwireError):
    """Members that should hold the same state do not."""


class DivergedError(ThinwireError):
    """The updates are no longer finite numbers."""
