"""The protocol of elastic meetings in virtual time: whatever happens to whom, all hold one log."""

from __future__ import annotations

import random
from functools import lru_cache

import pytest
from virtual_store import FACTS, Person, Think, World, codes_of

from thinwire.errors import ConfigError, LinkError, PacketError
from thinwire.seeds.closed import Closed
from thinwire.seeds.elastic import PIECE, Member
from thinwire.seeds.standing import Pace, Standing

NEVER = float("inf")


def check_one_log(people):
    """Logs are beginnings of the longest, without gaps, and hold what members said under their own ids."""
    longest = max((person.log for person in people), key=len)
    standing = Standing()
    for person in people:
        assert person.log == longest[: len(person.log)]
    for number, closed in enumerate(longest):
        assert closed.number == number
        assert all(code == codes_of(number, member) for member, code in closed.codes.items())
        if number:
            assert {*closed.codes, *closed.left} == {*standing.roster}, "everybody on the roster is in or out"
        standing = standing.after(closed, b"")
    owners = [member for person in people for member in person.ids]
    assert len(set(owners)) == len(owners), "an id is one member's"
    return longest


def check_all_arrived(world, people):
    for actor, person in zip(world.actors, people, strict=True):
        assert actor.dead or person.member.standing.number >= min(person.until, person.leaves_at)


def three(world, rounds=12, **options):
    return [Person(world, rounds, lambda number: 0.3, at_least=3, **options) for _ in range(3)]


# --- without faults -------------------------------------------------------------------------------------------------


def test_members_from_the_beginning_to_the_end_hold_one_log():
    world = World(0)
    people = [Person(world, 20, lambda number: 0.3, at_least=4) for _ in range(4)]
    for index, person in enumerate(people):
        world.start(person.life(founds=index == 0))
    world.run(100)
    log = check_one_log(people)
    assert [len(closed.codes) for closed in log] == [1] + [4] * 19
    assert log[0].joined == (1, 2, 3)
    assert all(not closed.left for closed in log)
    assert all(closed.lr == 0.5 for closed in log)


def test_a_founder_alone_goes_on_alone_and_waits_for_nobody():
    world = World(0, latency_s=0.0)
    person = Person(world, 30, lambda number: 1.0)
    world.start(person.life(founds=True, keeps=True))
    world.run(31)
    assert len(check_one_log([person])) == 30


def test_a_founder_waits_for_as_many_as_it_was_told_and_not_for_ever():
    world = World(0)
    person = Person(world, 3, lambda number: 0.1, at_least=2)
    world.start(person.life(founds=True))
    world.run(person.pace.most_s + 5)
    assert world.now > person.pace.most_s, "it waited"
    assert len(person.log) == 3


def test_a_newcomer_replays_the_log_in_few_round_trips():
    world = World(1, latency_s=0.01)
    founder = Person(world, 400, lambda number: 0.1)
    world.start(founder.life(founds=True))
    late = Person(world, 400, lambda number: 0.1)
    world.start(late.life(), at=50.0)
    world.run(200)
    log = check_one_log([founder, late])
    came = next(closed.number for closed in log if closed.joined)
    assert came > 4 * PIECE
    assert late.follows <= 5, "pieces, what came meanwhile, and the round that admits it"
    assert all(1 in closed.codes for closed in log[came + 1 :])


def test_who_leaves_is_not_waited_for():
    world = World(2)
    people = three(world)
    people[1].leaves_at = 6
    for index, person in enumerate(people):
        world.start(person.life(founds=index == 0))
    world.run(20)
    log = check_one_log(people)
    check_all_arrived(world, people)
    assert log[6].left == (1,)
    assert 1 not in log[6].codes
    assert world.now < 12 * 0.3 + 6


