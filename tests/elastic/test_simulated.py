"""Raw exchanges through gatherings, under every kind of fault."""

from __future__ import annotations

import math
import random
import threading

import pytest
import torch

from thinwire.elastic.quorum import Rules
from thinwire.elastic.schedules import Crash, CrashSaying, Cut, Down, Life, Plan, Slow, Stop
from thinwire.elastic.simulated import simulate
from thinwire.errors import ConfigError, MeetingLost, PeerLost
from thinwire.links.network import Network

RULES = Rules(1, join_timeout_s=60.0, heartbeat_timeout_s=5.0)
NETWORK = Network(latency_s=0.25, step_s=1.0, patience_s=20.0)


def lives(*names):
    return tuple(Life(name) for name in names)


def plan(names, *faults, **options):
    """All from the beginning, so that the first gathering has everybody."""
    return Plan(lives(*names.split()), faults, **{"rules": RULES, "end_s": 1000.0} | options)


def tell(link, channel, number):
    """Tell everybody a number and hear theirs."""
    message = torch.full((4,), number, dtype=torch.uint8)
    others = [rank for rank in link.members if rank != link.rank]
    arrived = channel.exchange(dict.fromkeys(others, message), dict.fromkeys(others, 4), f"round {number}")
    return {rank: int(buffer[0]) for rank, buffer in arrived.items()}


def talker(rounds, log):
    """A member that meets, makes a step, tells its number, and meets anew when something breaks."""

    def member(meeting):
        gathering, channel, done, broken = None, None, 0, False
        while done < rounds:
            now = meeting.meet(broken=broken)
            broken = False
            if now is not gathering:
                gathering, channel = now, now.link.open("talk")
                log.append((meeting.name, "met", gathering.number, gathering.names, gathering.link.now()))
            gathering.link.local_step()
            try:
                heard = tell(gathering.link, channel, done)
            except PeerLost as lost:
                log.append((meeting.name, "lost", lost.ranks, str(lost).splitlines()[0], gathering.link.now()))
                broken = True
            else:
                log.append((meeting.name, "heard", heard, gathering.link.now()))
                done += 1
        return gathering.link.now()

    return member


def play(plan, rounds=6, network=NETWORK):
    log = []
    ends = simulate(plan, talker(rounds, log), network)
    return ends, log


def groups(log, name):
    return [entry[3] for entry in log if entry[:2] == (name, "met")]


def losses(log, name):
    return [(entry[2], entry[3], entry[4]) for entry in log if entry[:2] == (name, "lost")]


def test_without_faults_one_gathering_holds():
    ends, log = play(plan("a.1 b.1 c.1"))
    assert {name: end.how for name, end in ends.items()} == dict.fromkeys(["a.1", "b.1", "c.1"], "returned")
    assert all(groups(log, name) == [("a.1", "b.1", "c.1")] for name in ends)
    assert [end.value for end in ends.values()] == [7.5] * 3, "six rounds of a step and a message"


def test_ranks_follow_names_whatever_the_order_of_starting():
    ranks = simulate(plan("c.1 a.1 b.1"), lambda meeting: meeting.meet().link.rank)
    assert {name: end.value for name, end in ranks.items()} == {"a.1": 0, "b.1": 1, "c.1": 2}


def test_one_that_comes_is_in_the_next_gathering():
    _, log = play(Plan((*lives("a.1", "b.1"), Life("c.1", 2.0)), rules=RULES, end_s=1000.0))
    assert groups(log, "a.1") == groups(log, "b.1") == [("a.1", "b.1"), ("a.1", "b.1", "c.1")]
    assert groups(log, "c.1")[0] == ("a.1", "b.1", "c.1")
    assert next(entry[4] for entry in log if entry[:2] == ("c.1", "met")) == 2.5, (
        "when the others' second round was over"
    )


