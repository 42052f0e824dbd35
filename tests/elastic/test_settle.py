"""What members make of a gathering follows from their words alone."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from thinwire.elastic.settle import FragmentWord, Word, judge, majority

FACTS = {"version": "1", "model": "m"}


def word(*ended: int, epoch=3, step=50, redo=None, facts=FACTS, doubt="", last="d") -> Word:
    places = tuple(FragmentWord(count, (0, 1), last, doubt) for count in ended)
    return Word(facts, epoch, step, places, redo or {})


def test_members_that_are_level_go_on_as_they_are():
    ruling = judge({0: word(5, 4), 1: word(5, 4), 2: word(5, 4)})
    assert (ruling.epoch, ruling.step) == (4, 50)
    assert not ruling.behind
    assert not ruling.certain
    assert not ruling.refused


def test_a_newcomer_is_behind_though_no_round_was_ended():
    ruling = judge({0: word(0), 1: word(0, epoch=0, step=0), 2: word(0)})
    assert ruling.behind == {1}


def test_whoever_is_in_doubt_ends_what_another_has_ended():
    ruling = judge({0: word(6, last="same"), 1: word(5, doubt="same"), 2: word(5, doubt="same")})
    assert ruling.certain == {1: (0,), 2: (0,)}
    assert ruling.present == {0: (0, 1)}
    assert not ruling.behind


def test_a_round_that_nobody_ended_is_forgotten_by_all():
    ruling = judge({0: word(5, doubt="a", redo={0: 5}), 1: word(5, doubt="a", redo={0: 5})})
    assert not ruling.certain
    assert not ruling.behind
    assert ruling.redo == (0,)


def test_a_round_in_doubt_with_another_result_is_not_ended():
    ruling = judge({0: word(6, last="same"), 1: word(5, doubt="other")})
    assert ruling.behind == {1}


def test_two_rounds_behind_is_behind():
    assert judge({0: word(7, last="same"), 1: word(5, doubt="same")}).behind == {1}


def test_a_minority_that_ended_more_rounds_is_behind_those_who_settled_since():
    ruling = judge({0: word(9, epoch=3), 1: word(6, epoch=4), 2: word(6, epoch=4)})
    assert ruling.behind == {0}
    assert ruling.epoch == 5


def test_an_older_epoch_with_the_same_rounds_is_left_to_the_digests():
    assert not judge({0: word(6, epoch=3), 1: word(6, epoch=4)}).behind


def test_rounds_begin_again_where_the_furthest_are():
    ruling = judge({0: word(6, 4, step=60, redo={0: 5, 1: 4}), 1: word(6, 4, step=50, redo={0: 6})})
    assert ruling.step == 60
    assert ruling.redo == (1,), "of fragment 0 round 5 was ended, and member 1 is not where all go on"


def test_at_the_beginning_the_furthest_checkpoint_counts():
    ruling = judge({0: word(0, epoch=0, step=0), 1: word(2, epoch=0, step=20), 2: word(1, epoch=0, step=10)})
    assert ruling.behind == {0, 2}
    assert ruling.step == 20


def test_who_means_something_else_is_refused_and_told_why():
    other = {**FACTS, "method.codec": "int4"}
    ruling = judge({0: word(5), 1: word(5, epoch=0, facts=other), 2: word(5)})
    assert ruling.refused == {1: "method.codec: int4; the run has nothing"}
    assert not ruling.behind


def test_newcomers_in_the_majority_do_not_overrule_the_run():
    other = {**FACTS, "version": "2"}
    words = {0: word(5)} | {rank: word(0, epoch=0, facts=other) for rank in (1, 2, 3)}
    assert set(judge(words).refused) == {1, 2, 3}


def test_members_that_each_mean_something_else_leave_one():
    facts = ({"a": "1", "b": "2", "c": "2"}, {"a": "2", "b": "1", "c": "2"}, {"a": "2", "b": "2", "c": "1"})
    ruling = judge({rank: word(5, facts=each) for rank, each in enumerate(facts)})
    assert len(ruling.refused) == 2


def test_one_whose_model_is_a_step_behind_is_behind():
    words = {0: replace(word(6, last="same"), model_step=6), 1: replace(word(5, doubt="same"), model_step=5)}
    ruling = judge(words)
    assert ruling.behind == {1}
    assert not ruling.certain


def test_without_a_common_model_newcomers_alone_are_behind():
    words = {0: word(7), 1: word(4), 2: word(0, epoch=0)}
    ruling = judge({rank: replace(each, common=False) for rank, each in words.items()})
    assert ruling.behind == {2}
    assert ruling.ended == (7,)


def test_those_who_may_not_begin_a_run_do_not():
    stray = replace(word(0, epoch=0), founds=False)
    assert judge({0: stray, 1: stray}).strays
    assert not judge({0: stray, 1: word(3)}).strays
    begun = judge({0: replace(stray, step=70), 1: word(0, epoch=0, step=0)})
    assert not begun.strays
    assert begun.behind == {0}, "founders are right, however far a stray has come"


def test_another_number_of_fragments_is_behind():
    assert judge({0: word(5, 5), 1: word(5, 5), 2: word(5)}).behind == {2}


def test_majority():
    assert majority({0: "a", 1: "b", 2: "a"}) == "a"
    assert majority({0: "a"}) == "a"
    assert majority({0: "a", 1: "b"}) is None


@st.composite
def after_a_crash(draw):
    """Words of the survivors of a round that some of them ended, in any order of ranks."""
    ended, count = draw(st.integers(0, 9)), draw(st.integers(1, 6))
    heard = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    words = [word(ended + 1, last="r") if all_heard else word(ended, doubt="r", redo={0: ended}) for all_heard in heard]
    return dict(enumerate(words)), any(heard), ended


@given(after_a_crash())
def test_no_survivor_of_a_round_is_behind(found):
    words, was_ended, ended = found
    ruling = judge(words)
    assert not ruling.behind
    doubtful = {rank for rank, each in words.items() if each.fragments[0].ended == ended}
    assert set(ruling.certain) == (doubtful if was_ended else set())
    assert ruling.redo == (() if was_ended else (0,))
