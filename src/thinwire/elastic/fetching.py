"""A newcomer's side of exhibit.py: the state of a run, fetched beside it from several members at once.

    got = fetch(["203.0.113.7:29600", "198.51.100.4:29600"], token, Shelf(folder="shelf"))
    model.load_state_dict(got.state[...])             # of step got.step

The state that is fetched is the newest that more than half of those who answer have on show, or, if they do not come to
that within some seconds, the newest of all. Pieces come from all who have it, the fast ones give more; each is checked
as it arrives and goes to the shelf, so whatever cuts the transfer, the next call asks for the rest. What the run did
meanwhile is brought by handing.py, from the same shelf: only pieces that changed cross then.

Nothing here waits for ever: for a first answer `answers_s`, for the next bytes of one `silence_s`, for all `limit_s`.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.error import HTTPError
from urllib.request import HTTPDefaultErrorHandler, HTTPErrorProcessor, HTTPHandler, OpenerDirector, Request

from thinwire.elastic.dealing import Deal
from thinwire.elastic.exhibit import QUESTION_PIECES
from thinwire.elastic.pieces import FORMAT, MANIFEST_BYTES, PIECE_BYTES, Assembly, Manifest, check, parse
from thinwire.elastic.shelf import Shelf
from thinwire.errors import ConfigError, LinkError, PacketError
from thinwire.links.joining import host_port

_LIST_BYTES = 1 << 16
_CHUNK_BYTES = 64 << 10
_LIST_S = 10.0  # silence of a member that is asked what it shows: the others are not kept waiting for it
_POLL_S = 0.2
_AGREE_S = 5.0  # how long members have to show the same state before one that few show is taken
_TRIES = 3  # of a donor that does not answer
_Unreachable = (OSError, HTTPException)


@dataclass(frozen=True)
class Progress:
    """How far it is.

    received_bytes  of pieces, in this call
    known_bytes     that were on the shelf
    total_bytes     of the state's pieces
    """

    received_bytes: int
    known_bytes: int
    total_bytes: int
    seconds: float


@dataclass(frozen=True)
class Fetched:
    """The common state of a run as it was at a step.

    given  address -> bytes of pieces that it gave
    """

    state: dict[str, Any]
    step: int
    digest: str
    progress: Progress
    given: Mapping[str, int]


@dataclass(frozen=True)
class _Shown:
    step: int
    digest: str


def fetch(
    addresses: Sequence[str],
    token: str,
    shelf: Shelf,
    *,
    limit_s: float = 3600.0,
    answers_s: float = 60.0,
    silence_s: float = 60.0,
    tell: Callable[[Progress], None] = lambda progress: None,
    stops: Callable[[], bool] = lambda: False,
) -> Fetched:
    """Fetch the state that members show.

    addresses  "HOST:PORT" of members' services; some may be gone
    shelf      pieces there are not asked for; those that arrive are put there
    limit_s    for all of it; what arrived by then is on the shelf
    answers_s  for a first answer, and then for a state to be shown: it is published after a committed round
    silence_s  for the next bytes of an answer
    tell       called now and then, from several threads, one at a time
    stops      asked now and then, from several threads; once it says so, all ends as if time were up
    raises     LinkError if nobody answers, nothing is shown, or time is up; ConfigError for a wrong token or address;
               PacketError for another format, or pieces that came damaged three times
    """
    if not addresses:
        raise ConfigError("no addresses to fetch a state from", expected="at least one", mend='name one: "HOST:PORT"')
    for address in addresses:
        host_port(address)
    return _Fetch(tuple(dict.fromkeys(addresses)), token, shelf, limit_s, answers_s, silence_s, tell, stops).run()


def _opener() -> OpenerDirector:
    """Without proxies, and without redirections: a token goes to the addresses that were given and nowhere else."""
    opener = OpenerDirector()
    for handler in (HTTPHandler(), HTTPErrorProcessor(), HTTPDefaultErrorHandler()):
        opener.add_handler(handler)
    return opener


@dataclass
class _Fetch:
    addresses: tuple[str, ...]
    token: str
    shelf: Shelf
    limit_s: float
    answers_s: float
    silence_s: float
    tell: Callable[[Progress], None]
    stops: Callable[[], bool]
    began: float = field(default_factory=time.monotonic)
    given: Counter[str] = field(default_factory=Counter)
    known_bytes: int = 0
    total_bytes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    opener: OpenerDirector = field(default_factory=_opener)

    def run(self) -> Fetched:
        while True:
            shown, donors = self._choose()
            manifest = self._manifest(shown, donors)
            if manifest is not None and (state := self._assemble(manifest, donors)) is not None:
                return Fetched(state, shown.step, shown.digest, self._progress(), dict(self.given))
            self._check_time()  # who had it has gone, or shows another by now: what arrived is on the shelf
            time.sleep(_POLL_S)

    # --- which state -------------------------------------------------------------------------------------------------

    def _choose(self) -> tuple[_Shown, list[str]]:
        """A state to fetch and who shows it; asks until there is one."""
        began = time.monotonic()
        first_seen: float | None = None
        with ThreadPoolExecutor(len(self.addresses)) as crew:
            while True:
                answers = dict(zip(self.addresses, crew.map(self._ask_for_list, self.addresses), strict=True))
                shown = {address: found for address, found in answers.items() if not isinstance(found, Exception)}
                counts = Counter(each for found in shown.values() for each in set(found))
                now = time.monotonic()
                if counts and first_seen is None:
                    first_seen = now
                usual = [each for each, count in counts.items() if 2 * count > len(shown)]
                if first_seen is not None and now - first_seen > _AGREE_S:
                    usual = usual or list(counts)
                if usual:
                    chosen = max(usual, key=lambda each: (each.step, counts[each], each.digest))
                    return chosen, [address for address in shown if chosen in shown[address]]
                if now - began > self.answers_s or (not shown and self._is_hopeless(answers)):
                    raise self._nothing(answers)
                self._check_time()
                time.sleep(_POLL_S)

    def _ask_for_list(self, address: str) -> list[_Shown] | Exception:
        try:
            told = json.loads(self._get(address, "/state", _LIST_BYTES, min(self.silence_s, _LIST_S)))
            if told["format"] != FORMAT:
                return PacketError(
                    f"{address} shows states of format {str(told['format'])[:40]!r}", expected=f"format {FORMAT!r}",
                    mend="install the same version of thinwire on all members",
                )  # fmt: skip
            return [_Shown(int(each["step"]), str(each["digest"])) for each in told["states"]]
        except (ValueError, KeyError, TypeError, RecursionError):
            return PacketError(
                f"what answers at {address} shows no states", expected="a member's service",
                mend="compare the address, and the versions of thinwire on both sides",
            )  # fmt: skip
        except (*_Unreachable, ConfigError, PacketError) as error:
            return error

    def _is_hopeless(self, answers: Mapping[str, list[_Shown] | Exception]) -> bool:
        """Whether asking again is no use: a wrong token, or nobody who may just be starting."""
        found = answers.values()
        refused = any(isinstance(each, ConfigError) for each in found)
        return refused or not any(isinstance(each, _Unreachable) for each in found)

    def _nothing(self, answers: Mapping[str, list[_Shown] | Exception]) -> Exception:
        """Why no state was found; a wrong token is no reason as long as another member takes it."""
        errors = [each for each in answers.values() if isinstance(each, Exception)]
        for kind in (ConfigError, PacketError):
            if found := [error for error in errors if isinstance(error, kind)]:
                return found[0]
        if len(errors) < len(answers):
            return LinkError(
                f"no member showed a state within {self.answers_s:g} s", expected="a committed round within that time",
                mend="allow more time than a round takes; `thinwire status HOST:PORT` shows whether there are rounds",
            )  # fmt: skip
        return LinkError(
            f"nobody answers at {', '.join(self.addresses)}: {errors[0]}", expected="at least one member of the run",
            mend="compare the addresses with what the members print; then try `thinwire doctor HOST:PORT` from here",
        )  # fmt: skip

    def _manifest(self, shown: _Shown, donors: Sequence[str]) -> Manifest | None:
        """From the shelf or the first donor that gives it whole; None if none does."""
        text = self.shelf.get(shown.digest)
        for address in donors if text is None else ():
            try:
                text = self._get(address, f"/state/{shown.digest}", MANIFEST_BYTES, self.silence_s)
                check(shown.digest, len(text), text)
                self.shelf.put(shown.digest, text)
                break
            except (*_Unreachable, PacketError):
                text = None
        return None if text is None else parse(text)

    # --- its pieces --------------------------------------------------------------------------------------------------

    def _assemble(self, manifest: Manifest, donors: Sequence[str]) -> dict[str, Any] | None:
        """The state; None if pieces are missing that nobody has any more."""
        assembly = Assembly(manifest)
        self.total_bytes = sum(manifest.sizes.values())
        for digest in manifest.sizes:
            if (piece := self.shelf.get(digest)) is not None:
                assembly.put(digest, piece)
        missing = assembly.missing
        self.known_bytes = max(0, self.total_bytes - sum(missing.values()) - self.given.total())
        deal: Deal[str] = Deal(missing, dict.fromkeys(missing, donors))
        self._told()
        while deal.missing and not deal.orphans:
            with ThreadPoolExecutor(len(donors)) as crew:
                jobs = [crew.submit(self._pull, address, deal, missing, assembly) for address in donors]
                try:
                    errors = [error for job in jobs if (error := job.exception()) is not None]
                except BaseException:  # Ctrl-C: the threads end with their next bytes
                    deal.stop()
                    raise
            if errors:
                raise errors[0]
        return None if deal.missing else assembly.state()

    def _pull(self, address: str, deal: Deal[str], sizes: Mapping[str, int], assembly: Assembly) -> None:
        """Ask one donor until there is nothing to ask it for, or it is gone."""
        failures = 0
        try:
            while wanted := deal.take(address, PIECE_BYTES, QUESTION_PIECES):
                left = list(wanted)
                try:
                    self._ask(address, left, deal, sizes, assembly)
                    failures = 0
                except HTTPError:  # it does not show this state any more
                    deal.gone(address, left)
                except _Unreachable:
                    failures = failures + 1 if left == wanted else 0
                    if failures == _TRIES:
                        deal.gone(address, left)
                    else:
                        deal.put_back(left)
                        time.sleep(_POLL_S * failures)
        except Exception:
            deal.stop()
            raise

    def _ask(
        self, address: str, left: list[str], deal: Deal[str], sizes: Mapping[str, int], assembly: Assembly
    ) -> None:
        """One question; pieces are taken in as they arrive and leave `left`."""
        with self._open(address, "/pieces", "\n".join(left).encode(), self.silence_s) as answer:
            while left:
                digest = left[0]
                piece = self._read(answer, sizes[digest])
                del left[0]
                try:
                    check(digest, sizes[digest], piece)
                except PacketError as error:
                    deal.failed(address, digest, error)
                    continue
                self.shelf.put(digest, piece)
                assembly.put(digest, piece)
                deal.arrived(digest)
                with self.lock:
                    self.given[address] += len(piece)
                self._told()

    # --- questions and answers ---------------------------------------------------------------------------------------

    def _open(self, address: str, path: str, body: bytes | None, silence_s: float) -> HTTPResponse:
        request = Request(f"http://{address}{path}", data=body, headers={"Authorization": f"Bearer {self.token}"})
        try:
            answer: HTTPResponse = self.opener.open(request, timeout=silence_s)
        except HTTPError as error:
            if error.code == 401:
                raise ConfigError(
                    f"{address} does not take this token", expected="the token of the run",
                    mend="ask whoever started the run for it: `thinwire up` prints it",
                ) from error  # fmt: skip
            raise
        return answer

    def _get(self, address: str, path: str, most_bytes: int, silence_s: float) -> bytes:
        with self._open(address, path, None, silence_s) as answer:
            length = answer.headers.get("content-length", "")
            if not length.isascii() or not length.isdigit() or int(length) > most_bytes:
                raise PacketError(f"{address} answers with {length or '?'} bytes", expected=f"at most {most_bytes}")
            return self._read(answer, int(length))

    def _read(self, answer: HTTPResponse, size: int) -> bytes:
        """So many bytes. An OSError if the answer ends before, or stays silent."""
        arrived = bytearray()
        while len(arrived) < size:
            self._check_time()
            part = answer.read(min(_CHUNK_BYTES, size - len(arrived)))
            if not part:
                raise ConnectionError(f"the answer ends after {len(arrived)} of {size} bytes")
            arrived += part
        return bytes(arrived)

    def _check_time(self) -> None:
        stops = self.stops()
        if stops or time.monotonic() - self.began > self.limit_s:
            missing = self.total_bytes - self.known_bytes
            when = "before it was ended" if stops else f"within {self.limit_s:g} s"
            raise LinkError(
                f"{self.given.total()} of {missing} missing bytes of a state arrived {when}",
                expected="all of it",
                mend="call again: what arrived is on the shelf; members give readers a share of their uplink only",
            )  # fmt: skip

    def _progress(self) -> Progress:
        received, seconds = self.given.total(), time.monotonic() - self.began
        return Progress(received, self.known_bytes, self.total_bytes, seconds)

    def _told(self) -> None:
        with self.lock:
            self.tell(self._progress())
