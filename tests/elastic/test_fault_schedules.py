"""Random schedules of faults, played through with the real synchronizer: what must hold whatever happens.

    members that count a round hold the same bits after it
    every local step is counted once or not at all, and what a round makes of it is what the members counted say
    a crash costs the steps since the crashed member's last round, and other members nothing
    who is cut off alone commits nothing; nobody waits for ever; whoever is left ends together, with one model

All is in churn.py. A seed that fails is a test of its own to be.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from churn import Case, Heard, check, play, schedule, struck

from thinwire.codecs import ErrorFeedback, ef21, int4, int8, powersgd, topk
from thinwire.elastic.quorum import Rules
from thinwire.elastic.schedules import Crash, CrashSaying, Life, Plan, Stop
from thinwire.links.network import Network
from thinwire.methods import delayed, diloco, eager, every_step, local_sgd, noloco, streaming_diloco
from thinwire.pace import BySpeed
from thinwire.schedules import Every, Paced

CASES = {
    "every step": Case(every_step(), 2),
    "local sgd": Case(local_sgd(every=4), 4, exact=True),
    "diloco": Case(diloco(every=4), 4),
    "averages": Case(diloco(every=4, outer_lr=1.0, momentum=0.0), 4, exact=True),
    "overlap": Case(replace(diloco(every=4), schedule=Every(4, overlap=2)), 7, again=4),
    "delayed": Case(delayed(every=4), 9, again=4),
    "eager": Case(eager(every=4), 9, again=4),
    "streaming": Case(streaming_diloco(every=4, fragments=2, overlap=1), 6, again=4),
    "feedback": Case(diloco(every=4, codec=ErrorFeedback(int4())), 4),
    "feedback, selected": Case(diloco(every=4, codec=ErrorFeedback(topk(0.25) | int8())), 4),
    "estimates": Case(diloco(every=4, codec=ef21(int4)), 4),
    "pairs": Case(noloco(every=4), 4, alike=False),
    "staged": Case(diloco(every=4, codec=powersgd(1)), 4),
    "paced": Case(replace(diloco(every=4), schedule=Paced(Every(4), BySpeed())), 8),
}
NETWORK = Network(latency_s=0.1, step_s=[1.0, 1.1, 0.9], patience_s=20.0)
DURATION_S = 35.0


def three(*faults, **options):
    """Three members that begin together."""
    lives = tuple(map(Life, ("a.1", "b.1", "c.1")))
    return Plan(
        (*lives, *options.pop("again", ())), faults, rules=Rules(1, join_timeout_s=30.0), tick_s=0.5, end_s=2000.0
    )


def goes_well(case, seed):
    plan, network = schedule(seed, DURATION_S)
    played = play(CASES[case], plan, network)
    try:
        check(CASES[case], played)
    except AssertionError as error:
        raise AssertionError(f"seed {seed}: {error}") from error
    return played


@pytest.mark.parametrize("case", CASES)
def test_what_must_hold_holds_without_faults(case):
    played = play(CASES[case], three(), NETWORK)
    check(CASES[case], played)
    assert [end.how for end in played.ends.values()] == ["returned"] * 3
    assert all(len(log.changes) == 1 for log in played.logs.values())
    assert case == "every step" or len(played.logs["a.1"].heard) in (5, 6)


@pytest.mark.parametrize("case", CASES)
def test_a_schedule(case):
    """One for every method, each another: the slow test below has them by the hundred."""
    goes_well(case, 1000 + list(CASES).index(case))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(0, 16, 4))
@pytest.mark.parametrize("case", CASES)
def test_random_schedules(case, seed):
    for each in range(seed, seed + 4):
        goes_well(case, each)


@pytest.mark.parametrize(
    ("case", "exchanges"),
    [
        ("averages", range(0, 9, 4)),
        pytest.param("averages", range(20), marks=pytest.mark.slow),
        pytest.param("overlap", range(20), marks=pytest.mark.slow),
        pytest.param("every step", range(20), marks=pytest.mark.slow),
    ],
)
def test_a_crash_in_any_exchange(case, exchanges):
    """Before any of its messages was sent, when one has heard it, and when all have."""
    where = Counter()
    for number in exchanges:
        for sent in range(3):
            again = (Life("b.2", 3.0, after="b.1"),) if (number + sent) % 2 else ()
            played = play(CASES[case], three(CrashSaying("b.1", number, sent=sent), again=again), NETWORK, steps=12)
            where += Counter({label: count for (_, label), count in struck(played).items()})
            try:
                check(CASES[case], played)
            except AssertionError as error:
                raise AssertionError(f"exchange {number}, {sent} sent: {error}") from error
            began = bool(played.logs["a.1"].run)
            assert began or again, "members that come again before there is a run may not begin it, and say so"
            if case != "overlap" and began:  # a round that broke is done again before the next local step
                rounds = {heard.round for log in played.logs.values() for heard in log.heard}
                assert rounds == set(range(12 if case == "every step" else 3))
    assert len(exchanges) < 20 or {"handshake json", "said with rounds said", "rounds fp32", "rounds verdict"} <= {
        *where
    }


def test_the_same_schedule_gives_the_same_logs():
    first, second = goes_well("averages", 3), goes_well("averages", 3)
    assert first.logs.keys() == second.logs.keys()
    for name, log in first.logs.items():
        other = second.logs[name]
        assert (log.heard, log.held, log.changes, log.end) == (other.heard, other.held, other.changes, other.end)


# --- what the schedules have found -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["averages", "feedback"])
def test_a_round_left_to_newcomers_alone_is_passed_over(case):
    """b comes into a round done again after c's crash, a crashes in it, and nobody is left who has anything to say."""
    lives = Life("a.1"), Life("c.1"), Life("b.1", 5.0)
    faults = CrashSaying("c.1", 1, of="verdict"), CrashSaying("a.1", 2, of="said")
    plan = Plan(lives, faults, rules=Rules(1, join_timeout_s=30.0), tick_s=0.5, end_s=500.0)
    played = play(CASES[case], plan, NETWORK)
    check(CASES[case], played)
    assert [end.how for end in played.ends.values()] == ["crashed", "returned", "crashed"]
    assert played.logs["b.1"].changes[0].healed
    assert played.logs["b.1"].changes[1].names == ("b.1",)