def test_the_store_stays_small():
    """Two rounds of scalars, 128 records, the pieces; what those who died left behind is deleted by others."""
    world = World(3, latency_s=0.01)
    people = [Person(world, 500, lambda number: 0.1, at_least=5) for _ in range(5)]
    for index, person in enumerate(people):
        world.start(person.life(founds=index == 0), dies_after=300 if index == 3 else NEVER)
    world.run(200)
    check_one_log(people)
    kinds = [key.split("/")[0] for key in world.values]
    assert kinds.count("s") <= 2 * 5
    assert kinds.count("r") == 2 * PIECE
    assert kinds.count("p") == 500 // PIECE
    assert kinds.count("h") == 0
    (dead,) = people[3].ids
    assert world.actors[3].dead
    assert not [key for key in world.values if key.startswith("s/") and key.endswith(f"/{dead}")]


# --- faults ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("victim", "last"), [(0, 70), (1, 40)])
def test_dying_at_any_operation_harms_nobody(victim, last):
    """The founder closes every round: among its operations are those between scalars, proposal and publication."""
    for dies_after in range(8, last):
        world = World(dies_after)
        people = three(world)
        for index, person in enumerate(people):
            world.start(person.life(founds=index == 0), dies_after=dies_after if index == victim else NEVER)
        world.run(200)
        check_one_log(people)
        check_all_arrived(world, people)
        assert world.actors[victim].dead


def test_a_record_whose_proposer_died_before_publishing_it_counts(monkeypatch):
    """Its proposal is in head: the next one to propose finds it there and publishes it."""
    world = World(4)
    people = three(world)
    for index, person in enumerate(people):
        world.start(person.life(founds=index == 0))
    founder = world.actors[0]
    arrive = world._arrive

    def dies_with_the_fifth_proposal(actor, op):
        if actor is founder and getattr(op, "key", "") == "head" and Closed.from_bytes(op.desired).number == 5:
            actor.dead = True
        arrive(actor, op)

    monkeypatch.setattr(world, "_arrive", dies_with_the_fifth_proposal)
    world.run(200)
    log = check_one_log(people)
    check_all_arrived(world, people)
    assert set(log[5].codes) == {0, 1, 2}, "what it proposed"
    assert log[6].left == (0,)


def test_who_takes_over_publishes_what_it_found_first(monkeypatch):
    """One that waits to join knows round 5 from head alone and closes round 6; one of the roster still asks for 5."""
    world = World(4)
    people = [Person(world, 12, lambda number: 0.3, at_least=2) for _ in range(2)]
    people[1].step_s = lambda number: 300.0 if number == 5 else 0.3
    late = Person(world, 12, lambda number: 0.3)
    for index, person in enumerate(people):
        world.start(person.life(founds=index == 0))
    arrive = world._arrive

    def dies_with_the_fifth_proposal(actor, op):
        if actor is world.actors[0] and getattr(op, "key", "") == "head" and Closed.from_bytes(op.desired).number == 5:
            actor.dead = True
            world.start(late.life(), at=world.now + 1.0)
        arrive(actor, op)

    monkeypatch.setattr(world, "_arrive", dies_with_the_fifth_proposal)
    world.run(900)
    people.append(late)
    log = check_one_log(people)
    check_all_arrived(world, people)
    assert log[6].joined
    assert not log[6].codes
    assert people[1].log[:7] == log[:7]


def test_a_hello_that_comes_after_that_of_a_later_one_is_said_again(monkeypatch):
    """The record admits an id beyond this member's own: it was passed over, and asks with another."""
    world = World(12)
    people = three(world, rounds=30)
    for person in people:
        person.at_least = 1
    world.start(people[0].life(founds=True))
    world.start(people[1].life(), at=1.0)
    world.start(people[2].life(), at=1.5)
    arrive = world._arrive

    def slow_hello(actor, op):
        if getattr(op, "key", "") == "h/1" and type(op).__name__ == "Put":
            world._at(world.now + 3.0, lambda: arrive(actor, op))
        else:
            arrive(actor, op)

    monkeypatch.setattr(world, "_arrive", slow_hello)
    world.run(100)
    log = check_one_log(people)
    check_all_arrived(world, people)
    assert people[1].ids == [3]
    assert not any(1 in closed.codes or 1 in closed.joined for closed in log)


