"""Expressions a person types, and the sentences they get when one is wrong."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import thinwire.codecs
from thinwire.codecs import (
    CODECS,
    FEEDBACK,
    STAGED,
    Codec,
    Feedback,
    Staged,
    describe,
    ef21w,
    feedback,
    fp32,
    int4,
    int8,
    parse,
    topk,
    zstd,
)
from thinwire.errors import ConfigError

NAMES = ", ".join(sorted([*CODECS, *STAGED, *FEEDBACK]))


@pytest.mark.parametrize(
    ("expression", "codec"),
    [
        ("fp32", fp32),
        (" fp32() ", fp32),
        ("int8", int8),
        ("int8()", int8),
        ("int8(block=256)", int8),
        ("int8(64)", int8(block=64)),
        ("int4(block=64, rounding='stochastic')", int4(rounding="stochastic")),
        ('int8(block=512, rounding="stochastic")', int8(block=512, rounding="stochastic")),
        ("int8(block=4*64)", int8),
        ("topk(1/64)", topk(0.015625)),
        ("topk(share=1 - 3/4)", topk(0.25)),
        ("topk(-(1/4) + 1)", topk(0.75)),
        ("topk(1/64) | int4 | zstd", topk(1 / 64) | int4 | zstd),
        ("topk(1/64) | (int4 | zstd(level=9))", topk(1 / 64) | int4 | zstd(9)),
        ("feedback(topk(1/64) | int4, decay=0.9)", feedback(topk(1 / 64) | int4, decay=0.9)),
        ("ef21w(topk(1/64), smoothness=(1, 1/2, (3)))", ef21w(topk(1 / 64), smoothness=(1, 0.5, 3))),
        ("ef21w(int8, (2,))", ef21w(int8, (2.0,))),
    ],
)
def test_what_an_expression_stands_for(expression: str, codec: Codec | Feedback) -> None:
    assert parse(expression) == codec
    assert parse(codec.spec) == codec


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("inte8", f"no codec is called 'inte8'\n  expected  one of {NAMES}\n  mend      did you mean int8?"),
        ("gzip9000", "no codec is called 'gzip9000'"),
        ("int8(blok=64)", "int8 does not take 'blok'\n  expected  int8 takes block, rounding, grid"),
        ("int8(64, block=64)", "int8 is given 'block' twice"),
        ("int8(64, 'nearest')", "int8 takes 1 options without their names, not 2"),
        ("fp32(1)", "fp32 takes 0 options without their names, not 1\n  expected  fp32 takes no options"),
        ("topk", "topk needs 'share'\n  expected  topk takes share, index, block\n  mend      `thinwire codecs topk`"),
        ("topk(1.5) | int4", "topk is to keep a share of 1.5"),
        ("topk(int4)", "topk is to keep a share of Integer(bits=4"),
        ("int8(block='x')", "int8 is to have blocks of 'x'"),
        ("int8 | 3", "'int8 | 3': 3 is no codec"),
        ("int8 | (3, 4)", "'int8 | (3, 4)': (3, 4) is no codec"),
        ("(int8, int4)", "'(int8, int4)' is no codec"),
        ("int8(block=(1, 2))", "int8 is to have blocks of (1, 2)"),
        ("(1, 2) * 3", "'(1, 2)' is no number"),
        ("3", "'3' is no codec"),
        ("'int8'", "\"'int8'\" is no codec"),
        ("", "'' cannot be read (invalid syntax)"),
        ("int8 |", "'int8 |' cannot be read (invalid syntax)"),
        ("topk(1/0)", "'topk(1/0)' cannot be read (division by zero)"),
        ("topk(int4 / 2)", "'int4' is no number"),
        ("topk(2**99)", "'2 ** 99' has no meaning here"),
        ("topk(*[1])", "'*[1]' has no meaning here"),
        ("int8(**{})", "int8(**{}) has no meaning here"),
        ("int8.bits", "'int8.bits' has no meaning here"),
        ("__import__('os')", "no codec is called '__import__'"),
        ("(lambda: int8)()", "'(lambda: int8)()' has no meaning here"),
        ("feedback(topk(1/2)) | zstd", "feedback(topk(0.5)) | ...: what follows would be outside the error memory"),
        ("int8 \0", "cannot be read"),
    ],
)
def test_what_is_wrong_with_it(expression: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        parse(expression)


@given(st.text(alphabet="fp32intok48(),|=-+*/.'[]{}: \\\n\0é", max_size=30) | st.text(max_size=30))
def test_any_text_is_an_expression_or_a_config_error(text: str) -> None:
    try:
        parsed = parse(text)
    except ConfigError:
        return
    assert isinstance(parsed, Codec | Staged | Feedback)


def test_nesting_without_end_is_refused() -> None:
    with pytest.raises(ConfigError):
        parse("topk(" + "-" * 100_000 + "1)")


@pytest.mark.parametrize("name", [*CODECS, *STAGED, *FEEDBACK])
def test_cards(name: str) -> None:
    card = describe(name)
    assert card.name == name
    assert card.signature.startswith(name)
    assert card.summary.endswith(".")
    assert card.source.endswith(".")
    assert card.card.startswith(card.summary[:20])
    assert isinstance(parse(card.example), Codec | Staged | Feedback)
    assert card.bits_per_element is None or 0 < card.bits_per_element < 33


def test_cards_tell_options_and_size() -> None:
    assert describe("int8").signature == "int8(block=256, rounding='nearest', grid='symmetric')"
    assert describe("topk").signature == "topk(share, index='compact', block=None)"
    assert describe("fp32").signature == "fp32"
    assert describe("int4").bits_per_element == 4.5
    assert describe("topk").bits_per_element == 8 * (4 * 15_625 + 15_626) / 1_000_000  # 32 bits and 8 an entry
    assert describe("topk").example == "topk(1/64)"
    assert "1809.07599" in describe("topk").source
    assert describe("topk").traits.wants_feedback


def test_cards_of_what_is_no_name_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no codec is called 'int9'\n.*\n  mend      did you mean int"):
        describe("int9")
    with pytest.raises(ConfigError, match=r"'int8\(\)' is an expression\n  expected  one codec's name"):
        describe("int8()")


def test_everything_named_is_exported() -> None:
    assert all(hasattr(thinwire.codecs, name) for name in thinwire.codecs.__all__)
    assert {*CODECS, *FEEDBACK} <= set(thinwire.codecs.__all__)
