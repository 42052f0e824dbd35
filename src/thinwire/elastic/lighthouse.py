"""The lighthouse: where members learn of each other. Any machine that all members reach can run one.

    python -m thinwire.elastic.lighthouse --bind 10.0.0.1:29510

It keeps who is there in memory, and nothing of the run: it may be restarted at any time, and members who cannot reach
it go on to one of their own standby lighthouses (docs/elastic.md). It trusts whoever reaches its port: bind it to an
address of a private network.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from http.client import HTTPConnection, HTTPException

from thinwire.elastic.servers import Server
from thinwire.elastic.settings import Limits
from thinwire.errors import ConfigError, ThinwireError

PORT = 29510

_HEARD = re.compile(r"([^\s>]+): seen ([0-9.eE+-]+)s ago")


def serve(bind: str, *, at_least: int = 1, limits: Limits | None = None, log: int | None = None) -> Server:
    """Run a lighthouse in a process of its own, which ends with this one or with `stop`.

    bind      "HOST:PORT" to listen at, HOST an address of this machine as the members see it; port 0 takes a free one
    at_least  members without whom no group forms
    limits    heartbeat_s and join_s are the lighthouse's
    log       a file descriptor for torchft's own lines; by default they are dropped
    returns   the server; its `address` is "HOST:PORT"
    raises    ConfigError for a bind that is no address, LinkError if it cannot listen there
    """
    host, port = split(bind, port_0=True)
    limits = limits or Limits()
    if at_least < 1:
        raise ConfigError(
            f"a lighthouse for at least {at_least} members", expected="1 or more", mend="leave it out for 1"
        )
    return Server(
        "lighthouse", log=subprocess.DEVNULL if log is None else log, bind=f"{host}:{port}", min_replicas=at_least,
        join_s=limits.join_s, heartbeat_s=limits.heartbeat_s,
    )  # fmt: skip


def split(address: str, *, port_0: bool = False) -> tuple[str, int]:
    """HOST:PORT to its parts; raises ConfigError if it is none."""
    host, _, port = address.removeprefix("http://").rpartition(":")
    if not host or "/" in host or not port.isdigit() or not (0 if port_0 else 1) <= int(port) < 65536:
        raise ConfigError(
            f"address {address!r}",
            expected=f"HOST:PORT of a lighthouse, e.g. 203.0.113.7:{PORT}",
            mend="name the machine that runs it as the members see it, and a port that is open there",
        )
    return host, int(port)


class Lookout:
    """One connection to a lighthouse, kept open: it breaks when the lighthouse ends, be it back a moment later.

    What was asked of one that ended is lost, and torchft's call would wait for its answer to the end of its limit.
    """

    def __init__(self, address: str, limit_s: float = 5.0) -> None:
        host, port = split(address)
        self._connection = HTTPConnection(host, port, timeout=limit_s)
        self._broken = False

    def hearts(self) -> dict[str, float] | None:
        """Whose hearts it has heard: name -> seconds ago. None once it failed to answer in time, and ever after."""
        if self._broken:
            return None
        try:
            if self._connection.auto_open:
                self._connection.connect()
                self._connection.auto_open = 0  # a second connection may lead to another lighthouse
            self._connection.request("GET", "/status")
            page = self._connection.getresponse().read().decode(errors="replace")
        except (OSError, HTTPException):
            self._broken = True
            self.close()
            return None
        return {name: float(age) for name, age in _HEARD.findall(page)}

    def close(self) -> None:
        self._broken = True
        self._connection.close()


def _main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m thinwire.elastic.lighthouse", description="Run a lighthouse.")
    parser.add_argument("--bind", default=f"127.0.0.1:{PORT}", help="HOST:PORT to listen at (default: %(default)s)")
    parser.add_argument("--at-least", type=int, default=1, help="members without whom no group forms (default: 1)")
    parser.add_argument("--heartbeat-s", type=float, default=5.0, help="seconds after which a silent member is gone")
    parser.add_argument("--round-s", type=float, help="the longest round period that is expected, in seconds")
    told = parser.parse_args(arguments)
    try:
        limits = Limits(heartbeat_s=told.heartbeat_s, period_s=told.round_s)
        server = serve(told.bind, at_least=told.at_least, limits=limits, log=2)
    except ThinwireError as error:
        print(f"thinwire: {error}", file=sys.stderr)
        return 2
    with suppress(KeyboardInterrupt):
        print(server.address, flush=True)
        parent = os.getppid()
        while server.alive() and os.getppid() == parent:
            time.sleep(0.5)
    ended = not server.alive()
    server.stop()
    return 1 if ended else 0


if __name__ == "__main__":
    sys.exit(_main())