def test_a_crash_resets_what_others_wait_for_and_they_meet_without_it():
    ends, log = play(plan("a.1 b.1 c.1", Crash("c.1", 1.5)))
    assert (ends["c.1"].how, ends["c.1"].at_s, ends["c.1"].doing) == ("crashed", 1.5, "")
    for name in ("a.1", "b.1"):
        assert losses(log, name) == [((2,), "lost member 2 during round 1: connection reset", 2.25)]
        assert groups(log, name) == [("a.1", "b.1", "c.1"), ("a.1", "b.1")]
        met_s = [entry[4] for entry in log if entry[:2] == (name, "met")]
        assert met_s[1] == pytest.approx(6.5, abs=0.11), "five seconds after its last heartbeat"
    assert ends["a.1"].how == "returned"


def test_what_was_sent_before_a_crash_arrives():
    """c ends when its messages of round 0 are on the wire; the others hear them, and miss it when they meet."""
    _, log = play(plan("a.1 b.1 c.1", Crash("c.1", 1.1)))
    assert next(entry[2] for entry in log if entry[:2] == ("a.1", "heard")) == {1: 0, 2: 0}
    assert losses(log, "a.1") == []
    assert groups(log, "a.1") == [("a.1", "b.1", "c.1"), ("a.1", "b.1")]


@pytest.mark.parametrize(("sent", "hear"), [(0, set()), (1, {"a.1"}), (2, {"a.1", "b.1"})])
def test_a_crash_in_the_midst_of_an_exchange(sent, hear):
    ends, log = play(plan("a.1 b.1 c.1", CrashSaying("c.1", 3, sent=sent)))
    assert (ends["c.1"].how, ends["c.1"].doing) == ("crashed", "talk")
    heard = {entry[0] for entry in log if entry[1] == "heard" and entry[2] in ({1: 3, 2: 3}, {0: 3, 2: 3})}
    assert heard == hear
    for name in hear ^ {"a.1", "b.1"}:
        assert "during round 3: connection reset" in losses(log, name)[0][1]


def test_exchanges_are_counted_by_their_label():
    def member(meeting):
        link = meeting.meet().link
        first, second = link.open("first"), link.open("second")
        for number in range(4):
            tell(link, first, number)
            tell(link, second, number)

    ends = simulate(plan("a.1 b.1", CrashSaying("b.1", 2, of="sec")), member, NETWORK)
    assert (ends["b.1"].doing, ends["b.1"].at_s) == ("second", 1.25)
    assert "during round 2" in str(ends["a.1"].error)
    assert ends["a.1"].how == "failed"


def test_one_that_is_started_again_is_another():
    again = Plan((*lives("a.1", "b.1"), Life("b.2", 3.0, after="b.1")), (Crash("b.1", 2.0),), rules=RULES, end_s=500.0)
    ends, log = play(again, rounds=12)
    assert groups(log, "a.1")[:2] == [("a.1", "b.1"), ("a.1", "b.2")]
    assert ends["b.2"].how == "returned"


def test_a_request_of_one_that_crashed_since_still_counts():
    """Its heart has just beaten: the others wait at the door in vain, and meet again."""
    several = Plan((Life("a.1", 2.0), Life("b.1", 2.0), Life("c.1")), (Crash("c.1", 1.0),), rules=Rules(2), end_s=500.0)
    ends, log = play(several, rounds=3)
    assert (ends["c.1"].how, ends["c.1"].doing) == ("crashed", "meeting")
    assert [entry[3:] for entry in log if entry[:2] == ("a.1", "met")] == [(("a.1", "b.1"), 12.0)]


def test_a_crash_at_the_door():
    several = Plan(lives("a.1", "b.1"), (Cut("a", "b", 0.0, 5.0), Crash("b.1", 3.0)), rules=RULES, end_s=500.0)
    ends, log = play(several, rounds=3)
    assert ends["b.1"].doing == "connecting"
    assert groups(log, "a.1") == [("a.1",)]


def test_one_that_is_stopped_is_silent_until_time_limits():
    """No reset: the others wait as long as they are patient, and go on without it.

    It comes back later, and finds what they told it then: it ends a round that they have done without it.
    """
    ends, log = play(plan("a.1 b.1 c.1", Stop("c.1", 1.5, 60.0)), rounds=60)
    assert losses(log, "a.1")[0] == ((2,), "lost member 2 during round 1: no answer within 20 simulated seconds", 22.25)
    assert groups(log, "a.1") == [("a.1", "b.1", "c.1"), ("a.1", "b.1"), ("a.1", "b.1", "c.1")]
    heard = [entry[2:] for entry in log if entry[:2] == ("c.1", "heard")]
    assert heard[:2] == [({0: 0, 1: 0}, 1.25), ({0: 1, 1: 1}, 60.0)]
    assert {end.how for end in ends.values()} == {"returned"}


