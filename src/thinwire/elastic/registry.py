"""Each member's small HTTP service: what the run is, how it stands, and a page that shows it.

    GET /run     the run: TOML, id, version, where its lighthouses are, where other members' services are
    GET /status  the run as this member knows it, with the others' present as they tell it now
    GET /own     this member's present alone: what others ask for to make their /status
    GET /        a page that shows /status, for people; it holds nothing secret and asks for the token itself

Everything but the page wants the run's token: `Authorization: Bearer TOKEN`. Nothing is encrypted: between machines
use a private network or a tunnel. Other routes (pieces of state) are mounted by whoever has them.
"""

from __future__ import annotations

import hmac
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from thinwire.elastic.board import Board
from thinwire.elastic.journal import strict
from thinwire.elastic.page import PAGE
from thinwire.errors import ConfigError, LinkError

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import BaseRoute
    from starlette.types import ASGIApp, Receive, Scope, Send

_LIMIT_S = 10.0
_OWN_LIMIT_S = 1.0  # for another member's present: a page is waiting
_FRESH_S = 0.8  # so long an answer of /status holds, however many look
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
_WRONG_TOKEN = "no token, or not this run's: give the one that `thinwire up` printed (--token T)"


class Registry:
    """One member's, served in a thread until `close`.

    bind    address of this machine to listen at; port 0 takes a free one
    board   what is told
    token   that whoever asks must know
    routes  more of Starlette's routes, under the same token
    raises  ConfigError if the port cannot be listened at, or Starlette and uvicorn are not installed
    """

    def __init__(self, bind: str, port: int, board: Board, token: str, *, routes: Sequence[BaseRoute] = ()) -> None:
        uvicorn = _import("uvicorn")
        self._socket = _listen(bind, port)
        self.address = f"{bind}:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(
            uvicorn.Config(
                application(board, token, routes=routes),
                log_level="critical",
                lifespan="off",
                timeout_graceful_shutdown=1,
            )
        )
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="registry", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop listening; may be called twice."""
        self._server.should_exit = True
        self._thread.join(_LIMIT_S)
        self._socket.close()


def application(
    board: Board, token: str, *, routes: Sequence[BaseRoute] = (), ask: Callable[..., dict[str, Any]] | None = None
) -> ASGIApp:
    """The service as an ASGI application.

    ask  how other members' presents are fetched; see `get`
    """
    _import("starlette")
    from starlette.applications import Starlette
    from starlette.responses import Response
    from starlette.routing import Mount, Route

    seen: dict[str, Any] = {"until": 0.0, "text": ""}
    lock = threading.Lock()

    def as_json(value: Any, code: int = 200) -> Response:
        return Response(json.dumps(strict(value)), code, {"Cache-Control": "no-store"}, "application/json")

    def run(request: Request) -> Response:
        return as_json(board.run())

    def own(request: Request) -> Response:
        return as_json(board.own())

    def status(request: Request) -> Response:
        with lock:
            if time.monotonic() >= seen["until"]:
                seen["text"] = json.dumps(strict(board.view(presents(board, token, ask or get))))
                seen["until"] = time.monotonic() + _FRESH_S
        return Response(seen["text"], 200, {"Cache-Control": "no-store"}, "application/json")

    def page(request: Request) -> Response:
        return Response(PAGE, 200, {"Content-Security-Policy": _POLICY}, "text/html; charset=utf-8")

    paths: list[BaseRoute] = [Route("/run", run), Route("/own", own), Route("/status", status), *routes]
    inner = Starlette(routes=[Route("/", page), Mount("/", routes=paths)])

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/" and not _knows(scope["headers"], token):
            await as_json({"error": _WRONG_TOKEN}, 401)(scope, receive, send)
            return
        await inner(scope, receive, send)

    return guarded


def presents(board: Board, token: str, ask: Callable[..., dict[str, Any]]) -> dict[str, dict[str, Any] | None]:
    """What the other members tell of themselves now; None of those who do not answer."""
    others = board.others()

    def one(address: str) -> dict[str, Any] | None:
        try:
            return ask(address, "/own", token, limit_s=_OWN_LIMIT_S)
        except (LinkError, ConfigError):
            return None

    if not others:
        return {}
    with ThreadPoolExecutor(min(32, len(others))) as threads:
        told = dict(zip(others, threads.map(one, others.values()), strict=True))
    # At an address another life may listen by now, or another run.
    return {name: own if own is not None and own.get("name") == name else None for name, own in told.items()}


def get(address: str, path: str, token: str, *, limit_s: float = _LIMIT_S) -> dict[str, Any]:
    """Ask a member's service.

    address  "HOST:PORT"
    returns  its answer
    raises   LinkError if nobody answers there in time, ConfigError if what answers is none, or refuses the token
    """
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        raise ConfigError(
            f"address {address!r}",
            expected="HOST:PORT of any member, e.g. 203.0.113.7:29400",
            mend="take it from the line that `thinwire up` printed",
        )
    request = urllib.request.Request(f"http://{address}{path}", headers={"Authorization": f"Bearer {token}"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # members are asked directly
    try:
        with opener.open(request, timeout=limit_s) as answer:
            found: dict[str, Any] = json.loads(answer.read())
            return found
    except urllib.error.HTTPError as error:
        raise _refused(address, error) from error
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", None) or error
        if isinstance(error, ValueError) and not isinstance(error, OSError):
            raise ConfigError(
                f"{address} answers, but not as a member of a thinwire run",
                expected="a member's address",
                mend="take the address and the port from the line that `thinwire up` printed",
            ) from error
        raise LinkError(
            f"nobody answers at {address}: {why}",
            expected="a member of a run that goes on",
            mend="see whether the run has ended, try another member's address; `thinwire doctor` looks at the way",
        ) from error


def _refused(address: str, error: urllib.error.HTTPError) -> ConfigError:
    if error.code == 401:
        return ConfigError(
            f"{address} does not know this token",
            expected="the run's token",
            mend="give --token T as `thinwire up` printed it",
        )
    return ConfigError(
        f"{address} answers {error.code} {error.reason}",
        expected="a member of a thinwire run",
        mend="take the address and the port from the line that `thinwire up` printed",
    )


def _knows(headers: Sequence[tuple[bytes, bytes]], token: str) -> bool:
    given = next((value for name, value in headers if name == b"authorization"), b"")
    return hmac.compare_digest(given, f"Bearer {token}".encode())


def _listen(bind: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in bind else socket.AF_INET
        listening = socket.create_server((bind, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"{bind}:{port} cannot be listened at: {error.strerror or error}",
            expected="an address of this machine, and a port that is free",
            mend="give another --port, or 0 for any; --bind takes an address of this machine",
        ) from error
    return listening


def _import(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"a run that others join needs {name}, which cannot be imported: {error}",
            expected="thinwire installed with its extra 'elastic'",
            mend="pip install 'thinwire[elastic]'",
        ) from error
