"""The watch over a link: faults injected into the simulated network are named by all members, alike, and soon."""

from __future__ import annotations

import logging
import math
import zlib
from dataclasses import replace

import pytest
import torch

from thinwire.errors import ConfigError, PacketError
from thinwire.links.local import run
from thinwire.links.network import Network
from thinwire.watch import history, words
from thinwire.watch.findings import Kind
from thinwire.watch.judging import Settings
from thinwire.watch.policy import Policy
from thinwire.watch.watch import Watch
from thinwire.watch.words import Word

CALLS = 8


def say(rank, call):
    """A member's word in a run in which nothing is wrong."""
    return Word(steps=1, step_s=0.1, norm=1.0 + 0.1 * rank)


def watched(members, network=None, word=say, calls=CALLS, **options):
    """Rounds of 5000 bytes from all to all with a call after each; returns each member's watch."""

    def work(link):
        watch, channel = Watch(link, timings=link.timings, **options), link.open("data")
        others = [rank for rank in link.members if rank != link.rank]
        buffer = torch.zeros(5000, dtype=torch.uint8)
        for call in range(calls):
            link.local_step()
            channel.exchange(dict.fromkeys(others, buffer), dict.fromkeys(others, 5000), f"round {call}")
            watch.call(word(link.rank, call))
        watch.last()
        return watch

    return run(members, work, network or Network(up_bits_per_s=1e6, latency_s=0.02, step_s=0.1))


def same_past(watches):
    """What all know, once it is sure that they all know the same."""
    assert all(watch.past == watches[0].past for watch in watches)
    return watches[0].past


def test_no_alarm_where_nothing_is_wrong():
    past = same_past(watched(4, calls=30))
    assert [each.call for each in past] == list(range(30))
    assert [finding for each in past for finding in each.findings] == []


@pytest.mark.parametrize("members", [3, 6])
def test_a_slow_up_link_is_named_by_all_from_the_first_call(members):
    rates = [1e6] * members
    rates[1] = 2.5e5
    past = same_past(watched(members, Network(up_bits_per_s=rates, step_s=0.1)))
    assert [[finding.key for finding in each.findings] for each in past] == [[(Kind.SLOW_SENDER, ("1",))]] * CALLS
    assert past[-1].findings[0].evidence["factor"] == pytest.approx(4.0, rel=1e-3)
    assert {each.findings[0].since for each in past} == {0}


def test_late_members_do_not_look_like_slow_senders_on_a_link_that_sees_the_first_bit():
    past = same_past(watched(4, Network(up_bits_per_s=1e6, step_s=[0.1, 0.1, 5.0, 0.1])))
    assert past[-1].findings == ()


@pytest.mark.parametrize(
    ("fault", "kind", "after"),
    [
        (lambda word, call: replace(word, norm=math.nan), Kind.NOT_FINITE, 1),
        (lambda word, call: replace(word, norm=math.inf), Kind.NOT_FINITE, 1),
        (lambda word, call: replace(word, finite=False), Kind.NOT_FINITE, 1),
        (lambda word, call: replace(word, norm=50.0), Kind.TOO_LARGE, 1),
        (lambda word, call: replace(word, steps=0), Kind.IDLE, 5),
        (lambda word, call: replace(word, step_s=0.5), Kind.SLOW_COMPUTE, 4),
        (lambda word, call: replace(word, encode_s=0.5), Kind.SLOW_ENCODING, 4),
    ],
)
def test_what_a_member_does_is_found_in_so_many_calls(fault, kind, after):
    begins = 6

    def word(rank, call):
        usual = replace(say(rank, call), encode_s=0.01)
        return fault(usual, call) if rank == 2 and call >= begins else usual

    past = same_past(watched(4, word=word, calls=20))
    when = [each.call for each in past if any(finding.key == (kind, ("2",)) for finding in each.findings)]
    assert when[0] == begins + after - 1
    assert {who for each in past for finding in each.findings for who in finding.who} == {"2"}


def test_findings_are_answered_one_call_later_and_told_once(caplog):
    seen = []

    def work(link):
        watch = Watch(link)
        for call in range(3):
            word = replace(say(link.rank, call), finite=link.rank != 1)
            seen.append((link.rank, call, len(watch.call(word))))
        assert len(watch.last()) == 1
        assert watch.last() == (), "it has been read"

    with caplog.at_level(logging.WARNING, logger="thinwire"):
        run(3, work)
    assert {(call, found) for _, call, found in seen} == {(0, 0), (1, 1), (2, 1)}
    assert len([each for each in caplog.messages if each.startswith("not finite: member 1")]) == 3, "one a member"


def test_without_timings_no_line_is_judged():
    def work(link):
        watch = Watch(link)
        watch.call(say(link.rank, 0))
        watch.last()
        return watch

    assert all(word.paces == {} for word in same_past(run(3, work))[0].told.values())


def test_a_member_is_isolated_told_why_and_comes_back():
    policy = Policy(isolate=True, first=4)
    seen = []

    def word(rank, call):
        return replace(say(rank, call), finite=rank != 2 or call >= 3)

    def work(link):
        watch = Watch(link, policy=policy)
        for call in range(12):
            watch.call(word(link.rank, call))
            if link.rank == 2:
                seen.append(sorted(watch.isolated))
        watch.last()
        return watch

    past = same_past(run(4, work))
    assert seen == [[]] * 3 + [["2"]] * 4 + [[]] * 5
    (isolation,) = [each for heard in past for each in heard.isolated]
    assert (isolation.who, isolation.since, isolation.until) == ("2", 3, 7)
    assert "not finite: member 2 contributed values that are not finite" in isolation.because[0]


