"""A switch that delays: for kernels without netem, and run as a script inside the lab's switch namespace.

Every frame that comes in at a port is held for the delay and then leaves at the port where its destination lives, or
at all others while that is not known. Order is kept. The delay counts from the kernel's own timestamp of arrival,
so that the time this process waited for a processor is part of the delay and not on top of it. A frame that finds
the port's queue full is dropped, as a router would.

    python -I -S switch.py 0.040 p0 p1 p2        prints "ready" when all ports are open
"""

from __future__ import annotations

import select
import socket
import struct
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field

# Linux numbers that the socket module has no names for.
_ALL_PROTOCOLS = 0x0003
_SOL_PACKET, _PACKET_VNET_HDR, _PACKET_IGNORE_OUTGOING = 263, 15, 23
_SO_TIMESTAMPNS, _SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 35, 32, 33
_TIMESTAMP = struct.Struct("@ll")
_VNET_BYTES = 10  # travels before each frame: says that the checksum is still to be filled in, which veth leaves undone
_BUFFER_BYTES = 64 << 20
_LARGEST_FRAME = 1 << 16
_TURN_FRAMES = 64  # from one port before the others have their turn


@dataclass
class Switch:
    """Ports, who lives where, and the frames that wait: (due in seconds, port it came from, frame)."""

    ports: list[socket.socket]
    delay_s: float
    homes: dict[bytes, socket.socket] = field(default_factory=dict)
    waiting: deque[tuple[float, socket.socket, bytes]] = field(default_factory=deque)

    def serve(self) -> None:
        """Until the process is ended."""
        while True:
            idle_s = max(0.0, self.waiting[0][0] - time.monotonic()) if self.waiting else None
            readable, _, _ = select.select(self.ports, [], [], idle_s)
            for port in readable:
                self._take_in(port)
            self._send_due()

    def _take_in(self, port: socket.socket) -> None:
        with suppress(OSError):  # EAGAIN: no more; ENETDOWN: the cable was pulled
            for _ in range(_TURN_FRAMES):
                frame, notes, _flags, _address = port.recvmsg(_LARGEST_FRAME + _VNET_BYTES, 64)
                self.homes[frame[_VNET_BYTES + 6 : _VNET_BYTES + 12]] = port
                self.waiting.append((time.monotonic() + self.delay_s - self._age_s(notes), port, frame))

    def _age_s(self, notes: list[tuple[int, int, bytes]]) -> float:
        """Since the kernel saw the frame; 0 to the whole delay, whatever the wall clock does meanwhile."""
        seconds, nanoseconds = _TIMESTAMP.unpack(notes[0][2])
        age_s: float = time.time() - seconds - nanoseconds * 1e-9
        return min(max(0.0, age_s), self.delay_s)

    def _send_due(self) -> None:
        while self.waiting and self.waiting[0][0] <= time.monotonic():
            _, origin, frame = self.waiting.popleft()
            home = self.homes.get(frame[_VNET_BYTES : _VNET_BYTES + 6])
            for port in [home] if home else self.ports:
                if port is not origin:
                    with suppress(OSError):  # ENOBUFS: the queue is full; ENETDOWN as above
                        port.send(frame)


def open_port(name: str) -> socket.socket:
    """A raw socket on an interface, with timestamps and room for bursts."""
    port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL_PROTOCOLS))
    port.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    port.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    port.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    port.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _BUFFER_BYTES)
    port.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
    port.bind((name, _ALL_PROTOCOLS))
    port.setblocking(False)
    return port


def main(delay_s: float, names: list[str]) -> None:
    """Open the ports, say so, serve."""
    switch = Switch([open_port(name) for name in names], delay_s)
    print("ready", flush=True)
    switch.serve()


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2:])