# --- that what must hold is looked for -------------------------------------------------------------------------------


def counted_twice(played):
    last = played.logs["a.1"].heard[-1]
    last.said["b.1"] = last.said["b.1"][0] + 4, 0


def counted_backwards(played):
    last = played.logs["a.1"].heard[-1]
    last.said["b.1"] = 1, 0


def not_counted(played):
    for log in played.logs.values():
        log.heard[2] = replace(log.heard[2], counted=("a.1", "b.1"))


def another_state(played):
    log = played.logs["b.1"]
    log.held[list(log.held)[2]] = "another"


def another_end(played):
    played.logs["c.1"].end = 24, "another"


def a_minority(played):
    found = played.logs["b.1"].heard[3]
    played.logs["b.1"].heard[3] = Heard(found.run, found.epoch, found.round, (), found.counted, found.said)


def given_the_state(played):
    log = played.logs["c.1"]
    log.changes.append(replace(log.changes[0], healed=True))


def failed(played):
    played.ends["c.1"] = replace(played.ends["c.1"], how="failed", error=ValueError("oh"))


def cut_short(played):
    played.ends["c.1"] = replace(played.ends["c.1"], how="cut short")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (counted_twice, "b.1: the model has 8 of its steps, 9.33"),
        (counted_backwards, "b.1 counts steps of before"),
        (not_counted, "the model has 8 of its steps"),
        (another_state, "hold different states after"),
        (another_end, "'another'"),
        (a_minority, "a minority committed"),
        (given_the_state, "c.1 was given the state, and lost its own"),
        (failed, r"c.1 failed at 2.*ValueError\('oh'\)"),
        (cut_short, "c.1 cut short"),
    ],
)
def test_what_does_not_hold_is_found(change, error):
    played = play(CASES["averages"], three(), NETWORK)
    change(played)
    with pytest.raises(AssertionError, match=error):
        check(CASES["averages"], played)


def test_a_crash_that_costs_too_much_is_found():
    played = play(CASES["averages"], three(Crash("b.1", 9.0)), NETWORK)
    check(CASES["averages"], played)
    played.logs["b.1"].made += 4
    with pytest.raises(AssertionError, match=r"b\.1 lost 8 local steps"):
        check(CASES["averages"], played)


def test_who_was_stopped_for_long_is_given_the_state_and_loses_its_steps():
    """That what must hold holds there too is not for want of anything happening."""
    rules = Rules(2, join_timeout_s=30.0)
    played = play(CASES["averages"], replace(three(Stop("c.1", 6.0, 36.0)), rules=rules), NETWORK)
    check(CASES["averages"], played)
    assert any(change.healed for change in played.logs["c.1"].changes[1:])
    assert played.ends["c.1"].how == "returned"