def test_one_that_is_stopped_for_a_moment_is_waited_for():
    _, log = play(plan("a.1 b.1", Stop("b.1", 1.5, 9.0)))
    assert losses(log, "a.1") == losses(log, "b.1") == []
    assert [entry[3] for entry in log if entry[:2] == ("a.1", "heard")][1] == 9.25


def test_one_that_is_stopped_for_good_is_cut_short():
    ends, _ = play(plan("a.1 b.1", Stop("b.1", 1.5, math.inf)))
    assert (ends["a.1"].how, ends["b.1"].how, ends["b.1"].at_s) == ("returned", "cut short", 1000.0)


def test_a_cut_loses_messages_and_resets():
    """Between b and c alone: they lose each other when patience ends. a has heard both, and learns it when it meets."""
    _, log = play(plan("a.1 b.1 c.1", Cut("b", "c", 1.5, 4.0)))
    assert losses(log, "b.1")[0][:2] == ((2,), "lost member 2 during round 1: no answer within 20 simulated seconds")
    assert losses(log, "c.1")[0][0] == (1,)
    assert losses(log, "a.1") == []
    assert groups(log, "a.1") == [("a.1", "b.1", "c.1")] * 2


def test_who_is_cut_off_alone_is_lost_and_the_majority_goes_on():
    rules = Rules(2, join_timeout_s=60.0, heartbeat_timeout_s=5.0)
    ends, log = play(plan("a.1 b.1 c.1", Cut("c", None, 1.5, 1000.0), rules=rules, meeting_limit_s=100.0))
    assert groups(log, "a.1") == [("a.1", "b.1", "c.1"), ("a.1", "b.1")]
    assert groups(log, "c.1") == [("a.1", "b.1", "c.1")]
    assert ends["c.1"].how == "failed"
    with pytest.raises(MeetingLost, match=r"c.1: no gathering within 100 simulated seconds.*\n.*reached\n.*ask again"):
        raise ends["c.1"].error


def test_a_gathering_across_a_cut_does_not_connect():
    """Both reach the lighthouse, which puts them together again and again; when the cut ends, they connect."""
    ends, log = play(plan("a.1 b.1", Cut("a", "b", 0.0, 45.0)))
    assert groups(log, "a.1") == [("a.1", "b.1")]
    assert next(entry[4] for entry in log if entry[:2] == ("a.1", "met")) >= 45.0
    assert ends["b.1"].how == "returned"


def test_a_slow_host_is_late():
    _, log = play(plan("a.1 b.1", Slow("b", 3.0, 1.5, 2.5)))
    heard_s = {name: [entry[3] for entry in log if entry[:2] == (name, "heard")] for name in ("a.1", "b.1")}
    assert heard_s["a.1"][:3] == [1.25, 5.5, 6.75]
    assert heard_s["b.1"][1] == 2.5


def test_a_lighthouse_that_comes_back_has_forgotten_the_group():
    """Ids begin at 1 again, and the gathering of the same id and names goes on; one that comes later is seen by all."""
    several = Plan((*lives("a.1", "b.1"), Life("c.1", 12.0)), (Down(2.0, 9.0),), rules=RULES, end_s=500.0)
    ends, log = play(several, rounds=12)
    assert groups(log, "a.1") == [("a.1", "b.1"), ("a.1", "b.1", "c.1"), *groups(log, "a.1")[2:]]
    assert [entry[3] for entry in log if entry[:2] == ("a.1", "heard")][1:3] == [2.5, 11.75]
    assert {end.how for end in ends.values()} == {"returned"}


