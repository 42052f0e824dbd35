"""What the members' logs prove, and what they do not."""

import json

import pytest

from thinwire.elastic.journal import Journal, read
from thinwire.elastic.ledger import Ledger
from thinwire.elastic.proof import prove
from thinwire.errors import ConfigError, ThinwireError
from thinwire.train.supervise import Restarts


def rounds(count: int = 4) -> list[dict]:
    """Lines of a run of two members, two units each a round, epochs of four units."""
    ledger, lines = Ledger(4, block=2), []
    for number in range(count):
        before = ledger.chain
        ledger, done = ledger.dealt(["a", "b"]).committed({"a": 2, "b": 2})
        units = {name: [list(run) for run in runs] for name, runs in done.items()}
        lines.append({"event": "round", "at": float(number), "commits": ledger.commits, "before": before,
                      "chain": ledger.chain,
                      "units": units, "epochs": ledger.epochs, "units_per_epoch": 4})  # fmt: skip
    return lines


def test_each_unit_once():
    lines = rounds()
    proof = prove({"a": lines[:3], "b": lines[1:]})
    assert (proof.rounds, proof.void, proof.epochs, proof.beyond, proof.wrong) == (4, 0, 4, 0, ())
    assert proof.by == {"a": 8, "b": 8}


def test_a_round_that_is_in_no_log():
    lines = rounds()
    assert "round 2 and those before it are in no log" in prove({"a": [*lines[:1], *lines[2:]]}).wrong[0]


def test_units_that_were_changed_afterwards():
    lines = rounds()
    lines[1]["units"]["a"] = [[0, 2]]
    told = " ".join(prove({"a": lines}).wrong)
    assert "round 2: its units are not those that the members committed" in told
    assert "unit 0 twice: by a, and by a in round 2" in told


def test_members_that_tell_otherwise():
    lines, other = rounds(), json.loads(json.dumps(rounds()))
    other[3]["units"]["b"] = [[15, 1]]
    assert prove({"a": lines, "b": other}).wrong == ("round 4: b has other units in it than another member",)


def test_rounds_that_were_done_again_are_void():
    lines = rounds(3)
    ledger, done = Ledger(4, block=2).dealt(["c"]).committed({"c": 2})
    lost = lines[0] | {"before": "", "chain": ledger.chain, "units": {"c": [[0, 2]]}}
    assert done == {"c": ((0, 2),)}
    proof = prove({"a": lines, "c": [lost]})
    assert (proof.rounds, proof.void, proof.wrong) == (3, 1, ())


def test_no_rounds_prove_nothing():
    with pytest.raises(ConfigError, match="no member's log has a round in it"):
        prove({"a": [{"event": "joined"}]})


def test_the_command(call, tmp_path):
    journal = Journal(tmp_path / "members" / "a.jsonl")
    lines = rounds()
    for line in lines:
        journal.write(line["event"], **{key: line[key] for key in line if key not in ("event", "at")})
    journal.close()
    code, out, _ = call("ledger", tmp_path)
    assert code == 0
    assert "4 epochs of 4 units are done: 16 units, each exactly once." in out
    path = tmp_path / "members" / "a.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(ThinwireError, match="round 1 and those before it are in no log"):
        call("ledger", tmp_path)


def test_a_line_that_a_crash_cut_off_is_passed_over(tmp_path):
    (tmp_path / "members").mkdir()
    (tmp_path / "members" / "a.jsonl").write_text('{"event": "joined"}\n{"event": "ro')
    assert read(tmp_path) == {"a": [{"event": "joined"}]}
    (tmp_path / "members" / "a.jsonl").write_text('{"event": "ro\n{"event": "joined"}\n')
    with pytest.raises(ConfigError, match="line 1"):
        read(tmp_path)


def test_no_logs(tmp_path):
    with pytest.raises(ConfigError, match="there is no log in"):
        read(tmp_path)


def test_restarts_come_later_each_time_and_end():
    restarts = Restarts()
    assert [restarts.next(0.0) for _ in range(11)] == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60, None]
    assert restarts.next(601.0) == 602.0, "after a quiet time it begins anew"
