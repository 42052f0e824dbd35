"""Meetings at real stores: threads at a HashStore, processes at a TCPStore, and every byte of it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from attending import FACTS, PACE, Tiny, take_part
from torch.distributed import HashStore

import thinwire
from small import batch, loss_of, make_model
from thinwire.errors import ConfigError, LinkError, PeerLost, StateMismatch
from thinwire.seeds.closed import Closed
from thinwire.seeds.digests import digest as digest_of
from thinwire.seeds.rebuild import rebuild
from thinwire.seeds.standing import Pace
from thinwire.seeds.store import AtStore, attend, host
from thinwire.seeds.tensors import Tunable
from thinwire.seeds.tuner import Tuner

ROOT = Path(__file__).parents[2]


def agree(*digests):
    """Digests after every round are beginnings of the longest."""
    longest = max(digests, key=len)
    assert all(found == longest[: len(found)] for found in digests)
    return longest


def test_members_of_one_process_meet_at_a_hash_store():
    store = HashStore()

    def member(index):
        model = Tiny()
        with AtStore(store, founds=index == 0, pace=PACE, at_least=3) as meeting:
            meeting.meet(FACTS)
            assert meeting.number == 0
            take_part(meeting, model, "stays", until=lambda closed: closed.number == 39)
            assert meeting.number == 40
            assert meeting.roster == (0, 1, 2)
        return model

    with ThreadPoolExecutor(3) as pool:
        models = list(pool.map(member, range(3)))
    assert len(agree(*(model.digests for model in models))) == 40
    assert all(torch.equal(model.w, models[0].w) for model in models)
    target = torch.linspace(-1, 1, len(models[0].w))
    assert (models[0].w - target).norm() < 0.7 * target.norm(), "it learns, too"


@pytest.mark.slow
def test_processes_come_late_leave_and_are_killed(tmp_path):
    """All of it in one run: what each of them held after each round is the same."""

    def start(fate, name):
        command = [
            sys.executable,
            str(ROOT / "tests/seeds/attending.py"),
            str(meeting.port),
            fate,
            str(tmp_path / name),
        ]
        env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    model, last, log = Tiny(), [], []
    with host("127.0.0.1:0", at_least=3, pace=PACE) as meeting:
        meeting.meet(FACTS)
        first = [start("leaves", "leaves"), start("dies", "dies")]
        late = start("late", "late")

        def ends(closed):
            """The founder leaves ten rounds after the late one came, the first ones having gone."""
            log.append(closed)
            if closed.number == 5:
                late.stdin.write("come\n")
                late.stdin.flush()
            if not last and closed.number > 12 and len(meeting.roster) == 2 and max(meeting.roster) > 2:
                last.append(closed.number + 10)
            return bool(last) and closed.number == last[0]

        take_part(meeting, model, "stays", until=ends)
        sent = meeting.meter.total().sent_bytes
    for process in (*first, late):
        _, errors = process.communicate(timeout=60)
        assert process.returncode == (9 if process is first[1] else 0), errors
    held = [json.loads((tmp_path / name).read_text()) for name in ("leaves", "late")]
    agree(model.digests, *held)
    assert len(held[0]) >= 8
    assert len(held[1]) > last[0], "the late one has replayed it all, and the founder's goodbye"
    assert sum(len(closed.left) for closed in log) >= 2
    assert sent > 0


def test_the_host_s_end_is_told_in_a_sentence(tmp_path):
    """The store dies with its process."""
    script = "\n".join(
        [
            "import os, sys, torch",
            "sys.path.insert(0, sys.argv[1])",
            "from attending import FACTS, PACE, Tiny",
            "from thinwire.seeds.store import host",
            "model, meeting = Tiny(), host('127.0.0.1:0', at_least=2, pace=PACE)",
            "meeting.meet(FACTS)",
            "print(meeting.port, flush=True)",
            "for number in range(10):",
            "    meeting.round(number, model.codes(number, 0), 0.1)",
            "os._exit(1)",
        ]
    )
    command = [sys.executable, "-c", script, str(ROOT / "tests/seeds")]
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    founder = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert founder.stdout is not None
    port, model = int(founder.stdout.readline()), Tiny()
    told = r"lost member 0 during round (9|10): the store that its process keeps is gone"
    with pytest.raises(PeerLost, match=told), attend(f"127.0.0.1:{port}", pace=PACE) as meeting:
        take_part(meeting, model, "stays", facts=FACTS)
    founder.communicate(timeout=30)
    assert len(model.digests) >= 9, "the log is whole up to there"


class Counting:
    """A way to a port that counts what passes: bytes [there, back]."""

    def __init__(self, port):
        self.passed = [0, 0]
        self._to = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                near = self._server.accept()[0]
                far = socket.create_connection(("127.0.0.1", self._to))
                threading.Thread(target=self._pass, args=(near, far, 0), daemon=True).start()
                threading.Thread(target=self._pass, args=(far, near, 1), daemon=True).start()

    def _pass(self, source, target, way):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self.passed[way] += len(data)
                target.sendall(data)

    def close(self):
        self._server.close()


def test_bytes_are_counted_as_they_cross():
    """What the meter says of twenty rounds against what passed: a member's keys, lengths, codes and records."""
    with host("127.0.0.1:0", at_least=2, pace=PACE) as meeting:
        meeting.meet(FACTS)
        way, done = Counting(meeting.port), []

        def other():
            model = Tiny()
            with attend(f"127.0.0.1:{way.port}", pace=PACE) as mine:
                mine.meet(FACTS)

                def ends(closed):
                    done.append((mine.meter.total(), list(way.passed)))
                    return closed.number == 30

                take_part(mine, model, "stays", until=ends)

        thread = threading.Thread(target=other)
        thread.start()
        take_part(meeting, Tiny(), "stays", until=lambda closed: closed.number == 30)
        thread.join(30)
    way.close()
    (before, passed_before), (after, passed_after) = done[10], done[30]
    sent, received = (now - then for now, then in zip(passed_after, passed_before, strict=True))
    assert sent == pytest.approx(after.sent_bytes - before.sent_bytes, rel=0.1)
    assert received == pytest.approx(after.received_bytes - before.received_bytes, rel=0.1)
    print(sent / 20, received / 20)
    assert sent / 20 < 160, "four of them are codes"
    assert received / 20 < 120


