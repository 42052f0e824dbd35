"""The doctor: what it finds here, why a host is out of reach, and what it measures of a link."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable

import pytest
from rich.console import Console, RenderableType

from thinwire.doctor import (
    Note,
    PairReport,
    Route,
    Versions,
    call,
    examine,
    listen,
    parse_address,
    reach,
    render_pair,
    render_report,
)
from thinwire.doctor.advice import link_advice, readable_rate, readable_time, sync_costs
from thinwire.doctor.reach import unreachable
from thinwire.errors import ConfigError, LinkError
from thinwire.lab import Lab, LabSpec, abilities


def text_of(shown: RenderableType) -> str:
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=200, file=nowhere)
        console.print(shown)
        return console.export_text()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---------------------------------------------------------------------------------------------- this machine


def test_the_examination_is_plain_values_and_reads_well() -> None:
    report = examine()
    found = json.loads(json.dumps(report.as_dict()))
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["devices"]["processors"] == os.cpu_count()
    assert "gloo" in found["backends"]
    assert found["lab"]["obstacle"] == abilities().obstacle
    text = text_of(render_report(report))
    assert report.versions.torch in text
    assert all(sentence in text for sentence in report.advice if len(sentence) < 190)


# ---------------------------------------------------------------------------------------------- reaching a host


@pytest.mark.parametrize("text", ["host", "host:", ":29500", "host:0", "host:65536", "host:x", "host:²"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not an address"):
        parse_address(text)


def test_an_address_is_split_at_its_last_colon() -> None:
    assert parse_address("203.0.113.7:29500") == ("203.0.113.7", 29500)


def test_an_unknown_name_is_told_as_such() -> None:
    with pytest.raises(ConfigError, match=r"the name 'no-such-host\.invalid' is unknown here") as caught:
        call("no-such-host.invalid:29500")
    assert "/etc/hosts" in caught.value.mend


def test_a_refused_port_says_that_nothing_listens() -> None:
    port = free_port()
    with pytest.raises(LinkError, match=f"127.0.0.1:{port} refused the connection") as caught:
        call(f"127.0.0.1:{port}")
    assert f"--listen {port}" in caught.value.expected
    assert "start it there first" in caught.value.mend


@pytest.mark.parametrize(
    ("error", "wrong", "mend"),
    [
        (TimeoutError("timed out"), "did not answer within 5 s", "firewall"),
        (OSError(errno.EHOSTUNREACH, "No route to host"), "no route to", "ip route"),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), "no route to", "private address"),
        (OSError(errno.EACCES, "Permission denied"), "Permission denied", "firewalls"),
    ],
)
def test_each_reason_has_its_own_words_and_cure(error: OSError, wrong: str, mend: str) -> None:
    told = unreachable("peer", "192.168.1.9", 29500, error, limit_s=5)
    assert wrong in told.wrong
    assert "peer:29500 (192.168.1.9)" in told.wrong
    assert mend in told.mend


def test_reach_knows_both_ends() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert reach("localhost", port) == Route("localhost", port, "127.0.0.1", "127.0.0.1")


def test_a_port_that_is_taken_cannot_be_listened_on() -> None:
    with socket.create_server(("", 0)) as server, pytest.raises(ConfigError, match="cannot listen on port"):
        listen(server.getsockname()[1])


def test_listening_ends_when_nobody_calls() -> None:
    with pytest.raises(LinkError, match="nobody called at port"):
        listen(free_port(), wait_s=0.1)


# ---------------------------------------------------------------------------------------------- what it means


def test_costs_are_bits_over_the_rate_and_one_round_trip() -> None:
    costs = {(cost.parameters, cost.codec): cost for cost in sync_costs(rate_bits_per_s=1e6, round_trip_s=0.5)}
    assert costs[10**6, "fp32"].time_s == 32.5
    assert costs[10**6, "fp32"].every == 33
    assert costs[10**6, "int4"].time_s == 4.5
    assert costs[10**9, "bf16"].time_s == 16_000.5


def test_advice_speaks_of_what_is_unusual_only() -> None:
    quiet = link_advice(sent_bits_per_s=1e11, received_bits_per_s=1e11, clock_ahead_s=0.1, differing=())
    assert quiet == ("fast enough to synchronise 100 M parameters in fp32 within a step of 1 s",)
    loud = " ".join(
        link_advice(
            sent_bits_per_s=1e6, received_bits_per_s=20e6, clock_ahead_s=-7, differing=("torch 1 here, 2 there",)
        )
    )
    for part in ("torch 1 here", "7.0 s behind", "way to the other host is 20 times slower", "every 3200 steps"):
        assert part in loud


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (readable_time, 0.00025, "250 us"),
        (readable_time, 0.0805, "80.5 ms"),
        (readable_time, 90, "90 s"),
        (readable_time, 600, "10 min"),
        (readable_time, 36_000, "10 h"),
        (readable_rate, 19.8e6, "19.8 Mbit/s"),
        (readable_rate, 2e9, "2 Gbit/s"),
        (readable_rate, 64e3, "64 kbit/s"),
    ],
)
def test_numbers_have_units_a_person_thinks_in(write: Callable[[float], str], value: float, text: str) -> None:
    assert write(value) == text


# ---------------------------------------------------------------------------------------------- two hosts

LISTEN = "import json, sys; from thinwire.doctor import listen; print(json.dumps(listen(int(sys.argv[1])).as_dict()))"
CALL = """
import json, sys, time
from thinwire.doctor import call
from thinwire.errors import LinkError
limit = time.monotonic() + 60
while True:
    try:
        report = call(sys.argv[1])
        break
    except LinkError as error:  # the other side is still starting
        if "refused" not in error.wrong or time.monotonic() > limit:
            raise
        time.sleep(0.1)
