"""Members in processes of their own meet at a lighthouse, and meet again whatever ends meanwhile."""

import os
import signal

import pytest

pytest.importorskip("torchft", reason="torchft is not installed: pip install 'thinwire[elastic]'")

from people import Attendee, all_do
from test_lighthouse import heard, kill_button, runs, until

from thinwire import ConfigError
from thinwire.elastic.lighthouse import serve
from thinwire.elastic.settings import Limits
from thinwire.elastic.torchft_meeting import TorchftMeeting

LIMITS = Limits(heartbeat_s=1.0)


@pytest.fixture
def house():
    """Members and lighthouses that a test starts; all end with it."""
    house = House()
    yield house
    house.close()


class House:
    def __init__(self):
        self.ends = []

    def lighthouse(self, bind="127.0.0.1:0", limits=LIMITS):
        server = serve(bind, limits=limits)
        self.ends.append(server)
        return server

    def members(self, names, addresses, **options):
        """Started side by side: most of a start is loading torch."""
        found = [Attendee(addresses, name=name, **options) for name in names]
        self.ends += found
        return [member.ready() for member in found]

    def close(self):
        for each in reversed(self.ends):
            each.stop()


def meet_until(members, whom, begun=()):
    """Each meets again as soon as it is back, until all are told these names; returns what the first one was told.

    Who comes to a meeting that the others have just left waits for their next one, so none may wait for all to be back.

    begun  those of them that are in a meeting already
    """
    told = {}
    for member in members:
        if member not in begun:
            member.begin("meet")

    def all_are_there():
        for member in members:
            if member not in told and not member.busy():
                answer = member.end()
                if sorted(named(answer)) == sorted(whom):
                    told[member] = answer
                else:
                    member.begin("meet")
        return len(told) == len(members)

    until(all_are_there, f"no gathering of {whom}")
    return told[members[0]]


def named(told):
    """Names of a gathering without process and life."""
    assert "names" in told, told
    return "".join(name[0] for name in told["names"])


def test_a_gathering_holds_until_somebody_breaks_it_leaves_dies_or_comes(house):
    at = house.lighthouse().address
    a, b, c = three = house.members("abc", at)
    first = all_do(three, "meet")
    assert [(named(told), told["rank"]) for told in first] == [("abc", 0), ("abc", 1), ("abc", 2)]
    assert [told["names"] for told in first] == [[member.name for member in three]] * 3
    assert len({told["number"] for told in first}) == 1
    assert all_do(three, "exchange")[0]["heard"] == {"1": 2, "2": 3}
    assert all(told["same"] for told in all_do(three, "meet"))

    # One says it is broken: what the others have under way ends, and all have a new group.
    for member in (b, c):
        member.begin("exchange")
    a.begin("meet broken")
    assert [member.end()["error"] for member in (b, c)] == ["PeerLost"] * 2
    for member in (b, c):
        member.begin("meet")  # they need not say so too
    second = [member.end() for member in three]
    assert [named(told) for told in second] == ["abc"] * 3
    assert not any(told["same"] for told in second)
    assert second[0]["number"] > first[0]["number"]
    assert all_do(three, "exchange")[1]["heard"] == {"0": 1, "2": 3}

    # One dies in mid-exchange.
    for member in (a, b):
        member.begin("exchange")
    c.kill()
    assert [member.end()["error"] for member in (a, b)] == ["PeerLost"] * 2
    assert [named(told) for told in all_do((a, b), "meet broken")] == ["ab"] * 2

    # One comes: it waits until those who are there meet.
    [d] = house.members("d", at, founds=False)
    d.begin("meet")
    meet_until((a, b), "abd")
    assert d.end()["names"] == [a.name, b.name, d.name]
    assert all_do((a, b, d), "exchange")[2]["heard"] == {"0": 1, "1": 2}

    # One leaves: the others hear of it at once, and go on.
    b.begin("exchange")
    a.do("close")
    assert b.end()["error"] == "PeerLost"
    assert [named(told) for told in all_do((b, d), "meet broken")] == ["bd"] * 2


@pytest.mark.slow
def test_lighthouses_end_one_after_the_other(house):
    lighthouse = house.lighthouse()
    a, b, c = three = house.members("abc", lighthouse.address)
    assert [named(told) for told in all_do(three, "meet")] == ["abc"] * 3

    # Restarted at the same port, with a newcomer at the same time: quorum ids begin at 1 again.
    [d] = house.members("d", lighthouse.address, founds=False)
    lighthouse.stop()
    lighthouse = house.lighthouse(lighthouse.address)
    d.begin("meet")
    meet_until((*three, d), "abcd", begun=(d,))
    assert all_do((*three, d), "exchange")[0]["heard"] == {"1": 2, "2": 3, "3": 4}

    # Killed for good, while somebody waits there: all go on to the standby of rank 0.
    a.begin("meet")
    until(lambda: not a.busy() or len(heard(lighthouse.address) or ()) == 4, "a does not ask")
    os.kill(lighthouse.pid, signal.SIGKILL)
    for member in (b, c, d):
        member.begin("meet")
    moved = [member.end() for member in (a, b, c, d)]
    assert [sorted(named(told)) for told in moved] == [list("abcd")] * 4
    by_name = {member.name: member for member in (a, b, c, d)}
    order = [by_name[name] for name in moved[0]["names"]]
    assert {told["lighthouse"] for told in moved} == {order[0].standby}

    # Whose machine dies, with lighthouse and trainer: the next one's.
    order[0].kill()
    rest = order[1:]
    again = all_do(rest, "meet broken")
    assert [len(told["names"]) for told in again] == [3] * 3
    assert len({told["lighthouse"] for told in again}) == 1
    assert again[0]["lighthouse"] in {member.standby for member in rest}
    assert all_do(rest, "exchange")[0]["heard"] == {"1": 2, "2": 3}


