"""The examples of islands, under torchrun as their users start them: four processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINE = re.compile(
    r"member (\d) of island (\d): loss (\S+) -> (\S+), validation (\S+), (\d+) rounds, sent across (\S+) bytes"
)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["fsdp_island.py", "ddp_island.py --zero"])
def test_an_example_of_islands_trains_one_model(command):
    script, *options = command.split()
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4",
         str(ROOT / "examples" / script), "--steps", "6", "--every", "3", *options],
        capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = sorted(LINE.findall(done.stdout))
    assert [(rank, island) for rank, island, *_ in found] == [("0", "0"), ("1", "0"), ("2", "1"), ("3", "1")]
    for _, _, first, last, _, rounds, sent in found:
        assert float(last) < float(first) - 0.5
        assert rounds == "2"
        assert 1.9 < float(sent) < 2.1, "four bytes of every second parameter"
    assert len({validation for _, _, _, _, validation, *_ in found}) == 1