def test_several_who_close_at_once_take_one_record():
    """Without any patience all members close every round, each with what it finds; the first proposal counts."""

    class Hasty(Pace):
        def patience_s(self, rounds_s):
            return 0.01

    hasty, lost = Hasty(), 0
    for seed in range(20):
        world = World(seed)
        people = [Person(world, 30, lambda number: 0.1, pace=hasty, at_least=4) for _ in range(4)]
        for index, person in enumerate(people):
            world.start(person.life(founds=index == 0))
        world.run(500)
        log = check_one_log(people)
        check_all_arrived(world, people)
        lost += sum(len(closed.left) for closed in log)
    assert lost > 20, "they do overtake each other"


@pytest.mark.parametrize("sleeper", [0, 2])
def test_who_sleeps_through_hundreds_of_rounds_comes_back_with_the_log_of_the_others(sleeper):
    """Its round's record was deleted meanwhile: the pieces have it, and nothing it proposes takes hold."""
    world = World(5, latency_s=0.01)
    people = [Person(world, 420, lambda number: 0.1, at_least=3) for _ in range(3)]
    people[sleeper].step_s = lambda number: 35.0 if number == 10 else 0.1
    for index, person in enumerate(people):
        world.start(person.life(founds=index == 0))
    world.run(500)
    log = check_one_log(people)
    check_all_arrived(world, people)
    assert log[10].left == (sleeper,)
    assert len(people[sleeper].ids) == 2
    assert next(n for n, closed in enumerate(log) if people[sleeper].ids[1] in closed.joined) > 10 + 2 * PIECE


def test_one_that_never_keeps_up_pauses_for_longer_every_time():
    world = World(6, latency_s=0.01)
    people = [Person(world, 400, lambda number: 0.1, at_least=2) for _ in range(2)]
    people[1].step_s = lambda number: 0.1 if number < 10 else 3.0
    for index, person in enumerate(people):
        world.start(person.life(founds=index == 0))
    world.run(500)
    log = check_one_log(people)
    back = [closed.number for closed in log if closed.joined]
    assert len(back) < 10
    assert back[-1] - back[-2] > 3 * (back[2] - back[1])


def test_if_all_on_the_roster_died_those_who_wait_go_on():
    world = World(7)
    people = [Person(world, 12, lambda number: 0.3) for _ in range(3)]
    for index, person in enumerate(people):
        world.start(
            person.life(founds=index == 0), at=0.0 if index == 0 else 1.5, dies_after=20 if index == 0 else NEVER
        )
    world.run(400)
    log = check_one_log(people)
    check_all_arrived(world, people)
    assert any(not closed.codes and closed.joined and closed.left == (0,) for closed in log)


def random_schedule(seed, members=8, rounds=40):
    """Members with fates drawn from a seed: late, slow, dying at any operation, leaving; puts come twice."""
    draw = random.Random(seed)
    world = World(seed, latency_s=draw.choice([0.001, 0.05, 0.3]), copies=0.05)
    people = []
    for index in range(members):
        slow = draw.choice([1, 1, 1, 1, 3, 30])
        jitter = random.Random(draw.random())
        person = Person(world, rounds, lambda number, s=slow, j=jitter: s * j.uniform(0.05, 0.2))
        if draw.random() < 0.3:
            person.leaves_at = draw.randrange(1, rounds)
        dies = draw.choice([draw.randrange(8 if index == 0 else 3, 150), NEVER, NEVER])
        world.start(person.life(founds=index == 0), at=draw.uniform(0, 5) if index else 0.0, dies_after=dies)
        people.append(person)
    world.run(5000)
    return world, people


