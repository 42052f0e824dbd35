"""The watch over torch.distributed: real sockets, and in the lab a line that is slow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from thinwire.errors import ConfigError
from thinwire.lab import Lab, LabSpec, abilities, torchrun_environment

MEMBER = [sys.executable, str(Path(__file__).with_name("rounds_member.py"))]
THREADS = {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def _root() -> None:
    if obstacle := abilities().obstacle:
        pytest.skip(f"no lab on this machine: {obstacle}")


def ended(processes, out):
    said = [process.communicate(timeout=90)[0] for process in processes]
    for process, each in zip(processes, said, strict=True):
        assert process.returncode == 0, each.decode()
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(len(processes))]


@pytest.mark.slow
def test_the_torch_link_measures_every_peer_and_all_reach_the_same(tmp_path):
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(3):
        environment = {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "3",
            "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        }  # fmt: skip
        processes.append(
            subprocess.Popen(
                [*MEMBER, str(tmp_path), "4"], env={**os.environ, **THREADS, **environment},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
    found = ended(processes, tmp_path)
    assert found[0] == found[1] == found[2]
    assert found[0]["measured"] == {"0": ["1", "2"], "1": ["0", "2"], "2": ["0", "1"]}


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.usefixtures("_root")
def test_a_line_that_is_slow_is_named_by_all(tmp_path):
    """Five hosts at 40 Mbit/s, one of them at 4: slow both ways. Of four, half of all lines would be slow with it."""
    spec = LabSpec(5, rate_bits_per_s=40e6)
    with ExitStack() as stack:
        lab = stack.enter_context(Lab(spec))
        lab.throttle(1, 4e6)
        processes = [
            lab.start(
                rank, [*MEMBER, str(tmp_path), "8"],
                environment={**THREADS, **torchrun_environment(spec, rank, lab.address(0))},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
            for rank in lab.ranks
        ]  # fmt: skip
        found = ended(processes, tmp_path)
    assert all(each == found[0] for each in found)
    past = found[0]["past"]
    assert all("member 1 " in each for findings in past for each in findings), "nobody else is blamed"
    named = [
        any(each.startswith(("slow sender: member 1 ", "slow receiver: member 1 ")) for each in one) for one in past
    ]
    assert sum(named[1:]) >= len(named) // 2, "a busy machine may hide it for a call"


@pytest.mark.root
@pytest.mark.usefixtures("_root")
def test_what_has_no_limit_cannot_be_throttled():
    with Lab(LabSpec(1)) as lab, pytest.raises(ConfigError, match="throttled to 1000 bit/s in a lab without rates"):
        lab.throttle(0, 1000)