print(json.dumps(report.as_dict()))
"""


def check_mirrored(mine: dict[str, object], theirs: dict[str, object]) -> None:
    """Both sides tell the same story, each from its end."""
    assert mine["sent_bits_per_s"] == theirs["received_bits_per_s"]
    assert mine["received_bits_per_s"] == theirs["sent_bits_per_s"]
    assert mine["clock_ahead_s"] == -theirs["clock_ahead_s"]  # type: ignore[operator]
    assert mine["round_trip_s"] == theirs["round_trip_s"]
    assert (mine["mine"], mine["theirs"]) == (theirs["theirs"], theirs["mine"])


@pytest.mark.slow
def test_two_processes_measure_loopback() -> None:
    port = free_port()
    caller = subprocess.Popen([sys.executable, "-c", CALL, f"127.0.0.1:{port}"], stdout=subprocess.PIPE)
    report = listen(port, wait_s=60, bulk_s=0.2)
    told, _ = caller.communicate(timeout=60)
    check_mirrored(json.loads(json.dumps(report.as_dict())), json.loads(told))
    assert report.sent_bits_per_s > 0
    assert abs(report.clock_ahead_s) < 1  # one and the same clock
    assert report.mine == Note(Versions.here(), "127.0.0.1") == report.theirs
    text = text_of(render_pair(report))
    assert "round trip" in text
    assert "100 M" in text


def test_a_port_that_is_no_doctor_is_told_as_such() -> None:
    """Something that accepts and hangs up at once."""
    script = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True)\n"
    script += "while True: s.accept()[0].close()"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        port = int(other.stdout.readline())
        try:
            with pytest.raises(LinkError, match="does not answer as a doctor"):
                call(f"127.0.0.1:{port}", limit_s=0.5)
        finally:
            other.kill()


@pytest.mark.root
@pytest.mark.slow
def test_a_limited_link_is_measured_within_10_percent() -> None:
    if obstacle := abilities().obstacle:
        pytest.skip(f"no lab on this machine: {obstacle}")
    with Lab(LabSpec(2, rate_bits_per_s=20e6, down_rate_bits_per_s=100e6, delay_s=0.01)) as lab:
        first = lab.start(0, [sys.executable, "-c", LISTEN, "29500"], stdout=subprocess.PIPE)
        second = lab.start(1, [sys.executable, "-c", CALL, f"{lab.address(0)}:29500"], stdout=subprocess.PIPE)
        told = [json.loads(process.communicate(timeout=120)[0]) for process in (first, second)]
    check_mirrored(*told)
    for report in told:
        assert 0.9 <= report["sent_bits_per_s"] / 20e6 <= 1.1
        assert 0.020 <= report["round_trip_s"] <= 0.035
    assert [report["mine"]["address"] for report in told] == [lab.address(0), lab.address(1)]


def test_a_pair_report_shows_every_number() -> None:
    note = Note(Versions("1", "2", "3", "4"), "192.0.2.1")
    costs = sync_costs(rate_bits_per_s=5e6, round_trip_s=0.04)
    text = text_of(render_pair(PairReport(note, note, 0.04, 0.05, 5e6, 6e6, 3.0, costs, ("do this",))))
    for part in ("192.0.2.1", "40 ms", "50 ms", "5 Mbit/s", "6 Mbit/s", "+3.000 s", "10.7 min", "- do this"):
        assert part in text
