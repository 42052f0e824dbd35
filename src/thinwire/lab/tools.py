"""`ip` and `tc`, and what this machine can do with them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from thinwire.errors import ConfigError
from thinwire.lab.sweep import claim, sweep

_LIMIT_S = 30.0


@dataclass(frozen=True)
class Abilities:
    """What the lab finds on this machine.

    obstacle  why no lab can be built; empty if it can
    mend      what would remove the obstacle
    netem     whether the kernel can delay frames; without it a process of ours does (docs/lab.md)
    """

    obstacle: str = ""
    mend: str = ""
    netem: bool = False


def call(words: Sequence[str], lines: Sequence[str] = ()) -> str:
    """Run a system tool, with these lines on its input.

    returns  its output
    raises   ConfigError with the tool's own words
    """
    text = "".join(f"{line}\n" for line in lines)
    done = subprocess.run(list(words), input=text, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    if done.returncode:
        told = "".join(f"\n      {line}" for line in lines)
        raise ConfigError(
            f"lab: `{' '.join(words)}` failed: {done.stderr.strip() or f'exit code {done.returncode}'}{told}",
            expected="root and a Linux kernel with network namespaces, veth pairs, bridges and tbf",
            mend="run `thinwire doctor` to see which of them this machine has",
        )
    return done.stdout


def ip(space: str, *lines: str) -> None:
    """`ip` in a network namespace, a command a line."""
    call(["ip", "-n", space, "-batch", "-"], lines)


def tc(space: str, *lines: str) -> None:
    """`tc` in a network namespace, a command a line."""
    call(["tc", "-n", space, "-batch", "-"], lines)


def abilities() -> Abilities:
    """Found out by trying, in a scratch namespace that is removed again; nothing else on the machine is touched."""
    if sys.platform != "linux":
        return Abilities(f"the lab needs Linux, this is {sys.platform}", "use a Linux machine or virtual machine")
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return Abilities(f"{' and '.join(missing)} not found", "install iproute2 (apt install iproute2)")
    if os.geteuid() != 0:
        return Abilities(f"the lab needs root, this is user {os.geteuid()}", "run it under sudo")
    try:
        return _try_out()
    except ConfigError as error:
        return Abilities(
            error.wrong.removeprefix("lab: "),
            "run on a machine (not in a restricted container) whose kernel has these parts",
        )


def _try_out() -> Abilities:
    with claim(None) as (lab, _):
        space = f"{lab}-sw"
        try:
            call(["ip", "netns", "add", space])
            ip(space, "link add name one type veth peer name two", "link add name sw type bridge")
            tc(space, "qdisc add dev one root tbf rate 1mbit burst 10k limit 100k")
            return Abilities(netem=_has_netem(space))
        finally:
            sweep(lab)


def _has_netem(space: str) -> bool:
    try:
        tc(space, "qdisc add dev two root netem delay 10ms")
    except ConfigError:
        return False
    return True


def require() -> Abilities:
    """What the machine can do.

    raises  ConfigError where it cannot run a lab
    """
    found = abilities()
    if found.obstacle:
        raise ConfigError(
            f"lab: {found.obstacle}",
            expected="root on Linux with iproute2 (the tools ip and tc) and network namespaces",
            mend=found.mend,
        )
    return found
