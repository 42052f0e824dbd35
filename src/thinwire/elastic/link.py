"""The elastic link: a link like any other, over gatherings that change underneath.

Within a gathering it is that gathering's link. The synchronizer asks it to meet when a round has ended, and again when
something broke; what members then make of a new gathering is in thinwire.regroup. Before the first meeting, which is
when training begins, this member is alone in it and nothing can be said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from thinwire.elastic.handing import State
from thinwire.elastic.meeting import Gathering, Meeting
from thinwire.elastic.shelf import Shelf
from thinwire.errors import ConfigError
from thinwire.links.base import Channel, Handle, Link
from thinwire.links.local import alone
from thinwire.links.meter import Meter
from thinwire.links.timings import Timings
from thinwire.rounds import MOST_SAID, Committed

T = TypeVar("T")
Tell = Callable[[], Sequence[int]]
Hear = Callable[[Committed, Mapping[int, tuple[int, ...]]], None]


@dataclass(frozen=True)
class Change:
    """A gathering that was settled.

    names    who is there now, by rank
    came, left  against this member's last gathering; at its first all others came
    healed   this member was given the state
    behind   who was given the state, this member or another
    seconds, received_bytes  what it took this member, from the end of its last gathering on
    """

    names: tuple[str, ...]
    came: tuple[str, ...]
    left: tuple[str, ...]
    healed: bool
    behind: tuple[str, ...]
    seconds: float
    received_bytes: int


class ElasticLink:
    """See above; made by `thinwire.join_elastic`."""

    def __init__(self, meeting: Meeting, *, shelf: Shelf | None = None, founds: bool = True) -> None:
        """
        shelf   pieces of the state that this member has fetched already; what is there is not sent to it again
        founds  whether it may begin a run. One that comes to a run that goes on may not: should that have ended
                meanwhile, newcomers would begin it all over again among themselves
        """
        self._meeting, self.shelf, self.founds = meeting, shelf or Shelf(), founds
        self._gathering: Gathering | None = None
        self._link = alone()
        self._before = Meter()  # traffic of gatherings that have ended
        self.carried: dict[str, tuple[Callable[[], State], Callable[[State], None]]] = {}
        self._beside: (
            tuple[Callable[[], Sequence[int]], Callable[[Committed, Mapping[int, tuple[int, ...]]], None]] | None
        )
        self._beside = None
        self._told: list[Callable[[Change], None]] = []

    # --- a link --------------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """This member's place in the gathering that holds."""
        return self._link.rank

    @property
    def members(self) -> tuple[int, ...]:
        """Everybody's ranks in it."""
        return self._link.members

    @property
    def meter(self) -> Meter:
        """Every byte of all gatherings, by purpose; a copy."""
        whole = Meter()
        for part in (self._before, self._link.meter):
            whole.add(part)
        return whole

    @property
    def timings(self) -> Timings | None:
        """Seconds a byte in the gathering that holds; None of a link that measures none."""
        return getattr(self._link, "timings", None)

    def open(self, purpose: str) -> Channel:
        """A channel of the gathering that holds; it ends with it."""
        return self._link.open(purpose)

    def spawn(self, job: Callable[[], T], name: str) -> Handle[T]:
        """As of any link."""
        return self._link.spawn(job, name)

    def now(self) -> float:
        """As of any link."""
        return self._meeting.now()

    def local_step(self) -> None:
        """As of any link."""
        self._link.local_step()

    def close(self) -> None:
        """Leave for good."""
        self._link.close()
        self._meeting.close()

    # --- a group that changes ------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """This member's."""
        return self._meeting.name

    @property
    def names(self) -> tuple[str, ...]:
        """Everybody's, by rank; this member's alone before the first meeting."""
        return (self.name,) if self._gathering is None else self._gathering.names

    def carry(self, key: str, save: Callable[[], State], load: Callable[[State], None]) -> None:
        """Have more state kept with the model's: the same on all members whenever they meet; newcomers are given it."""
        if key in self.carried:
            raise ConfigError(f"carry {key!r} twice", expected="a key of its own for each state", mend="rename it")
        self.carried[key] = save, load

    def beside_rounds(self, tell: Tell, hear: Hear) -> None:
        """Have numbers told with every round of fragment 0, that all hear if it is committed and nobody if it is not.

        tell  at most 8 integers of 64 bits, asked for as a round begins
        hear  the outcome, and everybody's numbers by rank; called before members meet after the round
        """
        self._beside = tell, hear

    def on_change(self, tell: Callable[[Change], None]) -> None:
        """Have a change told, once it is settled."""
        self._told.append(tell)

    # --- for thinwire.regroup ------------------------------------------------------------------------------------

    @property
    def holds(self) -> Gathering | None:
        """The gathering that holds."""
        return self._gathering

    def meet(self, *, broken: bool) -> Gathering:
        """Meet the others. What is returned holds only once it was settled and `enter`ed."""
        return self._meeting.meet(broken=broken)

    def enter(self, gathering: Gathering) -> None:
        """From here on this gathering holds; the last one's traffic is kept."""
        if gathering is not self._gathering:
            self._before.add(self._link.meter)
            self._link.close()
            self._gathering, self._link = gathering, gathering.link

    def tell_change(self, change: Change) -> None:
        """Tell whoever wants to know."""
        for tell in self._told:
            tell(change)

    def says(self) -> tuple[int, ...] | None:
        """What is to be told with a round."""
        if self._beside is None:
            return None
        numbers = tuple(self._beside[0]())
        if len(numbers) > MOST_SAID:
            raise ConfigError(
                f"{len(numbers)} numbers beside a round", expected=f"at most {MOST_SAID}", mend="tell fewer"
            )
        return numbers

    def hear(self, outcome: Committed, said: Mapping[int, tuple[int, ...]]) -> None:
        """A round was committed, with what was told beside it."""
        if self._beside is not None and said:
            self._beside[1](outcome, said)


def only_fixed(link: Link, what: str) -> None:
    """Refuse what knows fixed groups alone: it would never meet, and each member would go on by itself."""
    if isinstance(link, ElasticLink):
        raise ConfigError(
            f"{what} over an elastic link, whose members come and go",
            expected="a link among the same members to the end",
            mend="use `thinwire.join`; or `thinwire.synchronize`, which goes on when members come and go",
        )
