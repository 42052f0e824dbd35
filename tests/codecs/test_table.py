"""The table of docs/codecs.md: made from the cards and the recorded speeds, and up to date."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from thinwire.codecs import CODECS, FEEDBACK, STAGED, describe, table

ROOT = Path(__file__).parents[2]
COMMAND = "python -m thinwire.codecs.table benchmarks/results/codecs.json > docs/codecs.md"


def row(encode: float, decode: float, *, encode_s: float = 0.01, bits: float = 8.0) -> dict[str, object]:
    timed = {"encode": [encode, 0, 9], "decode": [decode, 0, 9], "encode_s": encode_s, "n": 1 << 24}
    return {"1": timed, "gradient": {"bits": [bits, bits, bits]}}


def line(name: str, speeds: dict[str, object]) -> list[str]:
    """The cells of a codec's line."""
    text = next(each for each in table.markdown(speeds).splitlines() if each.startswith((f"| `{name}`", f"| `{name}(")))
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", text)[1:-1]]


def test_the_documentation_is_up_to_date():
    speeds = json.loads((ROOT / "benchmarks/results/codecs.json").read_text())["rows"]
    assert (ROOT / "docs/codecs.md").read_text() == table.markdown(speeds), COMMAND


@pytest.mark.parametrize("name", [*CODECS, *STAGED, *FEEDBACK])
def test_every_card_says_what_it_loses_and_when_not_to_use_it(name):
    assert describe(name).error
    assert describe(name).avoid


def test_a_label_is_not_taken_for_a_word():
    assert describe("feedback").error.startswith("converges")


def test_every_codec_has_a_line_with_all_cells():
    for name in CODECS:
        cells = line(name, {})
        assert len(cells) == 6
        assert all(cells[i] for i in (0, 1, 3, 4, 5))


def test_promises():
    assert line("fp32", {})[2] == "lossless, unbiased, linear"
    assert line("topk", {})[2] == "contracts by 0.0156, feedback"
    assert line("bf16", {})[2] == "contracts by 0.9999"  # not by 1


def test_the_error_is_the_first_sentence_and_its_bars_are_escaped():
    assert line("topk", {})[3] == r"\|\|x - C(x)\|\|^2 <= (1 - k/n) \|\|x\|\|^2, in a block with its own k and n"
    assert line("fp32", {})[3] == "none"


def test_a_card_of_several_codecs_is_told_apart():
    assert line("fp32", {})[5] == "where the link is what you wait for"
    assert line("fp16", {})[5] != line("bf16", {})[5]


@pytest.mark.parametrize(
    ("measured", "told"),
    [
        (row(0.5, 3.0), "fast: 0.5 and 3"),
        (row(0.49, 3.0), "medium: 0.49 and 3"),
        (row(0.9, 0.125), "medium: 0.9 and 0.12"),
        (row(0.12, 0.9), "slow: 0.12 and 0.9"),
        (row(250.0, 40.0), "fast: no work and no work"),
        (row(0.01, 0.01, encode_s=0.6), "slow: 0.01 and 0.01; slower than a 1 Gbit/s link moves float32"),
    ],
)
def test_speeds(measured, told):
    assert line("int8", {"int8": measured})[4] == told


def test_the_examples_own_row_is_preferred():
    rows = {"int8(rounding='stochastic')": row(0.1, 0.1), "int8 | zstd": row(0.2, 0.2)}
    assert line("int8", rows)[4] == "slow: 0.1 and 0.1"
    assert line("int8", rows | {"int8": row(0.6, 0.6)})[4] == "fast: 0.6 and 0.6"
    assert line("int4", rows)[4] == "not measured"


def test_a_size_that_varies_is_the_measured_one_with_its_bound():
    assert line("zstd", {"zstd": row(1, 1, bits=26.6)})[1] == "26.6; at most 32.1"
    assert line("zstd", {})[1] == "at most 32.1"
    assert line("int4", {"int4": row(1, 1, bits=3)})[1] == "4.5"
