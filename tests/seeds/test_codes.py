"""A scalar in a byte: levels, draws, what abstains, what is cut."""

import math
import random
import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinwire.errors import ConfigError
from thinwire.seeds.codes import CODES, HIGHEST, LOWEST, Byte, Half, Whole, float32, parse

finite = st.floats(allow_nan=False, allow_infinity=False)
exponents = st.integers(LOWEST, HIGHEST)
STEP = 2 ** (1 / 8)


BYTE = Byte()


def code(values, exponent=0, key=7, how=BYTE):
    return how.encode(values, exponent, key).numpy().tobytes()


def there_and_back(values, exponent=0, key=7, how=BYTE):
    return how.decode(code(values, exponent, key, how), exponent)


# The byte ------------------------------------------------------------------------------------------------------------


def test_the_levels_of_the_byte():
    """127 of them, 8 an octave, the top at 2^E; each the float32 nearest to the power it stands for."""
    levels = Byte().decode(bytes(range(1, 128)), 0)
    assert levels[-1] == 1
    assert levels[-9] == 0.5
    for c, level in enumerate(levels, start=1):
        assert abs(level / 2 ** ((c - 127) / 8) - 1) <= 2**-24
    ratios = [b / a for a, b in pairwise(levels)]
    assert all(abs(ratio / STEP - 1) < 2**-23 for ratio in ratios)


@given(exponents)
def test_decoding_is_exact_in_float32_and_odd(exponent):
    values = Byte().decode(bytes(range(256)), exponent)
    assert math.isnan(values[0x80])
    for c in range(1, 128):
        assert values[c] == -values[128 + c]
        assert values[c] == float32(values[c]) == math.ldexp(Byte().decode(bytes([c]), 0)[0], exponent)
        assert values[c] >= 2.0**-126  # no denormal numbers: some devices flush them
    assert values[0] == 0


@given(st.lists(st.integers(0, 255)), exponents, st.integers(0, 2**64 - 1))
def test_what_is_decoded_is_encoded_again(codes, exponent, key):
    values = Byte().decode(bytes(codes), exponent)
    assert code(values, exponent, key) == bytes(codes)


@given(st.lists(finite), exponents, st.integers(0, 2**64 - 1))
def test_a_byte_is_one_of_the_two_neighbours(values, exponent, key):
    found = there_and_back(values, exponent, key)
    top, lowest = 2.0**exponent, 2.0 ** (exponent - 15.75)
    for value, back in zip(values, found, strict=True):
        assert back * value >= 0
        if abs(value) >= top:
            assert abs(back) == top
        elif abs(value) < lowest * (1 - 2**-23):
            assert abs(back) <= lowest * (1 + 2**-23)
        else:
            assert 1 / STEP - 1e-6 < back / value < STEP + 1e-6


@pytest.mark.parametrize("value", [0.3, -0.3, 0.7071, 2.0**-15.8, -(2.0**-18), 0.999])
def test_a_byte_is_unbiased(value):
    """The mean of 40000 draws, within 5 of its own standard deviations."""
    found = there_and_back([value] * 40000)
    lower, upper = min(found), max(found)
    assert len(set(found)) == 2
    assert abs(sum(found) / 40000 - value) < 5 * (upper - lower) / 2 / 200


def test_the_spread_of_a_byte():
    """As the card says: 4.33 % of the magnitude at most, where a value lies between two levels."""
    drawn = random.Random(1)
    for value in [2 ** drawn.uniform(-15, 0) for _ in range(200)]:
        found = there_and_back([value] * 50)
        lower, upper = min(found), max(found)
        assert (upper - value) * (value - lower) <= (0.0434 * value) ** 2  # variance of a draw between the two


def test_draws_follow_the_key():
    values = [0.3 + 0.001 * i for i in range(64)]
    assert code(values, key=1) == code(values, key=1)
    assert code(values, key=1) != code(values, key=2)
    assert code(values, exponent=1) != code(values)


def test_what_is_not_finite_abstains_and_zero_does_not():
    assert code([math.nan, math.inf, -math.inf, 0.0, -0.0]) == b"\x80\x80\x80\0\0"
    assert set(code([-1e-300] * 100)) == {0}  # a negative number that becomes 0 does not abstain
    assert set(code([-(2.0**-17)] * 100)) == {0, 0x81}


def test_golden_bytes():
    """What docs/seed-logs.md shows: the format of codes is not to change."""
    values = [1.0, -1.0, 0.5, 1e-3, -3.7, 100.0, 1e9, 0.0, math.nan]
    assert code(values, 4, key=5).hex(" ") == "5f df 57 0f ee 7f 7f 00 80"
    assert code([2.0**k for k in range(-11, 5)], 4) == bytes(range(7, 128, 8))
    assert code(values, 4, how=Half()).hex() == "006800e80064194066ef007800780000007e"


# Two bytes and four --------------------------------------------------------------------------------------------------


@given(st.lists(finite), exponents)
def test_half_keeps_eleven_bits(values, exponent):
    for value, back in zip(values, there_and_back(values, exponent, how=Half()), strict=True):
        cut = max(-(2.0**exponent), min(2.0**exponent, value))
        assert abs(back - cut) <= max(abs(cut) * 2.0**-11, 2.0 ** (exponent - 40))
        assert back == float32(back)


@given(st.lists(finite), exponents)
def test_whole_is_float32(values, exponent):
    assert there_and_back(values, exponent, how=Whole()) == [float32(value) for value in values]


@pytest.mark.parametrize("how", [Half(), Whole()])
def test_wide_codes_abstain_too(how):
    found = there_and_back([math.nan, math.inf, -math.inf, 0.5], how=how)
    assert list(map(math.isnan, found)) == [True, True, True, False]
    wild = struct.pack("<e" if how.width == 2 else "<f", math.inf)
    assert math.isnan(how.decode(wild, 0)[0])  # a member that sends infinity by hand


def test_float32_goes_no_further_than_float32():
    assert float32(1e300) == -float32(-1e300) == 3.4028234663852886e38
    assert float32(0.1) == 0.10000000149011612


@pytest.mark.parametrize("name", CODES)
@given(data=st.data())
def test_every_code(name, data):
    how = CODES[name]()
    values = data.draw(st.lists(st.floats(), max_size=9))
    written = how.encode(values, 3, 1)
    assert (written.ndim, str(written.dtype), written.numel()) == (1, "torch.uint8", how.width * len(values))
    assert parse(how.spec) == how
    once = how.decode(written.numpy().tobytes(), 3)
    assert [math.isnan(each) for each in once] == [not math.isfinite(value) for value in values]
    assert [math.isnan(a) or a == b for a, b in zip(once, there_and_back(once, 3, 9, how), strict=True)].count(0) == 0
    junk = data.draw(st.binary(max_size=9 * how.width).map(lambda raw: raw[: len(raw) // how.width * how.width]))
    assert all(math.isnan(g) or math.isfinite(g) for g in how.decode(junk, 3))


@pytest.mark.parametrize(("words", "wrong"), [("bite", "no code is called 'bite'"), ("1", "'1' is no code")])
def test_what_is_no_code(words, wrong):
    with pytest.raises(ConfigError) as caught:
        parse(words)
    assert caught.value.wrong == wrong
