"""torchft's two servers, each in a small process of its own that ends with the member that started it.

The *heart* (ManagerServer) tells the lighthouse that a member is there. Were it a thread of the trainer, as torchft has
it, a trainer that hangs would go on to look alive for ever; a call that waits at a lighthouse which died could not be
ended; and the lighthouse's page has a button that ends the process of any member it knows. Here the heart stops by
itself when the trainer has not been heard for its limit, ends when the trainer says so, and takes nobody with it: it
listens on this machine alone, so the button reaches it from nowhere else, and a member whose heart was stopped gets
another.

The *lighthouse* in a trainer's process would keep its port until that process ends, and stop where it is stopped.

Both need torchft's compiled part only: 15 MB and 0.2 s where torch takes a second and ten times that.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from thinwire.errors import ConfigError, LinkError

_START_S = 30.0
_LOOK_S = 1.0  # how often a server looks whether the one who started it is there


class Server:
    """A server in a child process: it runs once this returns, and ends with `stop`, or with this process."""

    def __init__(
        self, kind: str, *, log: IO[str] | int = subprocess.DEVNULL, limit_s: float = _START_S, **options: object
    ):
        """
        kind     "lighthouse" or "heart"
        log      where torchft's own lines go
        raises   LinkError with what torchft says if it cannot start within `limit_s`; ConfigError if torchft is missing
        """
        compiled()
        command = [sys.executable, "-m", "thinwire.elastic.servers"]
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
        self.pid = self._child.pid
        self._say(json.dumps({"kind": kind} | options))
        answer = self._answer(limit_s)
        if "address" not in answer:
            self.stop()
            raise LinkError(
                f"a {kind} does not start: {answer['error']}",
                expected="torchft's server to listen and, if it is a heart, to reach its lighthouse",
                mend="see whether the port is free and the lighthouse's address right",
            )
        self.address = str(answer["address"])

    def live_for(self, seconds: float) -> None:
        """It ends by itself after so long, unless told again."""
        self._say(f"{seconds:.3f}")

    def alive(self) -> bool:
        """Whether its process runs."""
        return self._child.poll() is None

    def stop(self) -> None:
        """At once; may be called twice."""
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # what was not yet written
                pipe.close()

    def _say(self, line: str) -> None:
        assert self._child.stdin is not None
        with suppress(BrokenPipeError, ValueError):  # it has ended: `alive` says so
            self._child.stdin.write(line + "\n")
            self._child.stdin.flush()

    def _answer(self, limit_s: float) -> dict[str, Any]:
        assert self._child.stdout is not None
        ready, _, _ = select.select([self._child.stdout], [], [], limit_s)
        line = self._child.stdout.readline() if ready else ""
        return (
            json.loads(line) if line else {"error": f"nothing heard within {limit_s:g} s" if not ready else "it ended"}
        )


def compiled() -> ModuleType:
    """torchft's compiled part, without the rest of it, which loads torch.

    raises  ConfigError naming the extra if torchft is not installed
    """
    package = find_spec("torchft")
    for place in () if package is None else package.submodule_search_locations or ():
        for suffix in EXTENSION_SUFFIXES:
            path = Path(place) / f"_torchft{suffix}"
            if path.exists():
                spec = spec_from_file_location("_torchft", path)
                assert spec is not None
                assert spec.loader is not None
                module = module_from_spec(spec)
                spec.loader.exec_module(module)
                return module
    raise ConfigError(
        "an elastic group without torchft",
        expected="torchft 0.2: its lighthouse says who is there",
        mend="pip install 'thinwire[elastic]' (torchft has wheels for Linux only)",
    )


def _lighthouse(
    torchft: ModuleType, bind: str, min_replicas: int, join_s: float, heartbeat_s: float
) -> tuple[Any, str]:
    server = torchft.LighthouseServer(
        bind=bind, min_replicas=min_replicas, join_timeout_ms=round(join_s * 1000),
        heartbeat_timeout_ms=round(heartbeat_s * 1000),
    )  # fmt: skip
    return server, f"{bind.rpartition(':')[0]}:{server.address().rpartition(':')[2]}"


def _heart(
    torchft: ModuleType, replica_id: str, lighthouse: str, store: str, connect_s: float, beat_s: float
) -> tuple[Any, str]:
    server = torchft.ManagerServer(
        replica_id=replica_id, lighthouse_addr=f"http://{lighthouse}", hostname="127.0.0.1", bind="127.0.0.1:0",
        store_addr=store, world_size=1, heartbeat_interval=timedelta(seconds=beat_s),
        connect_timeout=timedelta(seconds=connect_s), quorum_retries=0,
    )  # fmt: skip
    return server, server.address()


_KINDS: dict[str, Callable[..., tuple[Any, str]]] = {"lighthouse": _lighthouse, "heart": _heart}


def _main() -> None:
    """The child: one line says what to serve, one answers where; then lines that prolong its life, until they end."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # torchft writes there too
    parent, lines, kept = os.getppid(), _Lines(), None
    options = json.loads(lines.next_within(_START_S) or "{}")
    try:
        kept, address = _KINDS[options.pop("kind")](compiled(), **options)
        answer = {"address": address}
    except Exception as error:
        answer = {"error": str(error).splitlines()[0] if str(error) else type(error).__name__}
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
    until = float("inf") if "address" in answer else 0.0
    while os.getppid() == parent and time.monotonic() < until and not lines.ended:
        if line := lines.next_within(min(_LOOK_S, max(0.0, until - time.monotonic()))):
            until = time.monotonic() + float(line)
    del kept  # until here
    os._exit(0)


class _Lines:
    """Lines of standard input, read without waiting longer than asked."""

    def __init__(self) -> None:
        self._rest, self.ended = b"", False

    def next_within(self, seconds: float) -> str | None:
        if b"\n" not in self._rest:
            if not select.select([0], [], [], seconds)[0]:
                return None
            chunk = os.read(0, 4096)
            self._rest, self.ended = self._rest + chunk, not chunk
        line, newline, rest = self._rest.partition(b"\n")
        if not newline:
            return None
        self._rest = rest
        return line.decode()


if __name__ == "__main__":
    _main()
