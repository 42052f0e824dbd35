"""docs/perturbations.md: its vectors are what the library does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from plain_directions import philox as plain
from test_philox import ANSWERS

from thinwire.randomness import mix
from thinwire.seeds import philox
from thinwire.seeds.directions import apply_, combined
from thinwire.seeds.noise import Binomial, Sparse, layer_of
from thinwire.seeds.updates import Update

PAGE = (Path(__file__).parents[2] / "docs" / "perturbations.md").read_text()
ROWS = dict(re.findall(r"^\| (.+?) \| (.+) \|$", PAGE.split("## Vectors")[1], re.MULTILINE))
NAME, SEED, KEY = "blocks.3.mlp.weight", 0x0123456789ABCDEF, 0xFEDCBA9876543210


def row(what: str) -> list[str]:
    return ROWS[what].strip("`").split()


def bits(x: torch.Tensor) -> list[str]:
    """Hexadecimal words of a tensor's memory."""
    digits = 2 * x.element_size()
    whole = {2: torch.int16, 4: torch.int32}[x.element_size()]
    return [f"{word % 16**digits:0{digits}x}" for word in x.reshape(-1).view(whole).tolist()]


def numbers(what: str) -> list[float]:
    return [float(text) for text in row(what)]


def test_ids_words_and_keys():
    assert row("tensor id") == [f"{philox.tensor_id(NAME):08x}"]
    assert row("words 0 to 7, stream 0") == bits(philox.words(SEED, philox.tensor_id(NAME), 0, 8))
    assert row("mix(key, 7)") == [f"{mix(KEY, 7):016x}"]


def test_directions():
    assert numbers("`rademacher`, elements 0 to 7") == combined(8, NAME, [SEED], [1.0]).tolist()
    assert numbers("`binomial`, elements 0 to 3") == combined(4, NAME, [SEED], [1.0], Binomial()).tolist()
    reached = Sparse(0.5).reaches(range(8), [NAME])
    assert numbers("`sparse(0.5)`: of the seeds 0 to 7 these reach it") == reached[:, 0].nonzero()[0].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_update(dtype):
    scalars = torch.arange(1, 11).double().div(100).float().tolist()
    told = Update(tuple(range(1, 11)), tuple(scalars), torch.tensor(0.99).item(), 7)
    w = torch.tensor(numbers("float32, before")).view(2, 3).to(dtype)
    apply_(w, NAME, [told], key=KEY)
    assert bits(w) == row(f"{str(dtype).removeprefix('torch.')}, after")


def test_the_published_answers_stand_there():
    told = re.findall(r"^\| `([0-9a-f ]{35})` \| `([0-9a-f ]{17})` \| `([0-9a-f ]{35})` \|$", PAGE, re.MULTILINE)
    assert told == ANSWERS
    for counter, key, answer in told:
        assert plain([int(x, 16) for x in counter.split()], [int(x, 16) for x in key.split()]) == [
            int(x, 16) for x in answer.split()
        ]


def test_the_page_says_the_version_and_the_pattern():
    assert PAGE.startswith(f"# Perturbations, version {philox.VERSION}\n")
    assert r"^(.*?[0-9])\." in PAGE
    assert layer_of("encoder.layer.3.output.bias") == "encoder.layer.3"
