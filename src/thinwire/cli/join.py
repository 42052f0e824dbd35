"""`thinwire join`: be a member of a run that is there."""

from __future__ import annotations

import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from thinwire.cli.uplink import with_uplink
from thinwire.config import dump, loads
from thinwire.elastic.registry import get
from thinwire.errors import ConfigError, LinkError
from thinwire.train.launch import write_config
from thinwire.train.member import Order, be_member
from thinwire.train.supervise import look_after
from thinwire.version import __version__


@click.command()
@click.argument("address", metavar="HOST:PORT", required=False)
@click.option("--token", metavar="T", help="As `thinwire up` printed it.")
@click.option("--bind", metavar="HOST", help="This machine, as others see it; left out: found.")
@click.option("--port", default=0, help="Where others may ask this member; 0 takes a free one.")
@click.option("--out", metavar="FOLDER", help="Where to write; left out: as the run says.")
@click.option("--members-here", default=1, show_default=True, metavar="K", help="Members on this machine.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Where this machine computes.")
@with_uplink
@click.option("--json", "as_json", is_flag=True, help="JSON lines on standard output instead of a progress line.")
@click.option("--as-member", is_flag=True, hidden=True)
def join(
    address: str | None, token: str | None, bind: str | None, port: int, out: str | None, members_here: int,
    device: str | None, uplink: str, as_json: bool, as_member: bool,
) -> int:  # fmt: skip
    """Be a member of a run that others started.

    Any member's address will do. The run's configuration comes from there; its state
    from the members, once this one is among them. Ctrl-C leaves after the round,
    twice at once. A member that crashes is started again.

    \b
    thinwire join 203.0.113.7:29400 --token T
    """
    if as_member:
        return be_member(sys.stdin)
    if address is None or token is None:
        raise ConfigError(
            "thinwire join without an address" if address is None else "thinwire join without --token",
            expected="thinwire join HOST:PORT --token T",
            mend="take the line that `thinwire up` printed",
        )
    if members_here < 1:
        raise ConfigError(f"--members-here {members_here}", expected="1 or more", mend="leave it out for 1")
    found = get(address, "/run", token)
    _check(found, address)
    run = loads(found["toml"])
    run = replace(run, out=out or run.out, device=device or run.device)  # type: ignore[arg-type]
    write_config(run)
    host = bind or _towards(address)
    known = [address, *found["members"].values()]

    def order(place: int, life: int) -> Order | None:
        now = _ask(known, token) if life or place else found
        if now["ended"]:
            print(f"thinwire: the run has ended: {now['ended']}", file=sys.stderr)
            return None
        return Order(
            dump(run), now["id"], token, "join", host, 0 if place else port, list(now["lighthouses"]),
            now["at_least"], now["epochs"], begun=now["begun"] or now["step"] > 0,
            shows="nothing" if place else "json" if as_json else "terminal", registries=_holders(now, address),
            uplink=uplink, isolate=bool(now.get("isolate")),
        )  # fmt: skip

    return look_after(members_here, order, Path(run.out) / "logs")


def _holders(found: dict[str, Any], address: str) -> list[str]:
    """Services of members that have a state to show; none before the first step."""
    if not found["step"]:
        return []
    return list(dict.fromkeys(each for each in found["members"].values() if each)) or [address]


def _check(found: dict[str, Any], address: str) -> None:
    if found.get("version") != __version__:
        raise ConfigError(
            f"the run at {address} is of thinwire {found.get('version')}, here is {__version__}",
            expected="one version on all members: their results must be the same bits",
            mend=f"pip install 'thinwire=={found.get('version')}'",
        )


def _ask(known: list[str], token: str) -> dict[str, Any]:
    """The run, as the first member says that answers; whom else it knows is remembered.

    raises  LinkError if nobody does
    """
    errors = []
    for address in dict.fromkeys(each for each in known if each):
        try:
            found = get(address, "/run", token, limit_s=5.0)
        except (LinkError, ConfigError) as error:
            errors.append(error)
            continue
        known.extend(each for each in found["members"].values() if each not in known)
        return found
    raise errors[0]


def _towards(address: str) -> str:
    """This machine's address on the way to another one; nothing is sent."""
    host, _, port = address.rpartition(":")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
            way.connect((host, int(port)))
            found: str = way.getsockname()[0]
            return found
    except OSError as error:
        raise ConfigError(
            f"no way from here to {host}: {error.strerror or error}",
            expected="an address that can be reached",
            mend="see to the network; --bind names this machine's address by hand",
        ) from error
