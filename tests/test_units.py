import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinwire.errors import ConfigError
from thinwire.units import Duration, Rate, Size


@pytest.mark.parametrize(
    ("text", "quantity"),
    [
        ("20mbit", Rate(20e6)),
        ("20 Mbit/s", Rate(20e6)),
        ("2.5MB/s", Rate(20e6)),
        ("1KiB/s", Rate(8192.0)),
        ("56kbit", Rate(56e3)),
        ("1e3bit", Rate(1000.0)),
        ("2.5MB", Size(2_500_000)),
        ("64KiB", Size(65536)),
        ("0B", Size(0)),
        ("40ms", Duration(0.04)),
        ("1min", Duration(60.0)),
        (".5 s", Duration(0.5)),
        ("250µs", Duration(0.00025)),
        ("2h", Duration(7200.0)),
    ],
)
def test_what_people_type(text, quantity):
    assert type(quantity).parse(text) == quantity


@pytest.mark.parametrize(
    ("kind", "text", "wrong"),
    [
        (Rate, "20", "'20' is no rate: it has no unit"),
        (Rate, "20Mbps", "'20Mbps' is no rate"),
        (Rate, "20MB", "'20MB' is no rate"),
        (Rate, "fast", "'fast' is no rate"),
        (Rate, "-1mbit", "'-1mbit' is no rate"),
        (Size, "2.5mbit", "'2.5mbit' is no size"),
        (Size, "0.3B", "'0.3B' is 0.3 bytes"),
        (Duration, "40", "'40' is no duration: it has no unit"),
        (Duration, "1h30m", "'1h30m' is no duration"),
        (Duration, "1e999s", "a duration of inf"),
        (Duration, "", "'' is no duration"),
    ],
)
def test_what_is_refused(kind, text, wrong):
    with pytest.raises(ConfigError) as caught:
        kind.parse(text)
    assert caught.value.wrong == wrong
    assert caught.value.expected
    assert caught.value.mend


def test_the_refusal_of_a_number_without_unit_in_full():
    with pytest.raises(ConfigError) as caught:
        Duration.parse("60")
    assert str(caught.value) == (
        "'60' is no duration: it has no unit\n"
        "  expected  a number of at least 0 and a unit: us, ms, s, min, h, d\n"
        "  mend      write it like '40ms'"
    )


numbers = st.floats(0, 1e300) | st.integers(0, 10**6).map(float)


@given(numbers)
def test_durations_and_rates_are_written_as_they_are_read(value):
    assert Duration.parse(str(Duration(value))) == Duration(value)
    assert Rate.parse(str(Rate(value))) == Rate(value)


@given(st.integers(0, 2**80))
def test_sizes_are_written_as_they_are_read(count):
    assert Size.parse(str(Size(count))) == Size(count)


@given(st.text(max_size=20))
def test_any_text_is_a_duration_or_a_config_error(text):
    with contextlib.suppress(ConfigError):
        Duration.parse(text)


@pytest.mark.parametrize(
    ("quantity", "text"),
    [
        (Rate(20e6), "20mbit"),
        (Duration(0.04), "40ms"),
        (Duration(60), "1min"),
        (Size(65536), "64KiB"),
        (Rate(0), "0bit"),
    ],
)
def test_they_are_written_in_the_unit_a_person_would_take(quantity, text):
    assert str(quantity) == text
