import math

import pytest

from thinwire.report import words


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (12_340_000, "12.3 MB"),
        (999_499, "999 kB"),
        (999_960, "1.00 MB"),  # the rounded value picks the unit
        (1.5e15, "2 PB"),
        (math.inf, "not finite"),
    ],
)
def test_bytes(count, text):
    assert words.bytes_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.42, "420 ms"),
        (0.9996, "1.00 s"),
        (12.34, "12.3 s"),
        (59.96, "1 min 00 s"),
        (94, "1 min 34 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (86_399, "1 d 00 h"),
        (273_600, "3 d 04 h"),
        (math.nan, "not finite"),
    ],
)
def test_seconds(seconds, text):
    assert words.seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        (None, "–"),
        (0, "nothing"),
        (1.001, "the same"),
        (0.004, "250× less"),
        (1.5, "1.50× more"),
        (1 / 2250, "2,250× less"),
    ],
)
def test_share_of_the_first(ratio, text):
    assert words.share_of_first_text(ratio) == text


def test_numbers():
    assert [words.number_text(x) for x in (None, math.nan, 0.308, 1234.5)] == ["–", "not finite", "0.3080", "1234"]
    assert [words.percent_text(x) for x in (0, 1e-7, 0.512, 1)] == ["0.00 %", "< 0.01 %", "51.2 %", "100 %"]
    assert [words.times_text(x) for x in (None, 0.07, 14.16)] == ["–", "0.07×", "14.2×"]


def test_one_line_has_no_breaks_no_control_characters_and_an_end():
    assert words.one_line("a\n\tb\x00c") == "a b c"
    assert words.one_line("x" * 70, limit=10) == "x" * 9 + "…"
