"""Fault detection beside the rounds of members that come and go: who is slow is named in every member's log."""

from __future__ import annotations

import json

import pytest

from thinwire.config import MethodOptions, Run
from thinwire.elastic.board import Board
from thinwire.elastic.journal import Journal
from thinwire.elastic.link import ElasticLink
from thinwire.elastic.schedules import Crash, Life, Plan
from thinwire.elastic.simulated import simulate
from thinwire.links.network import Network
from thinwire.train.display import Silent
from thinwire.train.elastic import Stay, train_among
from thinwire.train.member import Order, facts
from thinwire.train.text import TextOptions

RUN = Run(
    steps=96, task=TextOptions(size="0.2M", context=8, batch_size=1, validation_windows=2),
    method=MethodOptions("diloco", {"every": 8}),
)  # fmt: skip
LIVES = tuple(Life(f"{host}.1") for host in "abcd")


def lived(tmp_path, lives, faults=(), up=(1e8, 1e8, 2e7, 1e8), isolate=False, run=RUN):
    """Lines of each member's log, and who left."""
    task = run.task.build(seed=0)

    def member(meeting):
        link = ElasticLink(meeting, founds=meeting.name.endswith(".1"))
        journal = Journal(tmp_path / "members" / f"{meeting.name}.jsonl")
        try:
            return train_among(
                run, task, link, Stay(tmp_path, isolate=isolate), board=Board(link.name, {}), journal=journal,
                display=Silent(), stops=lambda: False,
            )  # fmt: skip
        finally:
            link.close()

    ends = simulate(Plan(lives, tuple(faults)), member, Network(up_bits_per_s=list(up), step_s=0.1))
    logs = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in (tmp_path / "members").glob("*.jsonl")
    }
    return logs, ends


def found(lines):
    return [(line["kind"], line["who"]) for line in lines if line["event"] == "finding"]


@pytest.mark.slow
def test_a_slow_member_is_named_in_every_log_once(tmp_path):
    logs, ends = lived(tmp_path, LIVES)
    assert [end.error for end in ends.values()] == [None] * 4
    assert {name: found(lines) for name, lines in logs.items()} == {
        name: [("slow sender", "c.1")] for name in ("a.1", "b.1", "c.1", "d.1")
    }
    (line,) = [line for line in logs["a.1"] if line["event"] == "finding"]
    assert line["evidence"].startswith("sends to its 3 peers at 5.0 times the usual time")


@pytest.mark.slow
def test_nothing_is_found_where_all_are_alike(tmp_path):
    logs, _ = lived(tmp_path, LIVES, up=(1e8,) * 4)
    assert not any(found(lines) for lines in logs.values())


@pytest.mark.slow
def test_a_newcomer_comes_and_another_crashes_and_all_go_on_with_one_history(tmp_path):
    """Findings after the changes are the same again, and nobody waits for a word of one who is gone."""
    lives = (*LIVES, Life("e.2", 4.05))
    logs, ends = lived(tmp_path, lives, [Crash("b.1", 9.03)], up=(1e8, 1e8, 2e7, 1e8, 1e8))
    assert all(ends[name].error is None for name in ("a.1", "c.1", "d.1", "e.2"))
    assert ends["b.1"].how == "crashed"
    assert found(logs["a.1"]) == found(logs["d.1"])
    assert found(logs["a.1"])[0] == ("slow sender", "c.1")
    assert ("slow sender", "c.1") in found(logs["e.2"]), "the newcomer was handed what the others remember"


@pytest.mark.slow
def test_who_is_found_again_and_again_leaves_if_the_run_isolates(tmp_path):
    logs, ends = lived(tmp_path, LIVES, isolate=True)
    assert [ends[name].value is None for name in ("a.1", "b.1", "c.1", "d.1")] == [False, False, True, False]
    assert logs["c.1"][-1]["why"].startswith("left: member c.1 is isolated from call")
    assert [line["left"] for line in logs["a.1"] if line["event"] == "met"][1:] == [["c.1"]]


def test_the_run_says_whether_it_isolates():
    """All members go by the one policy of whoever started the run."""
    told = [facts(Order("", "", "", "up", "", 0, [], isolate=each), RUN)["isolate"] for each in (False, True)]
    assert told == [False, True]
