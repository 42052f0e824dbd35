"""What may be given, and how an expression tells it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest

from thinwire.codecs.options import altered, call, changed, check_flag, check_number, check_share, is_number, is_whole
from thinwire.errors import ConfigError


@dataclass(frozen=True)
class Part:
    size: int
    factor: float = 1.0
    kind: str = "plain"
    shapes: tuple[int, ...] = field(default=(), repr=False)


def test_an_expression_tells_what_is_not_at_its_default() -> None:
    assert call("part", "topk(0.5)", size=3, kind="x") == "part(topk(0.5), size=3, kind='x')"
    assert call("part") == "part"
    assert changed(Part(1)) == {}
    assert changed(Part(1, 2.0, "other", (3,))) == {"factor": 2.0, "kind": "other"}, "shapes are not told"
    assert changed(Part(1, 2.0, "other"), "kind") == {"kind": "other"}


def test_none_alters_nothing() -> None:
    assert altered(Part(1), size=None, factor=0.0) == Part(1, 0.0)


@pytest.mark.parametrize("value", [0, -1, 0.5, math.inf])
def test_numbers(value: object) -> None:
    assert is_number(value)


@pytest.mark.parametrize("value", [True, "1", None, 1j, [1]])
def test_what_is_no_number(value: object) -> None:
    assert not is_number(value)
    assert not is_whole(value, 0)


def test_whole_numbers_and_their_ends() -> None:
    assert is_whole(2, 2, 2)
    assert is_whole(10**30, 2)
    assert not any(is_whole(value, 2, 4) for value in (1, 5, 3.0))


@pytest.mark.parametrize("share", [0, 1.01, True, "1", math.nan])
def test_shares_are_above_0_and_at_most_1(share: object) -> None:
    with pytest.raises(
        ConfigError,
        match=r"part is to send a share of .*\n  expected  a number in \(0, 1\]: the share of x\n  mend  .*y",
    ):
        check_share("part", share, of="x", mend="y", verb="send")
    check_share("part", 1, of="x", mend="y")


@pytest.mark.parametrize("value", [0, 1, math.nan, None, False])
def test_limits_are_said(value: object) -> None:
    with pytest.raises(ConfigError, match=r"part with a .*\n  expected  a number above 0 and below 1\n  mend      y"):
        check_number("part", "with a", value, above=0, below=1, mend="y")
    check_number("part", "with a", 0, at_least=0, at_most=0, mend="y")


def test_flags_are_true_or_false() -> None:
    with pytest.raises(ConfigError, match=r"part with b 1\n  expected  True or False"):
        check_flag("part", "with b", 1)
    check_flag("part", "with b", False)