def test_a_reused_id_with_other_names_is_another_gathering():
    """c comes while the lighthouse is down: the first quorum after has id 1, as the one that a and b hold."""
    several = Plan((*lives("a.1", "b.1"), Life("c.1", 3.0)), (Down(2.0, 9.0),), rules=RULES, end_s=500.0)
    ends, log = play(several, rounds=12)
    assert groups(log, "a.1")[:2] == [("a.1", "b.1"), ("a.1", "b.1", "c.1")]
    assert all("talk" not in str(end.error) for end in ends.values())
    assert ends["c.1"].how == "returned"


def test_too_few_are_told_why():
    alone = plan("a.1", rules=Rules(2), meeting_limit_s=30.0)
    ends = simulate(alone, lambda meeting: meeting.meet())
    assert ends["a.1"].at_s == 30.0
    with pytest.raises(MeetingLost, match="within 30 simulated seconds: 1 members are there, 2 are needed"):
        raise ends["a.1"].error


def test_meeting_again_after_it_was_lost():
    def member(meeting):
        with pytest.raises(MeetingLost, match="the lighthouse is not reached"):
            meeting.meet()
        return meeting.meet().names

    ends = simulate(plan("a.1", Down(0.0, 40.0), meeting_limit_s=30.0), member)
    assert ends["a.1"].value == ("a.1",)


def test_nothing_is_heard_in_a_gathering_that_was_left():
    """b says that it broke: a, which waits there, learns it at once. The old link is shut for both."""

    def member(meeting):
        first = meeting.meet()
        channel = first.link.open("old")
        if meeting.name == "b.1":
            channel.exchange({0: torch.ones(4, dtype=torch.uint8)}, {}, "parting")
            first.link.local_step()
        else:
            with pytest.raises(PeerLost, match="lost member 1 during an answer: it gave up this gathering"):
                channel.exchange({}, {1: 4}, "the first") and channel.exchange({}, {1: 4}, "an answer")
            assert first.link.now() == 1.0
        second = meeting.meet(broken=True)
        assert second is not first
        assert (first.number, second.number) == (1, 2)
        with pytest.raises(PeerLost, match=r"during afterwards: it gave up this gathering"):
            channel.exchange({}, {1 - first.link.rank: 4}, "afterwards")
        return tell(second.link, second.link.open("new"), 7)

    ends = simulate(plan("a.1 b.1"), member, NETWORK)
    assert {name: end.value for name, end in ends.items()} == {"a.1": {1: 7}, "b.1": {0: 7}}, ends


def test_a_job_that_waits_in_a_gathering_ends_with_it():
    def member(meeting):
        first = meeting.meet()
        if meeting.name == "a.1":
            job = first.link.spawn(lambda: first.link.open("job").exchange({}, {1: 4}, "a job"), "job")
            first.link.local_step()
            meeting.meet(broken=True)
            with pytest.raises(PeerLost, match="during a job: it gave up this gathering"):
                job.wait()
        else:
            meeting.meet(broken=True)
        meeting.close()
        meeting.close()

    ends = simulate(plan("a.1 b.1"), member, NETWORK)
    assert {end.how for end in ends.values()} == {"returned"}, ends


def test_jobs_end_with_their_process_and_nobody_is_left():
    before = threading.active_count()
    seen = []

    def member(meeting):
        link = meeting.meet().link

        def job():
            try:
                for _ in range(100):
                    link.local_step()
                    seen.append((meeting.name, link.now()))
            finally:
                seen.append((meeting.name, "unwound"))

        job = link.spawn(job, "job")
        link.local_step()
        if meeting.name == "b.1":
            job.wait()

    ends = simulate(plan("a.1 b.1", Crash("b.1", 5.5)), member, NETWORK)
    assert ends["a.1"].how == "returned"
    assert [entry for entry in seen if entry[0] == "a.1"] == [("a.1", "unwound")], (
        "it ended before the job's first step"
    )
    assert [entry for entry in seen if entry[0] == "b.1"] == [("b.1", float(s)) for s in range(1, 6)] + [
        ("b.1", "unwound")
    ]
    assert threading.active_count() == before


def test_a_crashed_process_says_nothing_while_it_unwinds():
    def member(meeting):
        link = meeting.meet().link
        channel = link.open("talk")
        if meeting.name == "a.1":
            return channel.exchange({}, {1: 4}, "last words")
        try:
            link.local_step()
        finally:
            channel.exchange({0: torch.ones(4, dtype=torch.uint8)}, {}, "last words")

    ends = simulate(plan("a.1 b.1", Crash("b.1", 0.5)), member, NETWORK)
    assert "connection reset" in str(ends["a.1"].error)


