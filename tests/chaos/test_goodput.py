"""The report, from logs made by hand: a round of 6 units every 2 s, and faults in between."""

from __future__ import annotations

import json

import pytest

from thinwire.chaos.goodput import Happened, measure, rate, table
from thinwire.chaos.schedule import Fault
from thinwire.chaos.watching import collect, refuse
from thinwire.elastic.ledger import link_of
from thinwire.errors import ConfigError, ThinwireError

NAMES = ("a", "b", "c")
CUT = Fault(20.0, "cut", (1,), 10.0)


def made(times, *, members=NAMES, lost=None):
    """Logs of rounds at these seconds, of 2 units a member; lost: (from, until) seconds at which c is in none."""
    logs = {name: [] for name in members}
    before, first = "", 0
    for number, at in enumerate(times, start=1):
        here = [name for name in members if not (lost and name == "c" and lost[0] <= at < lost[1])]
        units = {name: ((first + 2 * place, 2),) for place, name in enumerate(here)}
        first += 2 * len(here)
        chain = link_of(before, units)
        for place, name in enumerate(here):
            logs[name].append({
                "event": "round", "at": 1000.0 + at + 0.01 * place, "step": 10 * number, "round": number, "names": here,
                "units": {key: [list(run) for run in runs] for key, runs in units.items()}, "loss": 5.0 / number,
                "commits": number, "before": before, "chain": chain, "epochs": 0, "units_per_epoch": 100_000,
                "digest": f"d{number}",
            })  # fmt: skip
        before = chain
    return logs


EVEN = [2.0 * k for k in range(30)]
#: Ten seconds without a round: what is due at 22, 24, 26 and 28 is lost.
PAUSED = [*EVEN[:11], *[2.0 * k for k in range(15, 30)]]


def test_a_run_without_faults_does_what_it_can():
    found = measure(made(EVEN), ())
    assert (found.rounds, found.units, found.seconds, found.void) == (30, 180, 58.0, 0)
    assert found.usual == pytest.approx(3.0)
    assert found.share == pytest.approx(1.0)
    assert found.usual_round_s == pytest.approx(2.0)
    assert found.fine
    assert found.curve[1] == (20, 2.5)
    assert rate(made(EVEN)) == pytest.approx(3.0)


def test_a_pause_is_the_fault_s_that_it_followed():
    logs = made(PAUSED)
    logs["a"].append({"event": "met", "at": 1026.0, "left": ["c"], "came": []})
    found = measure(logs, [Happened(CUT, 1021.0, 1031.0)])
    (cost,) = found.costs
    assert (cost.fault, cost.at_s) == ("20s cut host1 for 10s", 21.0)
    assert cost.detected_s == pytest.approx(5.0)
    assert cost.recovered_s == pytest.approx(9.0)
    assert cost.downtime_s == pytest.approx(8.0)
    assert cost.lost_rounds == pytest.approx(4.0)
    assert found.usual == pytest.approx(3.0), "the pause is not the usual rate"
    assert found.share == pytest.approx((26 - 1) * 6 / 58 / 3)


def test_nobody_is_missed_and_nothing_is_lost():
    (cost,) = measure(made(EVEN), [Happened(CUT, 1021.0, 1031.0)]).costs
    assert cost.detected_s is None
    assert (cost.recovered_s, cost.downtime_s) == (pytest.approx(1.0), 0.0)


def test_a_round_that_ended_before_the_loss_was_felt_is_no_recovery():
    logs = made([*EVEN[:12], *EVEN[16:]])
    logs["b"].append({"event": "met", "at": 1027.0, "left": ["c"], "came": []})
    (cost,) = measure(logs, [Happened(CUT, 1021.0, 1031.0)]).costs
    assert cost.recovered_s == pytest.approx(11.0)
    assert cost.downtime_s == pytest.approx(8.0)


def test_a_run_that_stands_still_until_the_end_is_down_until_then():
    found = measure(made(EVEN[:11]), [Happened(CUT, 1021.0)], until=1080.0)
    assert found.seconds == pytest.approx(80.0)
    assert found.share == pytest.approx(0.25)
    assert found.costs[0].recovered_s is None
    assert found.costs[0].downtime_s == pytest.approx(58.0)
    assert measure(made(EVEN), (), until=1059.0).seconds == pytest.approx(58.0), "the next round was not due"


def test_against_the_run_beside():
    found = measure(made(EVEN, lost=(20, 40)), (), usual=rate(made(EVEN)))
    assert found.share == pytest.approx((29 * 6 - 10 * 2) / 58 / 3)
    text = table(found, measure(made(EVEN), ()))
    assert "the rate of the run beside" in text
    assert "      10    5.0000    5.0000" in text


def test_members_that_disagree_are_named_and_refused():
    logs = made(EVEN)
    logs["b"][4]["digest"] = "other"
    found = measure(logs, ())
    assert found.disagreeing == ("round 5: a, c | b",)
    assert "DIVERGED  round 5: a, c | b" in table(found)
    with pytest.raises(ThinwireError, match="1 rounds after which members disagree, 0 faults of the ledger: round 5"):
        refuse(found)
    refuse(measure(made(EVEN), ()))


def test_a_unit_twice_is_refused():
    logs = made(EVEN[:2])
    units = {"a": ((0, 2),)}
    chain = link_of(logs["a"][-1]["chain"], units)
    line = logs["a"][-1] | {
        "at": 1004.0, "commits": 3, "before": logs["a"][-1]["chain"], "chain": chain, "units": {"a": [[0, 2]]},
    }  # fmt: skip
    logs["a"].append(line)
    found = measure(logs, ())
    assert not found.fine
    assert "unit 0 twice" in found.wrong[0]
    assert "LEDGER    unit 0 twice" in table(found)
    json.dumps(found.as_dict())


def test_no_round_is_no_run():
    with pytest.raises(ConfigError, match="no member's log has a round in it"):
        measure({"a": []}, ())


def test_logs_of_all_hosts_are_brought_together(tmp_path):
    for number, (name, lines) in enumerate(made(EVEN).items()):
        folder = tmp_path / "hosts" / str(number) / "members"
        folder.mkdir(parents=True)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert measure(collect(tmp_path), ()) == measure(made(EVEN), ())