@pytest.mark.parametrize("base", range(0, 300, 50))
def test_any_schedule_of_faults_ends_with_one_log(base):
    for seed in range(base, base + 50):
        world, people = random_schedule(seed)
        check_one_log(people)
        check_all_arrived(world, people)


def test_64_members_with_churn_agree(monkeypatch):
    """Every ten rounds a tenth of them go, half of those without goodbye, and as many come; some are slow at times."""
    monkeypatch.setattr(Closed, "from_bytes", lru_cache(1000)(Closed.from_bytes))  # all read the same ones
    draw = random.Random(64)
    world = World(64, latency_s=0.05)
    rounds, people = 300, []

    def comes(at, founds=False, **fate):
        jitter = random.Random(draw.random())
        person = Person(world, rounds, lambda n: 12.0 if jitter.random() < 0.001 else jitter.uniform(0.5, 1.0), **fate)
        world.start(person.life(founds=founds), at=at)
        people.append(person)
        return person

    comes(0.0, founds=True, at_least=64)
    for _ in range(63):
        comes(draw.uniform(0, 2))
    crashes = {}
    for number in range(10, rounds, 10):
        for person in draw.sample([p for p in people[1:] if p.leaves_at == NEVER and p not in crashes.values()], 6):
            person.leaves_at = number + draw.randrange(10)
            if draw.random() < 0.5:
                crash(person)
            comes(at=1.3 * number)
    world.run(10_000)
    log = check_one_log(people)
    assert len(log) == rounds
    standing = [person for person in people if len(person.log) == rounds]
    assert len(standing) > 40
    assert sum(len(closed.joined) for closed in log) > 150
    assert sum(len(closed.left) for closed in log) > 100


def crash(person):
    """It stops in the middle of the round in which it would have left."""
    at, person.leaves_at, step_s = person.leaves_at, NEVER, person.step_s
    person.step_s = lambda number: NEVER if number >= at else step_s(number)


# --- what is refused ------------------------------------------------------------------------------------------------


def test_a_member_with_other_facts_is_refused_with_what_differs():
    world = World(0)
    world.start(Person(world, 2, lambda number: 0.1).life(founds=True))

    def stranger(facts):
        with pytest.raises(ConfigError, match=facts.pop("told")):
            yield from Member().meet(facts)

    world.start(stranger({**FACTS, "base": "other", "told": "base: this member has other, the run b\n"}), at=1.0)
    world.start(stranger({**FACTS, "told": "version: this member has 9, the run v", "version": "9"}), at=1.0)
    world.start(stranger({"recipe": "r", "version": "v", "told": "base: this member has nothing, the run b"}), at=1.0)
    world.run(100)


def test_a_meeting_without_a_founder_ends_in_a_sentence():
    world = World(0)

    def waits():
        with pytest.raises(LinkError, match="nobody founded a run here within 3 s"):
            yield from Member(Pace(most_s=3.0)).meet(FACTS)

    world.start(waits())
    world.run(10)


def test_what_is_none_of_ours_is_refused():
    world = World(0)
    world.values["run"] = b"\xff"

    def waits():
        with pytest.raises(PacketError, match="under `run`"):
            yield from Member().meet(FACTS)

    world.start(waits())
    world.run(10)


def test_a_store_has_one_run():
    world = World(0)
    world.start(Person(world, 2, lambda number: 0.1).life(founds=True))

    def second():
        yield Think(1.0)
        with pytest.raises(ConfigError, match="a run was founded here already"):
            yield from Member().found(FACTS)

    world.start(second())
    world.run(10)


def test_a_round_out_of_order_is_refused():
    world = World(0)

    def founder():
        member = Member()
        with pytest.raises(ConfigError, match="round 0 asked of a member that is not on the roster"):
            yield from member.round(0, b"x", 1.0)
        yield from member.found(FACTS)
        with pytest.raises(ConfigError, match="round 1 asked of a member that is in round 0"):
            yield from member.round(1, b"x", 1.0)
        with pytest.raises(ConfigError, match="no codes for round 0"):
            yield from member.round(0, b"", 1.0)
        with pytest.raises(ConfigError, match="round 0 with a learning rate of -1"):
            yield from member.round(0, b"x", -1.0)

    world.start(founder())
    world.run(10)


