"""A member's state on show: newcomers fetch it beside the run, and no round waits for them.

    exhibit = Exhibit(uplink=Rate.parse("50mbit"))
    with serve(exhibit, token) as address:            # or mount routes(exhibit, token) in a service of your own
        ...                                           # after a committed round, in the training loop:
        exhibit.publish(step, sync_state)             # a copy, and only if somebody asked since the last one

    GET  /state           the states on show: step, digest of the manifest, bytes. Asking is also what has one published
    GET  /state/DIGEST    a manifest (pieces.py)
    POST /pieces          digests, a line each; returns the pieces end to end

Readers read copies: the trainer is held up by making one, never by a reader. Two are held at most:
one that is being read stays until nobody asked for any of it for half a minute, beside the newest; while both are read
nothing is published. Digests are computed when a reader asks, on the server's thread.

Rate   all readers together get a share of the uplink, 30 % unless told otherwise, in pieces of 64 KiB
Trust  whoever knows the token reads everything; it crosses the wire as it is. Use a private network or a tunnel.
"""

from __future__ import annotations

import asyncio
import hmac
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from thinwire.elastic.pieces import FORMAT, MANIFEST_BYTES, Pieces, cut
from thinwire.errors import ConfigError, LinkError
from thinwire.packing import pack, unpack
from thinwire.units import Rate

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import BaseRoute

HELD = 2
READ_S = 30.0  # how long a state counts as being read after the last question for it
QUESTION_PIECES = 4096
_CHUNK_BYTES = 64 << 10
_STARTS_S = 10.0
_UPLINK = Rate(100e6)