def test_a_stranger_is_refused():
    with host("127.0.0.1:0") as meeting:
        meeting.meet({**FACTS, "weights": "founder's", "rounds": "0"})
        with pytest.raises(ConfigError, match="base: this member has ones, the run zeros"):
            attend(f"127.0.0.1:{meeting.port}").meet({**FACTS, "base": "ones"})
        with pytest.raises(ConfigError, match="version: this member has 0, the run"):
            AtStore(meeting._store).meet({**FACTS, "version": "0"})
        AtStore(meeting._store).meet({**FACTS, "weights": "own", "rounds": "9"})  # what differs from member to member


def test_nobody_there():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LinkError, match=f"no store can listen at 127.0.0.1:{port}"):
            host(f"127.0.0.1:{port}")
    with pytest.raises(LinkError, match=f"no run answers at 127.0.0.1:{port}"):
        attend(f"127.0.0.1:{port}", pace=Pace(least_s=0.5, most_s=0.5))
    with pytest.raises(ConfigError, match="address 'nowhere'"):
        attend("nowhere")


def test_a_long_wait_says_what_for(monkeypatch, caplog):
    monkeypatch.setattr("thinwire.seeds.store._TELL_AFTER_S", 0.05)
    meeting = AtStore(HashStore(), pace=Pace(least_s=0.12, most_s=0.12))
    with caplog.at_level(logging.WARNING), pytest.raises(LinkError, match="nobody founded a run"):
        meeting.meet(FACTS)
    assert "waiting for the founder of the run (gives up in 0 s)" in caplog.text


def together(first, second, number):
    """A round of two members in one process."""
    codes = torch.full((4,), 130, dtype=torch.uint8)
    with ThreadPoolExecutor(2) as pool:
        one, other = (pool.submit(meeting.round, number, codes, 0.1) for meeting in (first, second))
        assert one.result() == other.result()
        return one.result()


def two(past=(), theirs=()):
    """A founder and another, both on the roster after the first round."""
    store = HashStore()
    founder = AtStore(store, founds=True, past=past, pace=PACE, at_least=2)
    other = AtStore(store, past=theirs, pace=PACE)
    assert not list(founder.meet(FACTS))
    backlog = other.meet(FACTS)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(founder.round, len(past), torch.full((4,), 130, dtype=torch.uint8), 0.1)
        missed = list(backlog)
        first.result()
    return founder, other, missed


def test_a_member_that_fails_says_goodbye():
    """The others do not have to find out."""
    founder, other, missed = two()
    assert [closed.joined for closed in missed] == [(1,)]
    with pytest.raises(ZeroDivisionError), other:
        raise ZeroDivisionError
    assert founder.round(1, torch.ones(4, dtype=torch.uint8), 0.1).left == (1,)


