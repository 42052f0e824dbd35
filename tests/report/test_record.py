import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_samples import record

from thinwire.errors import ConfigError
from thinwire.report import Event, Member, Point, RunRecord

counts = st.integers(0, 2**60)
numbers = st.floats()  # the ones that are not finite included
words = st.text(max_size=8)
members = st.builds(Member, *[counts] * 5, *[numbers] * 5, counts)
points = st.builds(Point, counts, numbers, counts, numbers, st.none() | numbers, st.none() | numbers)
records = st.builds(
    RunRecord,
    label=words,
    method=st.dictionaries(st.sampled_from(["schedule", "codec", "outer"]), words),
    config=words,
    versions=st.dictionaries(words, words, max_size=2),
    machine=words,
    clock=st.sampled_from(["simulated", "wall"]),
    network=words,
    seed=counts,
    parameters=counts,
    members=st.lists(members, max_size=2).map(tuple),
    curve=st.lists(points, max_size=2).map(tuple),
    bytes_by_purpose=st.dictionaries(words, st.tuples(counts, counts), max_size=2),
    rounds_committed=counts,
    rounds_skipped=counts,
    events=st.lists(st.builds(Event, counts, numbers, words, words), max_size=2).map(tuple),
    final=st.dictionaries(words, numbers, max_size=2),
    digest=words,
)


@given(before=records)
def test_reading_undoes_writing(before):
    """Compared as text, since nan is not equal to itself."""
    text = before.to_json()
    assert RunRecord.from_json(text).to_json() == text
    if "nan" not in text:
        assert RunRecord.from_json(text) == before


def test_numbers_that_are_not_finite_are_json():
    def refuse(word):
        raise AssertionError(word)

    text = replace(record(), final={"loss": math.nan, "x": -math.inf}).to_json()
    assert json.loads(text, parse_constant=refuse)["final"] == {"loss": "nan", "x": "-inf"}


GOLDEN = """{"format": 1, "label": "a", "method": {"codec": "fp32"}, "config": "", "versions": {"torch": "2.6"},
 "machine": "m", "clock": "wall", "network": "n", "seed": 3, "parameters": 10,
 "members": [{"rank": 0, "samples": 1, "tokens": 2, "sent_bytes": 3, "received_bytes": 4, "compute_s": 5,
  "encode_s": 6, "wait_s": 7, "apply_s": 8, "hidden_s": 9, "rounds": 10}],
 "curve": [{"step": 1, "seconds": 2.5, "sent_bytes": 3, "train_loss": "nan", "valid_loss": null, "accuracy": 0.5}],
 "bytes_by_purpose": {"round": [5, 6]}, "rounds_committed": 1, "rounds_skipped": 0,
 "events": [{"step": 1, "seconds": 2, "kind": "k", "text": "t"}], "final": {"loss": 1}, "digest": "ab"}"""


def test_format_1_is_still_read():
    read = RunRecord.from_json(GOLDEN)
    assert read.members == (Member(0, 1, 2, 3, 4, 5.0, 6.0, 7.0, 8.0, 9.0, 10),)
    assert math.isnan(read.curve[0].train_loss)
    assert read.curve[0].valid_loss is None
    assert read.bytes_by_purpose == {"round": (5, 6)}
    assert read.events == (Event(1, 2.0, "k", "t"),)


@pytest.mark.parametrize(
    ("old", "new", "wrong", "expected"),
    [
        ('"seed": 3', '"seed": 3, "sed": 4', "record has unknown key 'sed'", "the keys label, method"),
        ('"seed": 3,', "", "record has no key 'seed'", "the keys label, method"),
        ('"seed": 3', '"seed": true', "record.seed is true", "a whole number"),
        ('"seed": 3', '"seed": 3.5', "record.seed is 3.5", "a whole number"),
        ('"wait_s": 7', '"wait_s": "7"', 'record.members[0].wait_s is "7"', "a number"),
        ('"rank": 0,', '"rank": 0, "x": 1,', "record.members[0] has unknown key 'x'", "the keys rank"),
        ("[5, 6]", "[5, 6, 7]", "record.bytes_by_purpose.round is [5, 6, 7]", "tuple[int, int]"),
        ('"wall"', '"sun"', 'record.clock is "sun"', "simulated"),
        ('{"torch": "2.6"}', "[]", "record.versions is []", "Mapping[str, str]"),
        ('"format": 1', '"format": 2', "format 2", "format 1"),
        ('{"codec": "fp32"}', '{"code": "fp32"}', "a method with the answers 'code'", "answers among schedule"),
        ('"label": "a"', '"label: "a"', "no JSON (line 1, column 24", "JSON"),
    ],
)
def test_what_is_no_record_is_refused_with_the_place(old, new, wrong, expected):
    assert old in GOLDEN
    with pytest.raises(ConfigError) as caught:
        RunRecord.from_json(GOLDEN.replace(old, new, 1))
    assert wrong in caught.value.wrong
    assert expected in caught.value.expected


@pytest.mark.parametrize("text", ["[]", "null", "3", '"x"'])
def test_json_that_is_no_object_is_refused(text):
    with pytest.raises(ConfigError, match="format None"):
        RunRecord.from_json(text)


def test_a_clock_of_another_kind_is_refused():
    with pytest.raises(ConfigError, match="clock 'moon'"):
        replace(record(), clock="moon")


def test_totals():
    run = record()
    assert (run.seconds, run.steps, run.sent_bytes) == (20.0, 100, 1_000_000)
    empty = replace(run, curve=(), members=())
    assert (empty.seconds, empty.steps, empty.sent_bytes) == (0.0, 0, 0)
