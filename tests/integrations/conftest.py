"""Members that run programs, forked off one warm process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent

#: (program, arguments, number of members, folder) -> what each member printed
Members = Callable[..., list[str]]


@pytest.fixture(scope="session")
def members() -> Iterator[Members]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = f"{HERE.parents[1] / 'src'}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    command = [sys.executable, str(HERE / "warm.py")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as warm:
        assert warm.stdin is not None
        assert warm.stdout is not None

        def run(program: Path, arguments: list[str], number: int, folder: Path) -> list[str]:
            job = {"program": str(program), "arguments": arguments, "members": number, "folder": str(folder)}
            warm.stdin.write(json.dumps(job) + "\n")
            warm.stdin.flush()
            codes = json.loads(warm.stdout.readline())
            said = [(folder / f"member-{rank}.log").read_text() for rank in range(number)]
            assert codes == [0] * number, "\n".join(said)
            return said

        yield run
        warm.stdin.close()