def test_who_is_not_on_the_roster_has_no_number():
    meeting = AtStore(HashStore())
    assert not meeting.on_roster
    with pytest.raises(ConfigError, match="this member is not on the roster"):
        meeting.member  # noqa: B018
    founder, other, _ = two()
    assert (founder.member, other.member) == (0, 1)
    assert founder.roster == other.roster == (0, 1)
    assert not list(other.backlog())


def test_weights_are_compared_with_those_of_the_first():
    founder, other, _ = two()
    founder.compare(1, "aa")
    other.compare(1, "aa")
    other.compare(2, "bb")
    with pytest.raises(StateMismatch, match=r"after 2 rounds this member's weights are not .*\n  expected  digest bb"):
        founder.compare(2, "aa")


PAST = tuple(Closed(number, 0.5, {0: b"abcd", 3: b"efgh"}) for number in range(70))


def test_a_member_with_a_log_is_spared_what_it_has():
    founder, other, missed = two(past=PAST, theirs=PAST[:66])
    assert [closed.number for closed in missed] == [66, 67, 68, 69, 70]
    assert set(together(founder, other, 71).codes) == {4, 5}


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        ((*PAST[:9], Closed(9, 0.5, {0: b"abcd"})), "round 9 of this member's log is not the run's"),
        ((*PAST, *(Closed(number, 0.5, {0: b"abcd"}) for number in (70, 71, 72))), "round 70 of this member's log"),
    ],
)
def test_a_member_with_another_log_is_refused(theirs, told):
    store = HashStore()
    founder, other = AtStore(store, founds=True, past=PAST, at_least=2), AtStore(store, past=theirs)
    founder.meet(FACTS)
    backlog = other.meet(FACTS)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(founder.round, 70, torch.full((4,), 130, dtype=torch.uint8), 0.1)
        with pytest.raises(ConfigError, match=told):
            list(backlog)
        AtStore(store)._store.set("h/5", b"")  # should it wait for a second member still


def test_a_member_whose_log_is_ahead_is_refused():
    """A run that went on from an older state than this member's."""
    ahead = (*PAST, Closed(70, 0.1, {4: b"\x82" * 4}, joined=(5,)), Closed(71, 0.1, {4: b"abcd"}))
    with pytest.raises(ConfigError, match="this member's log has 72 rounds, and the run 71"):
        two(past=PAST, theirs=ahead)


@pytest.mark.parametrize("given", ["no past", "no state", "another past"])
def test_a_tuner_and_a_meeting_with_two_logs_are_refused(given):
    def begun(model, past=(), state=None, lr=0.01):
        tuner = Tuner(model, thinwire.just_one_byte(), AtStore(HashStore(), founds=True, past=past, pace=PACE))
        if state is not None:
            tuner.load_state_dict(state)
        with tuner:
            tuner.step(lambda: loss_of(model, *batch(0, 0)), lr=lr)
        return tuner

    first, other = begun(make_model()), begun(make_model(), lr=0.5)
    state = first.state_dict()
    begun(first.model, first.log.rounds, state)  # fits; and moves the model on
    model = make_model() if given == "no state" else begun(make_model()).model
    past = {"no past": (), "no state": first.log.rounds, "another past": other.log.rounds}[given]
    with pytest.raises(ConfigError, match=rf"not the log of {len(past)} rounds(?s:.)*past=tuner\.log\.rounds"):
        begun(model, past, None if given == "no state" else state)


@pytest.mark.parametrize("rule", ["sgd", "momentum(0.9)"])
def test_tuners_at_a_store_hold_the_same_bits(rule):
    """The second one takes in the founder's first round, tunes along and leaves; the log rebuilds what each has."""
    store, recipe = HashStore(), thinwire.just_one_byte(samples=2, rule=rule)
    models = [make_model(), make_model()]  # here: threads share the generator

    def member(index):
        model = models[index]
        meeting = AtStore(store, founds=index == 0, at_least=2, pace=PACE)
        with meeting, Tuner(model, recipe, meeting) as tuner:
            while tuner.rounds < (24, 15)[index]:
                tuner.step(lambda: loss_of(model, *batch(tuner.rounds, index)), lr=0.01)
            return tuner.log, tuner._tunable.digest()

    with ThreadPoolExecutor(2) as pool:
        (log, mine), (shorter, theirs) = pool.map(member, range(2))
    assert log.rounds[:15] == shorter.rounds
    assert [len(closed.codes) for closed in log.rounds] == [1] + [2] * 14 + [1] * 9
    for each, digest in ((log, mine), (shorter, theirs)):
        base = dict(Tunable(make_model()).pairs)
        rebuild(base, each)
        assert digest_of(base.items()) == digest
