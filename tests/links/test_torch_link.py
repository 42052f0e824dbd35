"""The torch link, with real processes over loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from member import every_method

import thinwire
from small import same
from thinwire.links.crew import Crew
from thinwire.links.joining import join
from thinwire.links.torch import Pace, time_limit_s

TESTS = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def members(
    task: str, out: Path, world: int = 3, *, program: str = "links/member.py", expect: dict[int, int] | None = None
) -> tuple[list, list[str]]:
    """Run a task of a program on `world` processes; what each returned, and what each said."""
    port = free_port()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, str(TESTS / program), task, str(out), str(rank), str(world), str(port)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )
        for rank in range(world)
    ]  # fmt: skip
    said = [process.communicate(timeout=240)[0] for process in running]
    for rank, process in enumerate(running):
        assert process.returncode == (expect or {}).get(rank, 0), said[rank]
    results = [out / f"{rank}.pt" for rank in range(world)]
    return [torch.load(path, weights_only=False) if path.exists() else None for path in results], said


@pytest.mark.slow
def test_every_method_gives_the_bits_of_the_local_link(tmp_path):
    real, _ = members("every_method", tmp_path)
    simulated = thinwire.run(3, every_method)
    for rank in range(3):
        for name, expected in simulated[rank].items():
            got = real[rank][name]
            assert same(got.live, expected.live), f"{name} on member {rank}"
            assert same(got.consensus, expected.consensus), f"{name} on member {rank}"
            assert got.outcomes == expected.outcomes
    last = list(simulated[0])[-1]
    assert real[0][last].sent_bytes == simulated[0][last].sent_bytes, "both links count the same bytes"


@pytest.mark.slow
def test_asynchronous_pushes_arrive_as_they_come_and_all_end_with_one_model(tmp_path):
    results, _ = members("asynchronous", tmp_path)
    assert all(torch.equal(each["live"], results[0]["live"]) for each in results)
    assert {member for member, _ in results[0]["log"]} == {0, 1, 2}
    assert 30 <= len(results[0]["log"]) <= 36, "and the last of those under way"
    assert len(results[0]["log"]) == sum(each["pushes"] for each in results)
    assert results[0]["loss"] < 1.2, "1.6 before"


@pytest.mark.slow
def test_a_member_that_dies_in_mid_round_is_named_and_nothing_committed_is_lost(tmp_path):
    results, _ = members("dies_in_round", tmp_path, expect={1: 9})
    for rank in (0, 2):
        assert results[rank]["ranks"] == (1,)
        assert "lost member 1 during round 2, fragment 0" in results[rank]["text"]
        assert results[rank]["committed"] == 2
        assert same(results[rank]["kept"], results[rank]["now"])
    assert same(results[0]["now"], results[2]["now"])


@pytest.mark.slow
def test_a_silent_member_is_named_while_waiting_and_given_up_in_time(tmp_path):
    results, said = members("stands_still", tmp_path)
    assert "round 3, fragment 0: waiting for member 1 (gives up in 2 s)" in said[0]
    assert "lost member 1 during round 3, fragment 0" in results[0]["text"]
    assert results[0]["took"] < 10


@pytest.mark.slow
def test_other_initial_weights_are_refused_on_all_members(tmp_path):
    results, _ = members("odd_weights", tmp_path)
    for text in results:
        assert "members disagree on weights: member 2 has" in text
        assert "thinwire.broadcast(model, link)" in text


@pytest.mark.slow
def test_any_number_of_exchanges_may_be_under_way_in_any_order(tmp_path):
    results, _ = members("many_at_once", tmp_path)
    for rank, told in enumerate(results):
        assert told == [dict.fromkeys({0, 1, 2} - {rank}, number) for number in range(20)]


@pytest.mark.slow
def test_an_engine_that_pairs_messages_by_their_order_gets_one_order_on_all_members(tmp_path):
    results, _ = members("one_by_one", tmp_path)
    for rank, (log, told) in enumerate(results):
        assert log == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]
        assert told == [dict.fromkeys({0, 1, 2} - {rank}, number) for number in range(6)]


def test_time_limits_follow_payload_and_link():
    assert time_limit_s(0, 1e6, 0) == 60
    assert time_limit_s(10_000_000, 1e6, 0) == 160
    assert time_limit_s(0, 1e6, 12) == 180


def test_a_fast_peer_does_not_shorten_a_slow_ones_time_limit():
    """10 MB at 100 Mbit/s with member 1; member 2, whom nobody has met, may be at 1 Mbit/s as at the start."""
    pace = Pace()
    assert pace.begin({1: 10_000_000}) == 60 + 800
    pace.end({1: 10_000_000}, {1: 0.8})
    assert pace.begin({1: 10_000_000}) == pytest.approx(60 + 8 + 8)
    pace.end({1: 10_000_000}, {1: 0.8})
    assert pace.begin({1: 10_000_000, 2: 0}) == pytest.approx(60 + 800 + 8)


def test_what_else_is_under_way_lengthens_a_time_limit():
    pace = Pace()
    assert [pace.begin({1: 10_000_000}) for _ in range(3)] == [60 + 800, 60 + 1600, 60 + 2400]
    for _ in range(2):
        pace.end({1: 10_000_000}, {})
    assert pace.begin({1: 10_000_000}) == 60 + 1600


def test_the_slowest_time_counts_and_small_messages_tell_nothing_of_the_rate():
    pace = Pace()
    for size, seconds in ((1_000_000, 1.0), (1_000_000, 4.0), (1_000_000, 2.0), (1_000, 8.0)):
        pace.begin({1: size})
        pace.end({1: size}, {1: seconds})
    assert pace.begin({1: 1_000_000}) == pytest.approx(60 + 40 + 80)


def test_threads_are_kept_for_the_next_task_and_a_stuck_one_holds_up_no_other():
    crew, gate = Crew(), threading.Event()
    stuck = crew.do(lambda: gate.wait(60) and threading.get_ident())
    idents = {crew.do(threading.get_ident).result(60) for _ in range(5)}
    assert len(idents) == 1
    gate.set()
    assert stuck.result(60) not in idents
    with pytest.raises(KeyError, match="inside"):
        crew.do(lambda: {}["inside"]).result(60)
    crew.close()


def test_requests_that_cannot_be_met():
    with pytest.raises(thinwire.ConfigError, match="address 'nowhere'"), join("nowhere", rank=0, world=1):
        pass
    with pytest.raises(thinwire.ConfigError, match="rank 3 of 2"), join("127.0.0.1:29500", rank=3, world=2):
        pass
    with pytest.raises(thinwire.ConfigError, match="backend 'mpi'"), join(backend="mpi"):
        pass
    with (
        pytest.raises(thinwire.LinkError, match="member 1 cannot meet the others"),
        join(f"127.0.0.1:{free_port()}", rank=1, world=2, timeout_s=1),
    ):
        pass


def test_without_a_group_a_member_is_alone_and_is_told_so(caplog, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with join() as link:
        assert link.members == (0,)
    assert "this member trains alone" in caplog.text


def test_what_was_measured_over_another_link_is_known_to_this_one():
    assert Pace({0: 1e6}).begin({0: 10_000_000}) == 160
    assert Pace().begin({0: 10_000_000}) == 60 + 800
