"""Can that host be reached at all? Name, route, port, one after the other, and what to do at the first that fails.

A plain TCP connection is opened and closed again: a diagnosis, not a transport. What travels for real goes over
torch.distributed (pair.py).
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from dataclasses import dataclass

from thinwire.errors import ConfigError, LinkError


@dataclass(frozen=True)
class Route:
    """How the other host was reached.

    name       as it was asked for
    remote     the IPv4 address the name stands for
    local      this host's own address on the way there
    """

    name: str
    port: int
    remote: str
    local: str


def parse_address(text: str) -> tuple[str, int]:
    """HOST:PORT as it is typed.

    raises  ConfigError
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"doctor: {text!r} is not an address",
            expected="HOST:PORT, with a port from 1 to 65535",
            mend="for example `thinwire doctor 203.0.113.7:29500`, while the other host runs "
            "`thinwire doctor --listen 29500`",
        )
    return host, int(port)


def reach(host: str, port: int, *, limit_s: float = 10.0) -> Route:
    """Connect once and hang up.

    raises  ConfigError if nobody knows the name, LinkError that says how the connection failed and what to do
    """
    remote = resolve(host)
    try:
        with socket.create_connection((remote, port), timeout=limit_s) as connection:
            return Route(host, port, remote, connection.getsockname()[0])
    except OSError as error:
        raise unreachable(host, remote, port, error, limit_s=limit_s) from error


def resolve(host: str) -> str:
    """The IPv4 address of a name.

    raises  ConfigError if there is none
    """
    try:
        return str(socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(
            f"doctor: the name {host!r} is unknown here: {error}",
            expected="a name this host can resolve to an IPv4 address, or the address itself",
            mend="check the spelling; try the other host's IPv4 address (`ip -4 addr` there shows it), "
            "or add the name to /etc/hosts",
        ) from error


def unreachable(host: str, remote: str, port: int, error: OSError, *, limit_s: float) -> LinkError:
    """The precise reason in words, and its cure."""
    where = f"{host}:{port}" if host == remote else f"{host}:{port} ({remote})"
    if isinstance(error, TimeoutError):
        return LinkError(
            f"doctor: {where} did not answer within {limit_s:g} s: the packets disappear on the way",
            expected="an answer, be it a refusal",
            mend=f"1. a firewall drops them: open TCP port {port} on that host (ufw allow {port}/tcp) and in the "
            f"cloud's security group\n            2. it is behind NAT{_private(remote)}: let the machine with the open "
            "port be rank 0, forward the port on its router, or join both by a VPN\n"
            "            3. it is switched off: try `ping`",
        )
    if error.errno == errno.ECONNREFUSED:
        return LinkError(
            f"doctor: {where} refused the connection: the host is there, and nothing listens on port {port}",
            expected=f"`thinwire doctor --listen {port}` running on that host",
            mend="start it there first; if it runs, port or host is another one, or a firewall refuses for it",
        )
    if error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH):
        return LinkError(
            f"doctor: there is no route to {where}: {error.strerror}",
            expected="a network that both hosts are on, or a router between them",
            mend="check that this host is online (`ip route`), that the address is on a network it can see and not "
            f"the other host's private one{_private(remote)}, and that the VPN, if there is one, is up on both",
        )
    return LinkError(
        f"doctor: connecting to {where} failed: {error.strerror or error}",
        expected="an open TCP port",
        mend="check address and port, and the firewalls on both hosts",
    )


def _private(address: str) -> str:
    return f" ({address} is a private address, valid inside its own network only)" if _is_private(address) else ""


def _is_private(address: str) -> bool:
    found = ipaddress.ip_address(address)
    return found.is_private and not found.is_loopback
