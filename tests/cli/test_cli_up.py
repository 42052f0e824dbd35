"""Runs that others join, as a person types them: real processes on loopback."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from thinwire.elastic.journal import read
from thinwire.elastic.proof import prove

pytest.importorskip("torchft", reason="a run that others join needs the extra 'elastic'")
pytest.importorskip("uvicorn", reason="a run that others join needs the extra 'elastic'")

SRC = Path(__file__).parents[2] / "src"
SMALL = [
    "--task.size",
    "0.2M",
    "--context",
    "8",
    "--batch-size",
    "2",
    "--validation-windows",
    "2",
    "--lr",
    "0.001",
    "--every",
    "10",
]
TOKEN = "sesame"


class Started:
    """A `thinwire` command under way."""

    def __init__(self, folder: Path, *words: object) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "RANK"}
        environment |= {"PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
        self.said = folder / f"said-{time.monotonic_ns()}.txt"
        command = [sys.executable, "-m", "thinwire", *map(str, words)]
        with self.said.open("w") as output:
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def members(self) -> list[psutil.Process]:
        """Processes of its members."""
        return [
            child for child in psutil.Process(self.process.pid).children() if "--as-member" in " ".join(child.cmdline())
        ]

    def ends(self, limit_s: float = 60.0) -> int:
        """Its exit code."""
        return self.process.wait(limit_s)

    def asked(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)


@pytest.fixture
def start(tmp_path):
    """start("up", ...): none of them, nor what they started, outlives the test."""
    started = []

    def begin(*words: object) -> Started:
        started.append(Started(tmp_path, *words))
        return started[-1]

    yield begin
    for each in started:
        try:
            family = psutil.Process(each.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            family = []
        if each.process.poll() is None:
            each.process.kill()
            each.process.wait()
        for one in family:
            if one.is_running():
                one.kill()


def until(found, limit_s: float = 60.0):
    """What `found` returns once that is true."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        value = found()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {limit_s} s")


def up(start, tmp_path, *words: object) -> tuple[Started, str]:
    """A run, and the address that others join at."""
    text = tmp_path / "text.txt"
    text.write_text("how much wood would a woodchuck chuck if a woodchuck could chuck wood? " * 12)
    run = start("up", *SMALL, "--task.data", text, "--port", 0, "--token", TOKEN, "--out", tmp_path / "out", *words)
    line = until(lambda: [line for line in run.said.read_text().splitlines() if "thinwire join " in line])[0]
    return run, line.split()[2]


def status(call, address):
    try:
        return json.loads(call("status", address, "--token", TOKEN, "--json")[1])
    except Exception:
        return None


def names(call, address):
    view = status(call, address)
    return () if view is None else tuple(row["name"] for row in view["members"])


def ended(run: Started) -> str:
    return run.said.read_text()


@pytest.mark.slow
def test_members_come_crash_and_leave(start, call, tmp_path):
    out = tmp_path / "out"
    run, address = up(start, tmp_path, "--at-least", 2, "--steps", 10**6, "--eval-every", 500)
    first = until(lambda: names(call, address) or status(call, address))
    assert first
    assert status(call, address)["run"]["step"] == 0, "nobody begins alone"
    crashes = start("join", address, "--token", TOKEN, "--out", out)
    until(lambda: len(names(call, address)) == 2 and status(call, address)["run"]["step"] > 0)
    leaves = start("join", address, "--token", TOKEN, "--out", out)
    three = until(lambda: len(names(call, address)) == 3 and names(call, address))

    (victim,) = crashes.members()
    victim.kill()
    lost = next(name for name in three if f"-{victim.pid}-" in name)
    until(lambda: lost not in names(call, address) and len(names(call, address)) == 3)
    assert "was killed by signal 9; starting it again in 1 s" in ended(crashes)

    (leaver,) = leaves.members()
    leaves.asked()
    assert leaves.ends() == 130, ended(leaves)
    gone = next(name for name in three if f"-{leaver.pid}-" in name)
    until(lambda: gone not in names(call, address))
    here = status(call, address)["run"]["step"]
    view = until(lambda: (now := status(call, address))["run"]["step"] > here and now)
    assert len(view["members"]) == 2
    assert all(row["answers"] for row in view["members"])
    told = call("status", address, "--token", TOKEN)[1]
    assert view["members"][0]["name"] in told

    crashes.asked()
    assert crashes.ends() == 130, ended(crashes)
    run.asked()
    assert run.ends() == 130, ended(run)
    code, said, _ = call("ledger", out)
    assert code == 0
    assert "each exactly once" in said
    proof = prove(read(out))
    assert proof.epochs >= 1
    assert proof.wrong == ()
    assert proof.void == 0
    healed = [line for lines in read(out).values() for line in lines if line["event"] == "healed"]
    assert len(healed) >= 2, "two newcomers were given the state"
    joined = [line for lines in read(out).values() for line in lines if line["event"] == "joined" and line["step"]]
    fetched = [line for line in joined if line["beside_bytes"]]
    assert fetched, "and fetched it beside the run"
    assert all(0 < line["beside_step"] <= line["step"] and line["beside_seconds"] > 0 for line in fetched)