def test_a_member_that_is_apart_is_not_idle():
    def word(rank, call):
        if rank == 2 and call >= 3:
            return Word(steps=0, counted=False)
        return replace(say(rank, call), finite=rank != 2)

    policy = Policy(isolate=True, first=20)
    past = same_past(watched(4, word=word, calls=20, policy=policy))
    assert [each.call for each in past if each.isolated] == [2]
    assert not [finding for each in past for finding in each.findings if finding.kind is Kind.IDLE]


def test_settings_reach_the_judgement():
    def word(rank, call):
        return replace(say(rank, call), steps=int(rank != 1))

    bounds = replace(Settings().bounds, idle=2)
    assert same_past(watched(3, word=word))[2].findings == ()
    assert same_past(watched(3, word=word, settings=Settings(bounds=bounds)))[1].findings
    assert len(same_past(watched(3, settings=Settings(window=3)))) == 3


def test_another_gathering_goes_on_where_all_are_and_a_newcomer_is_handed_what_they_know():
    """Member 1 has read one answer more than the others when the group changes, and member 3 is new."""

    def work(link):
        watch = Watch(link, names="abcd", policy=Policy(isolate=True))
        first = None
        if link.rank != 3:
            watch._past = made(6 if link.rank == 1 else 5)
        watch.gather(link, names="abcd")
        for call in range(2):
            watch.call(replace(say(link.rank, call), finite=link.rank != 0))
            first = first or watch.past
        watch.last()
        return watch

    def made(calls):
        past = ()
        for call in range(calls):
            told = {name: replace(say(0, call), finite=name != "b") for name in "abc"}
            past = history.after(past, told, Policy(isolate=True), Settings())
        return past

    past = same_past(run(4, work))
    assert [each.call for each in past] == list(range(7))
    assert past[:5] == made(5), "what not all had heard is forgotten, and the rest is the newcomer's too"
    assert past[5].told.keys() == set("abcd")
    assert past[5].strikes.apart["b"].since == 3
    assert [finding.who for finding in past[-1].findings] == [("a",)]


def test_what_was_asked_before_a_change_is_forgotten():
    def work(link):
        watch = Watch(link)
        watch.call(say(link.rank, 0))
        watch.gather(link)
        assert watch.last() == ()
        watch.call(say(link.rank, 1))
        watch.last()
        return watch

    assert [each.call for each in same_past(run(3, work))] == [0]


def test_a_history_is_handed_on_bit_for_bit():
    past = same_past(watched(4, Network(up_bits_per_s=[1e6, 3e5, 1e6, 1e6], step_s=0.1), policy=Policy(isolate=True)))
    assert any(each.isolated for each in past)
    assert history.read(history.written(past)) == past


@pytest.mark.parametrize(
    "text", [b"", b"abc", zlib.compress(b"{}x"), zlib.compress(b"[1]"), zlib.compress(b'[{"call":0}]')]
)
def test_no_history(text):
    with pytest.raises(PacketError, match="a watch's history cannot be read"):
        history.read(text)


def test_a_word_as_it_is_written():
    word = Word(3, 0.123456789, 0.01, 2.5, paces={"a": -12.3456789}, noise=0.05, heard=7)
    assert words.read(words.write(word)) == replace(word, step_s=0.12346, paces={"a": -12.346})
    assert words.read(words.write(replace(word, norm=math.inf))) == replace(
        words.read(words.write(word)), norm=None, finite=False
    )
    many = {f"{rank:064d}": -12.345 for rank in range(64)}
    assert len(words.write(replace(word, paces=many))) <= words.most_bytes(64)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "cannot be read"), (b"[]", "cannot be read"), (b"\xff", "cannot be read"), (b"{}", "cannot be read"),
        (b'{"steps":1,"more":2}', "cannot be read"), (b'{"steps":1,"norm":NaN}', "NaN is no number"),
        (b'{"steps":1.5}', "makes no sense"), (b'{"steps":-1}', "makes no sense"),
        (b'{"steps":1,"norm":-1}', "makes no sense"), (b'{"steps":1,"paces":{"a":"x"}}', "makes no sense"),
        (b'{"steps":1,"paces":[1]}', "cannot be read"), (b'{"steps":1,"finite":2}', "makes no sense"),
    ],
)  # fmt: skip
def test_no_word(text, why):
    with pytest.raises(PacketError, match=why):
        words.read(text)


@pytest.mark.parametrize("names", ["ab", "abb", "abcd"])
def test_a_name_for_each(names):
    with pytest.raises(ConfigError, match=r"watch: names .* for 3 members"):
        run(3, lambda link: Watch(link, names=names))


def test_names_too_long_for_a_word():
    def work(link):
        watch = Watch(link, names=("a" * 2000, "b"), timings=link.timings)
        link.timings.took(1 - link.rank, 5000, 1.0)
        watch.call(say(0, 0))

    with pytest.raises(ConfigError, match="give members shorter names"):
        run(2, work)
