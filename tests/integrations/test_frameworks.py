"""Frameworks give the plain loop's bits, resume to the bit, evaluate what all agree on, and refuse what cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from small import same

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).with_name("member.py")


@pytest.fixture
def run(members, tmp_path):
    """A task of member.py on members: what each returned."""

    def task(name: str, number: int = 2) -> list[Any]:
        members(PROGRAM, [name, str(tmp_path)], number, tmp_path)
        return [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(number)]

    return task


@pytest.mark.parametrize("framework", ["trainer", "accelerate", "fabric", "lightning"])
def test_a_framework_gives_the_bits_of_the_plain_loop(run, framework):
    """With accumulation, a clip that bites, a schedule, unlike batches; gradients, deltas, fragments under way."""
    found = run(f"{framework}_equals_plain_loop")
    for name in found[0]:
        for rank, pairs in enumerate(found):
            framed, plain = pairs[name]
            assert same(framed, plain), f"{name} on member {rank}"
    for name in {"diloco", "ddp"} & set(found[0]):
        assert same(found[0][name][0], found[1][name][0]), f"{name}: members differ"


@pytest.mark.parametrize("framework", ["trainer", "accelerate", "lightning"])
def test_a_run_resumes_to_the_bit(run, framework):
    for member in run(f"{framework}_resumes"):
        for name, (whole, *others) in member.items():
            for resumed in others:
                assert same(whole, resumed), name


@pytest.mark.parametrize("framework", ["trainer", "lightning"])
def test_all_evaluate_the_consensus_and_end_with_it(run, framework):
    """After 12 steps of rounds of 5 the live models differ: two local steps are given up."""
    first, second = run(f"{framework}_evaluates")
    assert len(first["losses"]) == 4
    assert first["losses"] == second["losses"]
    assert len(set(first["losses"])) == 3, "evaluated at steps 3, 6, 9 and 12: before, after, after the first round"
    assert same(first["weights"], second["weights"])


def test_the_trainer_refuses_what_cannot_be(run):
    first, second = run("trainer_refuses")
    for said in (first, second):
        assert "load_best_model_at_end=True\n  expected  False" in said["best"]
        assert "members 0 and 1 write their checkpoints into one folder" in said["folder"]
        assert "members disagree on training.steps: member" in said["steps"]
        assert "thinwire.pt belongs to other weights than the Trainer has loaded" in said["weights"]
        assert "checkpoint-6/thinwire.pt is missing" in said["missing"]


def test_the_trainer_is_left_as_it_was(run):
    for left in run("trainer_lets_go"):
        assert left == {"callbacks": 0, "hooks": 0, "patched": False, "steps": 1}


def test_lightning_refuses_what_cannot_be(run):
    for said in run("lightning_refuses"):
        assert "members disagree on training.steps: member" in said["steps"]
        assert "a module with 2 optimizers" in said["optimizers"]
        assert "members 0 and 1 write their checkpoints into one folder" in said["folder"]
        assert "closure" in said["lbfgs"], "an optimizer that wants its closure several times"
        assert said["hooks"] == "0", "nothing is left on an optimizer after an error"
