"""Elastic meetings: members come and go between rounds, and all of them keep one log. The protocol, without I/O.

Members share nothing but a key-value store with an atomic compare-and-set. In round t

    every member of the roster puts its codes under s/t/id, or nothing in them: that is goodbye;
    the first of the roster gathers them, for as long as it has patience, and notes who said hello;
    it proposes the closed round: head changes from the record of t-1 to that of t, if nobody was faster;
    whoever knows what head became publishes it under r/t, where all others wait for it;
    if no record comes, the second of the roster does the same, then the third and fourth together, then the next four.

There is no leader and no vote: whoever proposes first decides, all others take its record, and a record says who was
in, who is in from the next round on, and who is not any more. Two rules make it safe to die at any point. Nobody goes
on to round t+1 before r/t is published (so a proposer's death after its proposal loses nothing: the next one to propose
finds it in head and publishes it). And head never comes back to an older value, so keys of old rounds may be deleted.

    run      what the founder runs: facts, its id, the number of its first round
    head     the newest record
    ids      a counter: how many ids were drawn
    h/id     hello: `id` has replayed all records and wants to be on the roster
    s/t/id   scalars of a member; it deletes them two rounds later
    r/t      the record of round t; deleted 128 rounds later
    d/n      digest of the weights after n rounds, of whoever compared first
    p/k      records of rounds 64k to 64k+63, each behind its length

An id is drawn for a membership, not for a machine: one that was dropped comes back with another id. Ids that were
drawn before the newest on the roster and are not on it will not be; their owners see so in the record and draw again.

Source  that members of a run by seeds may come and go: Zelikman et al. 2023, arXiv:2306.10015 (Just One Byte).
Differs its code has scalars in the order of their senders' clocks; here a round is what its record says.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace

from thinwire.errors import ConfigError, LinkError, PacketError, StateMismatch
from thinwire.seeds.closed import Closed
from thinwire.seeds.programs import Add, Clock, Delete, Gather, Program, Put, Swap
from thinwire.seeds.reading import Reader, varint
from thinwire.seeds.standing import USUAL, Pace, Standing

PIECE = 64  # rounds whose records are kept together once they are all there
_KEPT = 2 * PIECE  # rounds whose records are also there one by one
_AT_ONCE = 8  # pieces that a joiner asks for in one go


class Member:
    """One member's part. Every method is a program: whoever carries it feeds it answers.

    id        on the roster; None while this member is not
    standing  after the last round that it was told of
    founder   id of who founded the run, known once it is met; so is the run's first round
    at_least  members that a founder waits for in its first round
    """

    def __init__(self, pace: Pace = USUAL, at_least: int = 1) -> None:
        self.id: int | None = None
        self.standing = Standing()
        self._pace, self._at_least = pace, at_least
        self.founder, self._first = 0, -1
        self._hello: int | None = None  # id that asks for admission
        self._piece: list[bytes] = []  # records since the last whole piece
        self._rounds_s: deque[float] = deque(maxlen=15)
        self._closed_at: float | None = None
        self._mine: deque[str] = deque()  # keys that are this member's to delete
        self._since, self._pause, self._not_before = 0, 1, 0
        self._was: int | None = None  # id until it said goodbye

    # --- coming -------------------------------------------------------------------------------------------------

    def found(self, facts: Mapping[str, str], past: Sequence[Closed] = ()) -> Program[None]:
        """Begin a run in an empty store.

        past    rounds that it goes on from, 0 and up; their members are not on the roster any more
        raises  ConfigError if they are not in order, or if a run is there already
        """
        if (yield Gather(("run",), 0)):
            raise ConfigError(
                "a run was founded here already", expected="a store without one",
                mend="attend it instead, or host on another port",
            )  # fmt: skip
        for number, closed in enumerate(past):
            if closed.number != number:
                raise ConfigError(
                    f"round {closed.number} of a log in place {number}", expected="all rounds from 0, in order",
                    mend="go on from a whole log",
                )  # fmt: skip
            self._take(closed.to_bytes())
            if len(self._piece) == PIECE:
                yield Put(_piece(number // PIECE), _joined(self._piece))
        if past:
            for number, record in enumerate(self._piece, len(past) - len(self._piece)):
                yield Put(_record(number), record)
            yield Put("head", self.standing.last)
        self._first, self.founder = len(past), self.standing.newest + 1
        yield Add("ids", self.founder + 1)
        told = {"facts": dict(facts), "first": self._first, "founder": self.founder}
        yield Put("run", json.dumps(told, sort_keys=True).encode())
        self._begin()
        self.id, self._since = self.founder, self._first

    def meet(self, facts: Mapping[str, str]) -> Program[None]:
        """Meet a run that somebody founded; `follow` leads into it.

        raises  ConfigError naming what differs from what its founder runs; LinkError if there is no run
        """
        found = yield Gather(("run",), self._pace.most_s, "the founder of the run")
        if not found:
            raise LinkError(
                f"nobody founded a run here within {self._pace.most_s:g} s", expected="a host that has begun",
                mend="start the host first, and look at its output",
            )  # fmt: skip
        try:
            told = json.loads(found["run"])
            theirs, self._first, self.founder = dict(told["facts"]), int(told["first"]), int(told["founder"])
        except (ValueError, KeyError, TypeError) as error:
            raise PacketError("what the store holds under `run` is none of ours") from error
        for name in sorted({*facts, *theirs}):
            mine, due = facts.get(name, "nothing"), theirs.get(name, "nothing")
            if mine != due:
                raise ConfigError(
                    f"{name}: this member has {mine}, the run {due}", expected="the same on all members",
                    mend=_MEND.get(name, f"start this member with the {name} of the run's host"),
                )  # fmt: skip
        self._begin()

    def follow(self) -> Program[list[Closed]]:
        """The next rounds that closed without this member, in order: at least one, at most some pieces of the log.

        Asking for the next ones says that those before are replayed: then it asks for admission, and waits. If no round
        closes for longer than any member would wait, nobody is left to close one, and this member goes on alone.
        """
        records = yield from self._behind()
        if not records:
            if self._hello is None and self.standing.number >= self._not_before:
                yield from self._ask()
            records = yield from self._next()
        return [self._take(record) for record in records]

    def _ask(self) -> Program[None]:
        count: int = yield Add("ids", 1)
        self._hello = count - 1
        yield Put(_hello(self._hello), b"")
        self._mine.append(_hello(self._hello))

    def _behind(self) -> Program[list[bytes]]:
        """Records after the last one known, as many as are to be had in one go."""
        number = self.standing.number
        head: dict[str, bytes] = yield Gather(("head",), 0)
        newest = Closed.from_bytes(head["head"]).number if head else -1
        if newest < number:
            return []
        if newest // PIECE == number // PIECE:
            keys = tuple(_record(n) for n in range(number, newest))
            found = yield from self._surely(keys)
            return [*found, head["head"]]
        first = number // PIECE
        keys = tuple(_piece(k) for k in range(first, min(newest // PIECE, first + _AT_ONCE)))
        found = yield from self._surely(keys)
        return [record for piece in found for record in _split(piece)][number - first * PIECE :]

    def _next(self) -> Program[list[bytes]]:
        """Wait for the record of the open round; close it if nobody does."""
        standing = self.standing
        limit_s = _turn(len(standing.roster) + 1) * self._patience_s
        found = yield Gather((_record(standing.number),), limit_s, "a round to close")
        if found:
            return list(found.values())
        if standing.number:
            yield from self._publish(standing.number - 1, standing.last, self._piece)
        if self._hello is None:
            yield from self._ask()
        newcomers = yield from self._newcomers()
        closed = Closed(standing.number, 0.0, {}, joined=newcomers, left=standing.roster)
        return [(yield from self._propose(closed))]

    # --- a round ------------------------------------------------------------------------------------------------

    def round(self, number: int, codes: bytes, lr: float) -> Program[Closed]:
        """Take part in a round, and learn what it came to. Afterwards `id` is None if it closed without this member.

        codes   of this member, as many bytes as every member's
        lr      learning rate of the round, alike on all members
        """
        if self.id is None or number != self.standing.number:
            raise ConfigError(
                f"round {number} asked of a member that " + ("is not on the roster" if self.id is None else
                f"is in round {self.standing.number}"), expected="rounds in order, while on the roster",
                mend="replay backlog() before every round: it is empty for those who are in",
            )  # fmt: skip
        if not codes:
            raise ConfigError(f"no codes for round {number}", expected="a byte or more", mend="leave() says goodbye")
        Closed(number, lr, {})  # a rate that cannot be is everybody's error, not that of who closes the round
        key = _scalars(number, self.id)
        yield Put(key, codes)
        self._mine.append(key)
        while len(self._mine) > 2:
            yield Delete(self._mine.popleft())
        record = yield from self._close(self.id, codes, lr)
        closed = self._take(record)
        now: float = yield Clock()
        if self._closed_at is not None and not closed.left:  # a round that waited for somebody in vain is not usual
            self._rounds_s.append(now - self._closed_at)
        self._closed_at = None if self.id is None else now
        return closed

    def _close(self, me: int, codes: bytes, lr: float) -> Program[bytes]:
        """The record of the open round: somebody else's, or in our turn our own."""
        standing, patience_s = self.standing, self._patience_s
        turn = _turn(standing.roster.index(me))
        if turn > 1:
            key = _record(standing.number)
            found = yield Gather((key,), turn * patience_s, f"round {standing.number} to close")
            if found:
                return bytes(found[key])
        newcomers = yield from self._newcomers()
        due = {_scalars(standing.number, member): member for member in standing.roster}
        what = f"the scalars of round {standing.number}"
        arrived = yield Gather(tuple(due), patience_s if turn == 1 else 0, what)
        told = {due[key]: value for key, value in arrived.items() if len(value) == len(codes)}
        told[me] = codes
        left = tuple(member for member in standing.roster if member not in told)
        closed = Closed(standing.number, lr, dict(sorted(told.items())), joined=newcomers, left=left)
        return (yield from self._propose(closed))

    def _newcomers(self) -> Program[tuple[int, ...]]:
        """Ids that said hello and are newer than any that were admitted."""
        first = self.standing.newest + 1
        if self.standing.number == self._first and self.id == self.founder and self._at_least > 1:
            keys = tuple(_hello(first + n) for n in range(self._at_least - 1))
            yield Gather(keys, self._pace.most_s, f"{self._at_least} members to be there")
        count: int = yield Add("ids", 0)
        if count <= first:
            return ()
        hellos = {_hello(member): member for member in range(first, count)}
        there = yield Gather(tuple(hellos), 0)
        return tuple(member for key, member in hellos.items() if key in there)

    def _propose(self, closed: Closed) -> Program[bytes]:
        """Offer a record for the open round; what counts is the one that came first."""
        number, mine = closed.number, closed.to_bytes()
        now: bytes = yield Swap("head", self.standing.last, mine)
        newest = Closed.from_bytes(now).number if now else -1
        if newest < number:
            raise LinkError(
                f"the store's newest round is {newest}, after {number - 1} were closed", expected="the run's own store",
                mend="attend the run anew; the log that this member holds is good up to its last round",
            )  # fmt: skip
        if newest > number:  # others have gone on meanwhile, so this round is published
            return (yield from self._read(number))
        yield from self._publish(number, now, [*self._tail(), now])
        if now == mine:
            yield from self._tidy(closed)
        return now

    def _publish(self, number: int, record: bytes, piece: Sequence[bytes]) -> Program[None]:
        """Put what head holds where others wait for it, in case its author does not live to do it."""
        if number % PIECE == PIECE - 1:
            yield Put(_piece(number // PIECE), _joined(piece))
        yield Put(_record(number), record)

    def _tidy(self, closed: Closed) -> Program[None]:
        """Delete what nobody will ask for: an old record, and what those who left did not delete."""
        if closed.number >= _KEPT:
            yield Delete(_record(closed.number - _KEPT))
        for member in closed.left:
            for number in range(max(closed.number - 2, 0), closed.number + 1):
                yield Delete(_scalars(number, member))

    def _read(self, number: int) -> Program[bytes]:
        """The record of a round that is known to be published."""
        found = yield Gather((_record(number),), 0)
        if found:
            return bytes(found[_record(number)])
        (piece,) = yield from self._surely((_piece(number // PIECE),))
        return _split(piece)[number % PIECE]

    def _surely(self, keys: tuple[str, ...]) -> Program[list[bytes]]:
        """Values of keys that must be there."""
        if not keys:
            return []
        found: dict[str, bytes] = yield Gather(keys, 0)
        if len(found) < len(keys):
            lacks = next(key for key in keys if key not in found)
            raise LinkError(
                f"the store has no {lacks}", expected="all records of the run, in pieces or one by one",
                mend="attend the run anew; if it stays so, found a new one from a member's log",
            )  # fmt: skip
        return [found[key] for key in keys]

    def compare(self, number: int, digest: str) -> Program[None]:
        """Compare weights after `number` rounds with those of whoever was first to say.

        raises  StateMismatch
        """
        first: bytes = yield Swap(f"d/{number}", b"", digest.encode())
        if first != digest.encode():
            raise StateMismatch(
                f"after {number} rounds this member's weights are not those of the member that was first to compare",
                expected=f"digest {first.decode(errors='replace')}, and this member has {digest}",
                mend="one of the two replayed something else: rebuild both from the base and the log (thinwire import)",
            )

    # --- going --------------------------------------------------------------------------------------------------

    def leave(self) -> Program[None]:
        """Say goodbye: the open round is closed without this member, and without waiting for it."""
        if self.id is not None:
            yield Put(_scalars(self.standing.number, self.id), b"")
        while self._mine:
            yield Delete(self._mine.popleft())
        self._was, self.id, self._hello = self.id, None, None

    def linger(self) -> Program[None]:
        """For who keeps the store: go on reading until all others said goodbye, or no round closes any more."""
        while others := [member for member in self.standing.roster if member != self._was]:
            number = self.standing.number
            due = tuple(_scalars(number, member) for member in others)
            there = yield Gather(due, self._patience_s, "the others to end")
            if len(there) == len(due) and not any(there.values()):
                return
            record = yield Gather((_record(number),), _turn(len(others) + 1) * self._patience_s, "the others to end")
            if not record:
                return
            self._take(record[_record(number)])

    # --- what is known ------------------------------------------------------------------------------------------

    @property
    def _patience_s(self) -> float:
        return self._pace.patience_s(self._rounds_s)

    def _begin(self) -> None:
        """Before the run's first round the roster is its founder alone, whoever was in the log that it goes on from."""
        if self.standing.number == self._first:
            newest = max(self.standing.newest, self.founder)
            self.standing = replace(self.standing, roster=(self.founder,), newest=newest)

    def _tail(self) -> list[bytes]:
        return [] if len(self._piece) == PIECE else self._piece

    def _take(self, record: bytes) -> Closed:
        """Move on by a closed round."""
        closed = Closed.from_bytes(record)
        if closed.number != self.standing.number:
            raise PacketError(f"the record of round {closed.number} in the place of {self.standing.number}")
        self.standing = self.standing.after(closed, record)
        self._piece = [*self._tail(), record]
        self._begin()
        if self._hello is not None and closed.joined and max(closed.joined) >= self._hello:
            if self._hello in closed.joined:
                self.id, self._since = self._hello, self.standing.number
            self._hello = None
        if self.id is not None and self.id not in self.standing.roster:
            self._dropped()
        return closed

    def _dropped(self) -> None:
        """A round closed without this member. One that hardly ever keeps up pauses for longer every time."""
        stayed = self.standing.number - self._since
        self._pause = 1 if stayed > PIECE else min(2 * self._pause, 4 * PIECE)
        self._not_before = self.standing.number + self._pause - 1
        self.id = self._closed_at = None


_MEND = {
    "version": "install the version of thinwire that the run's host has",
    "base": "load the base weights that the run's host has",
    "frozen": "load the weights around the tuned ones that the run's host has",
    "recipe": "use the options of the run's host",
}


def _turn(place: int) -> int:
    """After how many patiences the member in a place closes the round: 1, 2, 3, 3, 4, 4, 4, 4, 5, ..."""
    return 1 + place.bit_length()


def _scalars(number: int, member: int) -> str:
    return f"s/{number}/{member}"


def _record(number: int) -> str:
    return f"r/{number}"


def _piece(number: int) -> str:
    return f"p/{number}"


def _hello(member: int) -> str:
    return f"h/{member}"


def _joined(records: Sequence[bytes]) -> bytes:
    return b"".join(varint(len(record)) + record for record in records)


def _split(piece: bytes) -> list[bytes]:
    """Records of a piece.

    raises  PacketError if it is not a whole one
    """
    reader = Reader(piece, what="a piece of the log")
    records = [reader.take(reader.varint()) for _ in range(PIECE)]
    reader.end()
    return records