@pytest.mark.slow
def test_one_that_falls_silent_without_a_word_ends_what_waits_for_it(house):
    """Its sockets stay open, as those of a pulled cable do: the lighthouse knows, long before a time limit."""
    a, b, c = three = house.members("abc", house.lighthouse().address)
    all_do(three, "meet")
    pids = [b.pid, b.do("heart")["heart"]]
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        for member in (a, c):
            member.begin("exchange")
        assert [member.end()["error"] for member in (a, c)] == ["PeerLost"] * 2
        assert named(all_do((a, c), "meet broken")[0]) == "ac"
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.slow
def test_a_minority_waits_and_says_so(house):
    lighthouse = house.lighthouse()
    a, b, c = three = house.members("abc", lighthouse.address, limits={"meet_s": 6.0})
    all_do(three, "meet")
    for member in (b, c):
        member.kill()
    told = a.do("meet broken")
    assert told["error"] == "MeetingLost"
    assert told["text"].startswith("no group formed within 6 s: 1 of the 3 members of the last gathering are here\n")
    assert f"\n  expected  a lighthouse at {lighthouse.address} or " in told["text"]
    assert "\n  mend      see whether they run" in told["text"]
    assert any("1 of the 3 members of the last gathering are here (gives up in" in line for line in a.said)


@pytest.mark.slow
def test_half_goes_on_where_they_met(house):
    lighthouse = house.lighthouse()
    a, b = house.members("ab", lighthouse.address, limits={"meet_s": 6.0})
    all_do((a, b), "meet")
    b.kill()
    assert named(a.do("meet broken")) == "a"
    lighthouse.stop()
    told = a.do("meet")
    assert told["error"] == "MeetingLost", "b may come back to where they met, and know nothing of a's going elsewhere"
    assert told["text"].startswith("no group formed within 6 s: 1 of the 2 members of the last gathering are here")


@pytest.mark.slow
def test_members_that_hang_or_lose_their_heart(house):
    at = house.lighthouse().address
    a, b = house.members("ab", at, limits={"hang_s": 2.0})
    all_do((a, b), "meet")

    # The button on the lighthouse's page ends a heart, no trainer.
    beats = b.do("heart")["heart"]
    kill_button(at, b.name)
    until(lambda: not runs(beats), "the heart beats on")
    assert [named(told) for told in all_do((a, b), "meet")] == ["ab"] * 2
    assert b.do("heart")["heart"] != beats

    # A trainer that is stopped: its heart ends by itself, and nobody waits to the end of the lighthouse's patience.
    beats = b.do("heart")["heart"]
    b.kill(signal.SIGSTOP)
    assert named(a.do("meet broken")) == "a"
    assert not runs(beats)
    b.kill(signal.SIGCONT)
    b.begin("meet")
    meet_until((a,), "ab")
    assert named(b.end()) == "ab"


@pytest.mark.slow
def test_enough_members_are_waited_for_and_one_may_ask_again(house):
    at = house.lighthouse().address
    [a] = house.members("a", at, at_least=2, limits={"meet_s": 2.0})
    told = a.do("meet")
    assert told["error"] == "MeetingLost"
    assert "1 of the 2 members that it takes are here" in told["text"]
    [b] = house.members("b", at, limits={"meet_s": 30.0}, founds=False)
    b.begin("meet")
    for _ in range(20):
        if "names" in (told := a.do("meet")):
            break
    assert sorted(named(told)) == sorted(named(b.end())) == list("ab")


@pytest.mark.slow
def test_a_pair_that_cannot_talk_is_told_apart(house):
    """a and b do not reach each other; both reach c. After some attempts the largest set that can goes on."""
    at = house.lighthouse().address
    a, b, c = house.members("abc", at, apart=["a-", "b-"], limits={"meet_s": 12.0})
    for member in (a, b, c):
        member.begin("meet")
    assert named(a.end()) == named(c.end()) == "ac"
    told = b.end()
    assert told["error"] == "MeetingLost"
    assert any("cannot reach" in line and "this member stays away for" in line for line in b.said)
    assert all_do((a, c), "exchange")[0]["heard"] == {"1": 2}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"addresses": "nowhere"}, "address 'nowhere'"),
        ({"addresses": ()}, "no address of a lighthouse\n  expected  one or several HOST:PORT"),
        ({"name": "a/b"}, "name 'a/b'\n  expected  letters, digits"),
        ({"at_least": 0}, "at least 0 members\n  expected  1 or more"),
        ({"host": "192.0.2.1"}, "this machine cannot be reached at 192.0.2.1"),
    ],
)
def test_requests_that_cannot_be_met(options, match):
    with pytest.raises(ConfigError, match=match):
        TorchftMeeting(**{"addresses": "127.0.0.1:1"} | options)


def test_names_are_of_one_life():
    first, second = (TorchftMeeting("127.0.0.1:1", name="a") for _ in range(2))
    try:
        assert first.name != second.name
        assert first.name.startswith(f"a-{os.getpid()}-")
        assert first.name.rpartition("-")[2].isdigit()
    finally:
        for each in (first, second):
            each.close()
            each.close()
