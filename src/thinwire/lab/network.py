"""Hosts and links: network namespaces around a switch, each link limited in both directions.

    host 0: eth0 ──(tbf: up)──────── p0 ┐
                 ────────(tbf: down)──  │
    host 1: eth0 ──────────────────── p1 ├ bridge, or the delaying switch
    ...                                  ┘

Real sockets, the kernel's own TCP, real queues. Nothing here is connected to the machine's own network.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from thinwire.errors import ConfigError
from thinwire.lab import sweep, switch
from thinwire.lab.spec import HEADER_BYTES, LabSpec, token_bucket
from thinwire.lab.tools import Abilities, call, ip, require, tc

_WATCHDOG_LIMIT_S = 30.0
_MOST_DELAYED_FRAMES = 1_000_000


@dataclass(frozen=True)
class Counters:
    """What the kernel counted at a host's interface, in whole Ethernet frames.

    dropped_frames  lost to full queues on this host's link, in either direction
    """

    sent_bytes: int = 0
    sent_frames: int = 0
    received_bytes: int = 0
    received_frames: int = 0
    dropped_frames: int = 0

    def __sub__(self, before: Counters) -> Counters:
        return Counters(*(getattr(self, name) - getattr(before, name) for name in self.__dataclass_fields__))

    @property
    def sent_content_bytes(self) -> int:
        """Without 66 header bytes a frame: the TCP stream, and nothing for pure acknowledgements."""
        return self.sent_bytes - HEADER_BYTES * self.sent_frames

    @property
    def received_content_bytes(self) -> int:
        """The same for what came in."""
        return self.received_bytes - HEADER_BYTES * self.received_frames


class Lab:
    """Hosts for as long as the block lasts.

        with Lab(LabSpec(2, rate_bits_per_s=20e6)) as lab:
            process = lab.start(1, ["python", "script.py", lab.address(0)])

    When it ends, whatever still runs in the lab is killed; when this process is killed, too.
    """

    def __init__(self, spec: LabSpec) -> None:
        self.spec = spec
        self.name = ""
        self._subnet = 0
        self._delays_in_kernel = False
        self._started: list[subprocess.Popen[bytes]] = []
        self._exit = ExitStack()

    def __enter__(self) -> Lab:
        found = require()
        with ExitStack() as undo:
            try:
                self.name, self._subnet = undo.enter_context(sweep.claim(self.spec.subnet))
            except LookupError as error:
                raise _taken(self.spec.subnet, error) from error
            undo.callback(self._reap)
            undo.callback(_watchdog(self.name))
            self._build(found)
            self._exit = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    @property
    def ranks(self) -> range:
        """Of the hosts."""
        return range(self.spec.hosts)

    def address(self, rank: int) -> str:
        """A host's IPv4 address."""
        return f"10.77.{self._subnet}.{rank + 1}"

    def start(
        self,
        rank: int,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Run a command on a host, in a session of its own.

        environment  added to this process's own
        """
        return self._run_in(self._host(rank), command, environment or {}, stdout, stderr)

    def counters(self) -> tuple[Counters, ...]:
        """Of each host's interface, since the lab was built."""
        return tuple(self._count(rank) for rank in self.ranks)

    def cut(self, rank: int) -> None:
        """Pull a host's cable out: nothing is refused, nothing arrives."""
        ip(self._switch, f"link set p{rank} down")

    def mend(self, rank: int) -> None:
        """Put it in again."""
        ip(self._switch, f"link set p{rank} up")

    def throttle(self, rank: int, rate_bits_per_s: float | None) -> None:
        """Limit a host's line to another rate, both ways; None: to what the lab was built with.

        raises  ConfigError where the lab was built without rates in both directions: there is no bucket to change
        """
        if math.inf in (self.spec.up_bits_per_s, self.spec.down_bits_per_s):
            raise ConfigError(
                f"lab: host {rank} throttled to {rate_bits_per_s} bit/s in a lab without rates",
                expected="a lab whose lines are limited, so that a limit can be changed",
                mend="build it with a rate, however high: LabSpec(hosts, rate_bits_per_s=1e9)",
            )
        for space, device, usual in (
            (self._host(rank), "eth0", self.spec.up_bits_per_s),
            (self._switch, f"p{rank}", self.spec.down_bits_per_s),
        ):
            place = "parent 1:1" if device != "eth0" and self._delays_in_kernel else "root"
            bucket = self._bucket(usual if rate_bits_per_s is None else rate_bits_per_s)
            tc(space, f"qdisc replace dev {device} {place} {bucket}")

    def _run_in(
        self,
        space: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        stdout: int | IO[bytes] | None,
        stderr: int | IO[bytes] | None,
    ) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            ["ip", "netns", "exec", space, *command],
            env={**os.environ, **environment, sweep.MARK: self.name},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def _reap(self) -> None:
        """Collect what the watchdog ended."""
        for process in self._started:
            process.wait()

    def _host(self, rank: int) -> str:
        return f"{self.name}-h{rank}"

    @property
    def _switch(self) -> str:
        return f"{self.name}-sw"

    def _build(self, found: Abilities) -> None:
        in_kernel = found.netem or not self.spec.delay_s
        self._delays_in_kernel = found.netem and self.spec.delay_s > 0
        self._add_namespace(self._switch)
        if in_kernel:
            ip(
                self._switch,
                "link add name sw type bridge",
                f"link set sw mtu {self.spec.mtu} addrgenmode none up",
            )
        for rank in self.ranks:
            self._add_host(rank)
            self._limit(rank, delay_s=self.spec.delay_s if in_kernel else 0.0)
            ip(self._switch, *([f"link set p{rank} master sw"] if in_kernel else []), f"link set p{rank} up")
            ip(self._host(rank), "link set eth0 up", f"route change {self._route(rank)} congctl cubic")
        if not in_kernel:
            self._start_switch()

    def _add_namespace(self, name: str) -> None:
        call(["ip", "netns", "add", name])
        ip(name, "link set lo up")

    def _add_host(self, rank: int) -> None:
        """A host and its cable. One segment a packet (no segmentation offload): frames are counted as they are sent."""
        mtu, port = self.spec.mtu, f"p{rank}"
        self._add_namespace(self._host(rank))
        ip(
            self._host(rank),
            f"link add eth0 mtu {mtu} type veth peer name {port} mtu {mtu} netns {self._switch}",
            "link set eth0 addrgenmode none",
            "link set eth0 gso_max_segs 1",
            f"address add {self.address(rank)}/24 dev eth0",
        )
        ip(self._switch, f"link set {port} addrgenmode none", f"link set {port} gso_max_segs 1")

    def _limit(self, rank: int, *, delay_s: float) -> None:
        """Rates in both directions; the kernel's delay, where it makes one, before the queue of the way down."""
        place = "root"
        if delay_s:
            held = f"netem delay {round(delay_s * 1e6)}us limit {_MOST_DELAYED_FRAMES}"
            tc(self._switch, f"qdisc add dev p{rank} root handle 1: {held}")
            place = "parent 1:1"
        if self.spec.up_bits_per_s < math.inf:
            tc(self._host(rank), f"qdisc add dev eth0 root {self._bucket(self.spec.up_bits_per_s)}")
        if self.spec.down_bits_per_s < math.inf:
            tc(self._switch, f"qdisc add dev p{rank} {place} {self._bucket(self.spec.down_bits_per_s)}")

    def _bucket(self, rate_bits_per_s: float) -> str:
        return token_bucket(rate_bits_per_s, mtu=self.spec.mtu, queue_s=self.spec.queue_s)

    def _route(self, rank: int) -> str:
        return f"10.77.{self._subnet}.0/24 dev eth0 src {self.address(rank)}"

    def _start_switch(self) -> None:
        ports = [f"p{rank}" for rank in self.ranks]
        command = [*_script(switch.__file__), str(self.spec.delay_s), *ports]
        process = self._run_in(self._switch, command, {}, subprocess.PIPE, subprocess.STDOUT)
        assert process.stdout is not None
        with process.stdout as told:
            first = told.readline()
            if first != b"ready\n":
                raise ConfigError(
                    f"lab: the delaying switch did not start: {(first + told.read()).decode(errors='replace').strip()}",
                    expected="raw packet sockets (AF_PACKET), or a kernel with netem",
                    mend="load netem (modprobe sch_netem), or leave the delay out",
                )

    def _count(self, rank: int) -> Counters:
        link = json.loads(call(["ip", "-n", self._host(rank), "-s", "-j", "link", "show", "eth0"]))[0]
        sent, received = link["stats64"]["tx"], link["stats64"]["rx"]
        dropped = self._dropped(self._host(rank), "eth0") + self._dropped(self._switch, f"p{rank}")
        return Counters(sent["bytes"], sent["packets"], received["bytes"], received["packets"], dropped)

    def _dropped(self, space: str, device: str) -> int:
        """By the queues of an interface; a queue in a queue counts in its parent already."""
        queues: list[dict[str, Any]] = json.loads(call(["tc", "-n", space, "-s", "-j", "qdisc", "show", "dev", device]))
        return sum(int(queue.get("drops", 0)) for queue in queues if queue.get("root"))


def _taken(subnet: int | None, owner: LookupError) -> ConfigError:
    return ConfigError(
        f"lab: subnet {subnet}: 10.77.{subnet}.0/24 is in use by lab {owner}",
        expected="addresses no living lab has",
        mend="leave the subnet out and a free one is taken",
    )


def _watchdog(lab: str) -> Callable[[], None]:
    """Start it.

    returns  what tells it that the lab is over, and waits until it has cleaned up
    """
    process = subprocess.Popen(
        [*_script(sweep.__file__), lab], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
    )

    def over() -> None:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(_WATCHDOG_LIMIT_S)

    return over


def _script(path: str) -> list[str]:
    """Words that run one of our files alone: without thinwire, torch or anybody's site packages, so it starts fast."""
    return [sys.executable, "-I", "-S", str(Path(path))]
