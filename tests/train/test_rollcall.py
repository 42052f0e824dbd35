"""The roll call: answered one call later, alike on all members, at a pace that follows the clock."""

import pytest

from thinwire.errors import PeerLost
from thinwire.links.base import Link
from thinwire.links.local import alone
from thinwire.links.local import run as simulate
from thinwire.links.network import Network
from thinwire.train.rollcall import RollCall, Status


def status(step, seconds, *, loss=1.0, stops=False):
    return Status(step, seconds, loss, 8 * step, 0, 100, 200, stops, False)


def test_what_was_told_is_read_at_the_next_call():
    def member(link: Link):
        calls = RollCall(link)
        heard = [calls.call(status(step, 0.1 * step, loss=link.rank)) for step in (1, 2)]
        return [*heard, calls.last(), calls.last()]

    for heard in simulate(3, member):
        assert heard[0] is None
        assert heard[1] == {rank: status(1, 0.1, loss=rank) for rank in range(3)}
        assert heard[2] == {rank: status(2, 0.2, loss=rank) for rank in range(3)}
        assert heard[3] is None


def test_nobody_waits_for_it():
    def member(link: Link):
        calls = RollCall(link)
        calls.call(status(1, 0.0))
        told = link.now()
        calls.last()
        return told, link.now()

    for told, read in simulate(2, member, Network(latency_s=0.5)):
        assert told == 0
        assert read == pytest.approx(0.5)


def paced(link: Link, steps: int, step_s: float, calls: RollCall, first: int = 0) -> list[int]:
    """Steps called at when steps take `step_s` by member 0's clock, and another time by the others'."""
    made = []
    for step in range(first, steps):
        if calls.due(step):
            calls.call(status(step, step * step_s * (1 + link.rank)))
            made.append(step)
    return made


@pytest.mark.parametrize(
    ("step_s", "last"),
    [(0.1, 20), (1.0, 2), (5.0, 1), (0.001, 50)],
)
def test_about_a_call_every_two_seconds(step_s, last):
    made = simulate(2, lambda link: paced(link, 300, step_s, RollCall(link)))
    assert made[0] == made[1]  # member 0's clock decides for all
    assert made[0][-1] - made[0][-2] == last


def test_its_state_goes_on_where_it_was():
    def whole(link: Link):
        return paced(link, 200, 0.1, RollCall(link))

    def parts(link: Link):
        before = RollCall(link)
        made = paced(link, 90, 0.1, before)
        before.last()
        after = RollCall(link)
        after.load_state_dict(before.state_dict())
        return made + paced(link, 200, 0.1, after, first=90)

    assert simulate(2, parts) == simulate(2, whole)


def test_a_lost_member_leaves_ones_own_words():
    def member(link: Link):
        calls = RollCall(link)
        calls.call(status(1, 0.1))
        calls.last()
        assert calls.unanswered is None
        if link.rank == 1:
            return None
        calls.call(status(2, 0.2))
        with pytest.raises(PeerLost, match="lost member 1 during the roll call at step 2"):
            calls.last()
        return calls.unanswered

    assert simulate(2, member)[0] == status(2, 0.2)


def test_alone():
    calls = RollCall(alone())
    assert calls.call(status(1, 0.1, stops=True)) is None
    assert calls.last() == {0: status(1, 0.1, stops=True)}


def test_a_loss_that_is_no_number_is_told_too():
    calls = RollCall(alone())
    calls.call(status(1, 0.1, loss=float("nan")))
    answered = calls.last()
    assert answered is not None
    assert answered[0].loss != answered[0].loss