def test_a_life_that_never_begins_is_left_out():
    assert list(simulate(Plan((Life("a.1"), Life("b.1", 2000.0)), end_s=10.0), lambda meeting: None)) == ["a.1"]


def test_hosts_have_rates_of_their_own_in_the_order_of_their_names():
    """The second life of a host has the same."""

    def member(meeting):
        link = meeting.meet().link
        link.local_step()
        return link.now()

    several = Plan((Life("b.1"), Life("a.1"), Life("a.2", 5.0, after="a.1")), rules=RULES, end_s=500.0)
    ends = simulate(several, member, Network(step_s=[3.0, 7.0]))
    assert (ends["a.1"].value, ends["b.1"].value) == (3.0, 7.0)
    assert ends["a.2"].value == ends["a.2"].at_s
    assert [end.how for end in ends.values()] == ["returned"] * 3


def chaos(seed):
    draw = random.Random(seed)
    hosts = "abcd"
    first = [Life(f"{host}.1", draw.choice([0.0, 0.0, 3.0])) for host in hosts]
    again = [Life(f"{host}.2", draw.uniform(1, 9), after=f"{host}.1") for host in hosts[1:]]
    faults = [
        CrashSaying("b.1", draw.randrange(6), sent=draw.randrange(3)),
        Crash("c.1", draw.uniform(1, 20)),
        Stop("d.1", draw.uniform(1, 9), draw.uniform(9, 30)),
        Cut(draw.choice(hosts), draw.choice([None, "lighthouse", "a"]), draw.uniform(10, 20), draw.uniform(20, 40)),
        Slow("a", draw.uniform(0, 2), 0.0, 50.0),
        Down(draw.uniform(0, 30), draw.uniform(30, 60)),
    ]
    return Plan((*first, *again), tuple(faults), rules=RULES, end_s=3000.0)


@pytest.mark.parametrize("seed", range(6))
def test_the_same_call_gives_the_same_log(seed):
    network = Network(up_bits_per_s=1e4, latency_s=0.1, jitter=0.5, step_s=[1.0, 1.5, 0.7, 2.0], patience_s=20.0)
    first, second = play(chaos(seed), network=network), play(chaos(seed), network=network)
    assert first[1] == second[1]
    assert repr(first[0]) == repr(second[0])
    assert any(end.how == "returned" for end in first[0].values())
    assert any(end.how == "crashed" for end in first[0].values())


@pytest.mark.parametrize(
    ("names", "faults", "options", "error"),
    [
        ("a", (), {}, r"a life is named 'a'\n.*the host, a point and a number.*\n.*'a.1'"),
        ("a.1 a.1", (), {}, "a life is named 'a.1'"),
        ("lighthouse.1", (), {}, "a life is named 'lighthouse.1'"),
        ("a.1", (Crash("b.1", 1.0),), {}, r"speaks of 'b.1'\n.*one of a.1\n.*correct the name"),
        ("a.1", (Stop("b.1", 1.0, 2.0),), {}, "speaks of 'b.1'"),
        ("a.1", (CrashSaying("b.1", 1),), {}, "speaks of 'b.1'"),
        ("a.1", (Cut("a.1", None, 1.0, 2.0),), {}, r"speaks of 'a.1'\n.*one of a, lighthouse"),
        ("a.1", (Cut("a", "c", 1.0, 2.0),), {}, "speaks of 'c'"),
        ("a.1", (Slow("c", 1.0, 1.0, 2.0),), {}, "speaks of 'c'"),
        ("a.1", (), {"end_s": math.inf}, r"a simulation without an end\n.*a finite end_s"),
    ],
)
def test_plans_that_make_no_sense(names, faults, options, error):
    with pytest.raises(ConfigError, match=error):
        plan(names, *faults, **options)
    with pytest.raises(ConfigError, match=r"speaks of 'z\.1'"):
        Plan((Life("a.1", after="z.1"),))
