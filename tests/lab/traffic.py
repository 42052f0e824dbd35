"""Plain TCP between hosts of a lab, with nothing but the standard library. Run as a script, prints JSON.

python traffic.py sink ADDRESS PORT          receive one stream; prints {"bytes":, "elapsed_s":}
python traffic.py send ADDRESS PORT BYTES    send one stream
python traffic.py echo ADDRESS PORT          send back what comes, until the other side closes
python traffic.py ping ADDRESS PORT COUNT    prints {"median_s":}
"""

from __future__ import annotations

import json
import socket
import statistics
import sys
import time
from collections.abc import Callable


def accepted(address: str, port: int) -> socket.socket:
    server = socket.create_server((address, port))
    connection, _ = server.accept()
    return connection


def connected(address: str, port: int) -> socket.socket:
    """The other side may still be starting, or its cable have been put in a moment ago."""
    limit = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection((address, port), timeout=20)
        except OSError:
            if time.monotonic() > limit:
                raise
            time.sleep(0.02)


def sink(connection: socket.socket) -> dict[str, float]:
    """From the first byte on: what came with it has not been waited for."""
    buffer = bytearray(1 << 16)
    first = connection.recv_into(buffer)
    started, got = time.monotonic(), 0
    while size := connection.recv_into(buffer):
        got += size
    return {
        "bytes": first + got,
        "elapsed_s": time.monotonic() - started,
        "rate": 8 * got / (time.monotonic() - started),
    }


def send(connection: socket.socket, count: int) -> dict[str, float]:
    connection.sendall(bytes(count))
    connection.shutdown(socket.SHUT_WR)
    connection.recv(1)  # until the other side has everything and closes
    return {"bytes": count}


def echo(connection: socket.socket) -> dict[str, float]:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while block := connection.recv(1 << 16):
        connection.sendall(block)
    return {}


def ping(connection: socket.socket, count: int) -> dict[str, float]:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    times = []
    for _ in range(count):
        started = time.monotonic()
        connection.sendall(b"p")
        connection.recv(1)
        times.append(time.monotonic() - started)
    return {"median_s": statistics.median(times), "least_s": min(times), "most_s": max(times)}


ROLES: dict[str, Callable[..., dict[str, float]]] = {"sink": sink, "send": send, "echo": echo, "ping": ping}

if __name__ == "__main__":
    role, address, port, *numbers = sys.argv[1:]
    connection = (accepted if role in ("sink", "echo") else connected)(address, int(port))
    print(json.dumps(ROLES[role](connection, *map(int, numbers))))