class Bucket:
    """A rate that is shared by all who take from it: each is told how long to wait. Idle time is not saved up."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self._free_at = 0.0
        self._lock = threading.Lock()

    def take(self, size: int, now: float) -> float:
        """Seconds until `size` bytes may be sent; they are reserved."""
        with self._lock:
            start = max(self._free_at, now)
            self._free_at = start + size / self.bytes_per_s
            return start - now


@dataclass(eq=False)
class _Publication:
    """A copy of a state; `pieces` are cut when the first reader asks."""

    step: int
    state: Mapping[str, Any]
    touched_s: float
    read_s: float | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    made: Pieces | None = None

    @property
    def pieces(self) -> Pieces:
        with self.lock:
            if self.made is None:
                self.made = cut(self.state)
            return self.made


class Exhibit:
    """What a member shows of its state. `publish` is the trainer's, all else is for readers' threads."""

    def __init__(
        self, uplink: Rate = _UPLINK, share: float = 0.3, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """uplink: of this member, all traffic; share: of it that all readers together may have, in (0, 1]."""
        if not 0 < share <= 1:
            raise ConfigError(
                f"readers are to have a share of {share:g} of the uplink", expected="a share in (0, 1]",
                mend="0.3 leaves most of it to the run; without an exhibit nobody reads",
            )  # fmt: skip
        self.share, self._clock = share, clock
        self.bucket = Bucket(1.0)
        self.measured(uplink)
        self._lock = threading.Lock()
        self._held: list[_Publication] = []
        self._wanted = False

    def measured(self, uplink: Rate) -> None:
        """The uplink was measured anew: readers get their share of this from now on."""
        if uplink.bits_per_s <= 0:
            raise ConfigError(f"an uplink of {uplink}", expected="more than 0 bits a second", mend="write one: 50mbit")
        self.bucket.bytes_per_s = self.share * uplink.bits_per_s / 8

    @property
    def wanted(self) -> bool:
        """Whether somebody asked for a state since the last one was published."""
        return self._wanted

    def publish(self, step: int, state: Callable[[], Mapping[str, Any]]) -> bool:
        """After a committed round: show a copy of the state, if somebody asked since the last one and there is room.

        state    called only then; nested dicts and lists as hand_over's `common`
        returns  whether one was made
        """
        with self._lock:
            kept = [each for each in self._held if self._is_read(each)]
            if not self._wanted or len(kept) >= HELD:
                since = self._clock() - READ_S
                self._held = [each for each in self._held if each in kept or each.touched_s > since]
                return False
        made = _Publication(step, _copied(state()), self._clock())
        with self._lock:
            kept = [each for each in self._held if self._is_read(each)]
            if len(kept) >= HELD:  # somebody began to read the newest meanwhile
                return False
            self._held, self._wanted = [*kept, made], False
        return True

    def states(self) -> list[dict[str, Any]]:
        """What there is, oldest first; and the next committed round is asked to publish."""
        with self._lock:
            self._wanted = True
            held = list(self._held)
        return [
            {"step": each.step, "digest": manifest.digest, "bytes": sum(manifest.sizes.values())}
            for each in held
            for manifest in (each.pieces.manifest,)
        ]

    def manifest(self, digest: str) -> bytes | None:
        """The manifest of this digest; whoever asks for one counts as a reader of it."""
        for each in self._all():
            if each.pieces.manifest.digest == digest:
                each.read_s = self._clock()
                return each.pieces.manifest.text
        return None

    def piece(self, digest: str) -> memoryview | None:
        """A piece of a state on show whose manifest was asked for."""
        for each in self._all():
            if each.made is not None and digest in each.made.views:
                each.read_s = self._clock()
                return each.made.views[digest]
        return None

    def now(self) -> float:
        """Seconds on the clock that `bucket` is asked with."""
        return self._clock()

    def _all(self) -> list[_Publication]:
        with self._lock:
            return list(self._held)

    def _is_read(self, each: _Publication) -> bool:
        return each.read_s is not None and self._clock() - each.read_s < READ_S


def routes(exhibit: Exhibit, token: str) -> list[BaseRoute]:
    """The three paths above as starlette's routes, for a service of one's own.

    token   what `Authorization: Bearer TOKEN` must bring, or the answer is 401
    raises  ConfigError without a token, or without starlette
    """
    if not token:
        raise ConfigError(
            "an empty token", expected="a secret that members share", mend="make one: secrets.token_hex()"
        )
    responses, routing, concurrency = _starlette()

    def allowed(request: Request) -> bool:
        told = request.headers.get("authorization", "")
        return hmac.compare_digest(told.encode(), f"Bearer {token}".encode())

    def guarded(answer: Callable[[Request], Any]) -> Callable[[Request], Any]:
        async def endpoint(request: Request) -> Response:
            if not allowed(request):
                refusal: Response = responses.JSONResponse({"wrong": "another token than this run's"}, 401)
                return refusal
            made: Response = await answer(request)
            return made

        return endpoint

    def sent(parts: Sequence[bytes | memoryview]) -> Any:
        length = {"content-length": str(sum(map(len, parts)))}
        return responses.StreamingResponse(
            _slowly(exhibit, parts), headers=length, media_type="application/octet-stream"
        )

    def missing() -> Any:
        return responses.JSONResponse({"wrong": "not on show here, or no longer"}, 404)

    async def states(request: Request) -> Any:
        found = await concurrency.run_in_threadpool(exhibit.states)  # may have to compute digests
        return responses.JSONResponse({"format": FORMAT, "states": found})

    async def manifest(request: Request) -> Any:
        text = await concurrency.run_in_threadpool(exhibit.manifest, request.path_params["digest"])
        return missing() if text is None else sent([text])

    async def pieces(request: Request) -> Any:
        asked = b""
        async for part in request.stream():
            asked += part
            if len(asked) > 65 * QUESTION_PIECES:
                return responses.JSONResponse({"wrong": "a question of too many pieces"}, 413)
        wanted = asked.decode("latin-1").split()
        found = [piece for digest in wanted if (piece := exhibit.piece(digest)) is not None]
        if sum(map(len, found)) > MANIFEST_BYTES:
            return responses.JSONResponse({"wrong": "a question for too much at once"}, 413)
        return sent(found) if len(found) == len(wanted) else missing()

    return [
        routing.Route("/state", guarded(states)),
        routing.Route("/state/{digest}", guarded(manifest)),
        routing.Route("/pieces", guarded(pieces), methods=["POST"]),
    ]


@contextmanager
def serve(exhibit: Exhibit, token: str, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serve it alone, on a thread, until the block ends; yields "HOST:PORT".

    port    0 finds a free one
    raises  LinkError if nothing can listen there; ConfigError if starlette or uvicorn is missing
    """
    table = routes(exhibit, token)
    try:
        import uvicorn
        from starlette.applications import Starlette
    except ImportError as error:
        raise _lacking(error) from error
    try:
        listener = socket.create_server((host, port))
    except OSError as error:
        raise LinkError(
            f"nothing can listen at {host}:{port}: {error}", expected="an address of this machine and a free port",
            mend="name another port, or end what listens on this one",
        ) from error  # fmt: skip
    config = uvicorn.Config(Starlette(routes=table), log_config=None, access_log=False, lifespan="off", ws="none",
                            timeout_graceful_shutdown=1)  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), name="exhibit", daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + _STARTS_S
        while not server.started:
            if not thread.is_alive() or time.monotonic() > deadline:
                raise LinkError(
                    f"the service at {host}:{port} did not start", expected=f"a start within {_STARTS_S:g} s",
                    mend="look for an error of uvicorn above",
                )  # fmt: skip
            time.sleep(0.005)
        yield f"{host}:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(_STARTS_S)
        listener.close()


async def _slowly(exhibit: Exhibit, parts: Sequence[bytes | memoryview]) -> AsyncIterator[bytes]:
    """The bytes at the rate that readers have."""
    for part in parts:
        for start in range(0, len(part), _CHUNK_BYTES):
            chunk = bytes(part[start : start + _CHUNK_BYTES])
            wait_s = exhibit.bucket.take(len(chunk), exhibit.now())
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            yield chunk


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    tensors: dict[str, Tensor] = {}

    def keep(place: str, tensor: Tensor) -> str:
        tensors[place] = tensor.detach().to("cpu", copy=True)
        return place

    copied: dict[str, Any] = unpack(pack(state, keep, what="a state for newcomers"), tensors)
    return copied


def _starlette() -> tuple[Any, Any, Any]:
    """Its modules for responses, routing and threads."""
    try:
        from starlette import concurrency, responses, routing
    except ImportError as error:
        raise _lacking(error) from error
    return responses, routing, concurrency


def _lacking(error: ImportError) -> ConfigError:
    return ConfigError(
        f"{error.name} is not installed", expected="the extra that serves states to newcomers",
        mend="pip install 'thinwire[elastic]'",
    )  # fmt: skip
