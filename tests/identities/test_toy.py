"""What rounds, delay and momentum do to a loss, in the order that they should: the toy of benchmarks/toy.py, halved."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

TOY = Path(__file__).parents[2] / "benchmarks" / "toy.py"


@pytest.mark.slow
def test_the_order_of_methods_on_the_toy():
    """Margins are those that hold over other data and random numbers; half of the steps, one seed."""
    spec = importlib.util.spec_from_file_location("toy", TOY)
    assert spec is not None
    assert spec.loader is not None
    toy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(toy)
    rows = toy.rows()

    def loss(name: str) -> float:
        method, members, _ = rows[name]
        return toy.loss_of(method, 0, members=members, steps=1000)

    diloco = loss("diloco 0.7/0.9")
    assert diloco < loss("fedavg") - 0.15
    assert loss("eager 0.4/0.9") < loss("delayed 0.4/0.9") - 0.05
    assert loss("delayed 0.7/0.9") > loss("alone"), "delay with much momentum is worse than no exchange"
    assert abs(loss("streaming, F=2") - diloco) < 0.02
