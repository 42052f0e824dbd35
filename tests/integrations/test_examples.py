"""The programs in examples/ run as a user runs them, learn, and leave all members with one model."""

from __future__ import annotations

import difflib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
LINE = re.compile(r"^loss ([\d.]+) -> ([\d.]+), weights ([0-9a-f]{16})$", re.MULTILINE)


def check(said: str, members: int) -> None:
    found = LINE.findall(said)
    assert len(found) == members, said
    assert all(float(last) < float(first) - 0.8 for first, last, _ in found), "the loss falls by more than 0.8 nats"
    assert len({weights for *_, weights in found}) == 1, "all members end with the same bits"
    if members > 1:
        assert len({last for _, last, _ in found}) > 1, "each has read other texts"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain_loop", "accelerate_loop", "fabric", "lightning_trainer"])
def test_an_example_trains_one_model_on_its_members(members, tmp_path, name):
    check("\n".join(members(EXAMPLES / f"{name}.py", [], 3, tmp_path)), 3)


@pytest.mark.slow
def test_the_trainers_example_resumes_in_mid_round(members, tmp_path):
    """Its checkpoint of step 50 is inside a round of 20; what follows is as if nothing had been."""
    whole = members(EXAMPLES / "trainer.py", ["--out", "runs", "--every", "20"], 2, tmp_path)
    check("\n".join(whole), 2)
    for rank in range(2):
        (tmp_path / f"runs/member-{rank}/checkpoint-60").rename(tmp_path / f"last-{rank}")
        assert (tmp_path / f"runs/member-{rank}/checkpoint-50/model.safetensors").exists()
    again = members(EXAMPLES / "trainer.py", ["--out", "runs", "--every", "20", "--resume"], 2, tmp_path)
    assert [LINE.search(said)[3] for said in whole] == [LINE.search(said)[3] for said in again]


@pytest.mark.slow
def test_torchrun_starts_an_example(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [*command, str(EXAMPLES / "accelerate_loop.py")],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    check(done.stdout, 2)


def test_the_plain_loop_differs_in_three_lines_as_the_page_shows():
    before, after = ((EXAMPLES / f"{name}.py").read_text().splitlines()[1:] for name in ("one_process", "plain_loop"))
    changes = [line for line in difflib.ndiff(before, after) if line[:2] in ("+ ", "- ")]
    added = [line[2:].strip() for line in changes if line.startswith("+ ") and line[2:].strip()]
    assert len(added) == 3
    page = (ROOT / "docs/frameworks.md").read_text()
    shown = page[page.index("```diff\n") + 8 :].split("```")[0].splitlines()
    assert [line for line in shown if not line.startswith("@@")] == [
        line
        for line in difflib.unified_diff(before[1:], after[1:], lineterm="", n=2)
        if line[:2] not in ("--", "++", "@@")
    ]


def test_every_text_is_one_members(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    task = pytest.importorskip("task")
    parts = [set(task.part(rank, 4).indices) for rank in range(4)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == task.TEXTS
    uneven = [len(task.part(rank, 3)) for rank in range(3)]
    assert uneven == [task.TEXTS // 3] * 3, "parts of one length"