def test_codes_of_another_length_are_not_taken():
    """Members agree on the number of scalars; one that says more or less of them is out, and the others go on."""
    world = World(8)
    people = three(world, rounds=8)
    for index, person in enumerate(people):
        world.start(person.life(founds=index == 0))
    set_, done = world._set, []

    def with_a_longer_one(key, value):
        if key == "s/4/1":
            done.append(value)
            value += b"more"
        set_(key, value)

    world._set = with_a_longer_one
    world.run(100)
    log = check_one_log(people)
    assert done
    assert log[4].left == (1,)
    assert set(log[4].codes) == {0, 2}


@pytest.mark.parametrize("options", [{"factor": 1.0}, {"least_s": 0.0}, {"least_s": 5.0, "most_s": 4.0}])
def test_patience_is_checked(options):
    with pytest.raises(ConfigError, match="expected  a factor above 1, and 0 < least_s <= most_s"):
        Pace(**options)


def test_patience_follows_what_rounds_take():
    pace = Pace(factor=3.0, least_s=2.0, most_s=50.0)
    assert pace.patience_s([]) == pace.patience_s([1.0, 1.0]) == 50.0
    assert pace.patience_s([1.0, 4.0, 2.0]) == 6.0
    assert pace.patience_s([0.1] * 5) == 2.0
    assert pace.patience_s([100.0] * 5) == 50.0


# --- going on from a log --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, PIECE - 1, PIECE, PIECE + 1, 200])
def test_a_run_goes_on_from_a_log(length):
    """Who comes replays the old rounds as well; ids go on, and nobody of the old roster is waited for."""
    past = tuple(
        Closed(number, 0.5, {member: codes_of(number, member) for member in range(3)}) for number in range(length)
    )
    world = World(9)
    founder, other = (Person(world, length + 10, lambda number: 0.2, at_least=2) for _ in range(2))
    world.start(founder.life(founds=True, past=past))
    world.start(other.life())
    world.run(100)
    assert founder.log == other.log
    assert tuple(founder.log[:length]) == past
    assert founder.ids == [3]
    assert other.ids == [4]
    assert [set(closed.codes) for closed in founder.log[length:]] == [{3}] + [{3, 4}] * 9


def test_a_log_with_a_gap_is_refused():
    world = World(0)

    def founder():
        with pytest.raises(ConfigError, match="round 2 of a log in place 1"):
            yield from Member().found(FACTS, [Closed(0, 1.0, {0: b"a"}), Closed(2, 1.0, {0: b"a"})])

    world.start(founder())
    world.run(10)


def test_who_keeps_the_store_stays_until_the_others_left():
    world = World(10)
    people = three(world, rounds=20)
    people[0].leaves_at = 5
    for index, person in enumerate(people):
        world.start(person.life(founds=index == 0, keeps=index == 0))
    ends = []
    world.actors[0].life = _noting(world, world.actors[0].life, ends)
    world.run(100)
    check_one_log(people)
    assert people[0].member.standing.number == 20, "it read on"
    assert len(people[1].log) == len(people[2].log) == 20
    assert ends[0] <= world.now


def _noting(world, life, ends):
    yield from life
    ends.append(world.now)


def test_who_keeps_the_store_does_not_wait_for_the_dead():
    world = World(11)
    people = three(world, rounds=20)
    people[0].leaves_at = 5
    for index, person in enumerate(people):
        life = person.life(founds=index == 0, keeps=index == 0)
        world.start(life, dies_after=NEVER if index == 0 else 60)
    world.run(300)
    assert world.actors[0].ended
