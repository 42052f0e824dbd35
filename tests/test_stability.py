"""How much delay outer steps bear: the table of `thinwire.stability`, and what a run says of it."""

from __future__ import annotations

import logging

import pytest

import thinwire
from small import make_model, sgd
from thinwire import co2, delayed, diloco, eager, slowmo, streaming_diloco
from thinwire.links.local import run
from thinwire.outer import SGD, Adam, ClippedMomentum, Eager, Nesterov
from thinwire.stability import largest_kappa

TABLE = {
    SGD(0.7): (2.86, 1.43, 2.86, 1.90, 1.63),
    SGD(1.0): (2.00, 1.00, 2.00, 1.33, 1.14),
    Nesterov(0.7, 0.9): (1.94, 0.36, 1.10, 0.59, 0.46),
    Nesterov(0.4, 0.9): (3.39, 0.63, 1.92, 1.04, 0.80),
}


@pytest.mark.parametrize("outer", TABLE, ids=repr)
def test_the_table_is_what_our_steps_do(outer):
    """To a percent: half of one is the grid's, and the table has two digits."""
    found = [largest_kappa(outer, late=False), largest_kappa(outer, late=True)]
    found += [largest_kappa(Eager(outer), late=True, members=members) for members in (2, 4, 8)]
    assert found == [pytest.approx(value, rel=0.01, abs=0.006) for value in TABLE[outer]]


@pytest.mark.parametrize(("lr", "momentum"), [(1.0, 0.0), (1.0, 0.2), (0.5, 0.5), (0.3, 0.9)])
def test_late_heavy_ball_is_stable_below_1_minus_momentum(lr, momentum):
    expected = pytest.approx((1 - momentum) / lr, rel=0.01)
    assert largest_kappa(ClippedMomentum(lr, momentum, clip=1.0), late=True) == expected
    assert largest_kappa(SGD(lr, momentum), late=True) == expected
    assert largest_kappa(SGD(lr, momentum), late=False) == pytest.approx(2 * (1 + momentum) / lr, rel=0.01)


def warnings(caplog, method, members: int) -> list[str]:
    caplog.clear()
    caplog.set_level(logging.WARNING)

    def member(link):
        model = make_model()
        with thinwire.synchronize(model, sgd(model), method, link):
            pass

    run(members, member)
    return [record.message for record in caplog.records]


@pytest.mark.parametrize(
    "method", [diloco(), delayed(), eager(), co2(), slowmo(), streaming_diloco(every=8, fragments=2)], ids=str
)
def test_methods_as_they_come_are_stable_among_four(caplog, method):
    assert warnings(caplog, method, 4) == []


def test_too_much_momentum_for_the_delay_is_told_once(caplog):
    told = warnings(caplog, delayed(every=4, outer_lr=0.7, momentum=0.9), 3)
    assert len(told) == 1
    assert "Nesterov" not in told[0]
    assert "SGD(lr=0.7, momentum=0.9, nesterov=True) with rounds that end as the next ones begin, among 3" in told[0]
    assert "less than 36% of the way" in told[0]
    assert "lower its learning rate or momentum, or let rounds be more frequent" in told[0]


def test_eager_is_told_by_the_number_of_members(caplog):
    assert warnings(caplog, eager(every=4), 2) == []
    assert "among 8 members" in warnings(caplog, eager(every=4), 8)[0]


def test_in_time_too(caplog):
    assert (
        "in time is stable only while local steps cover less than"
        in warnings(caplog, diloco(every=4, outer_lr=2.0), 1)[0]
    )
    assert warnings(caplog, diloco(every=4).but(outer=Adam(10.0)), 1) == [], "nothing is known of what is not linear"
