"""The lab: requests it refuses, rates and delays it holds, bytes it counts, and that nothing stays behind."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from thinwire.errors import ConfigError
from thinwire.lab import (
    Counters,
    HostResult,
    Lab,
    LabResult,
    LabSpec,
    Ledger,
    clean,
    read_ledger,
    run,
    table,
    write_ledger,
)
from thinwire.lab.spec import HEADER_BYTES, token_bucket
from thinwire.lab.sweep import MARK, NAMESPACES, REGISTRY, claim, is_living
from thinwire.links.meter import Meter

TRAFFIC = [sys.executable, "-I", "-S", str(Path(__file__).with_name("traffic.py"))]
DEADLINE_S = 20.0


def until(holds: Callable[[], bool]) -> bool:
    """Whether it came to hold before the deadline."""
    limit = time.monotonic() + DEADLINE_S
    while not holds():
        if time.monotonic() > limit:
            return False
        time.sleep(0.01)
    return True


def namespaces(lab: str) -> list[str]:
    return [name for name in os.listdir(NAMESPACES) if name.startswith(lab)] if NAMESPACES.exists() else []


def processes(lab: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"{MARK}={lab}".encode() in (entry / "environ").read_bytes():
                found.append(entry.name)
        except OSError:
            continue
    return found


def gone(lab: str) -> bool:
    return not namespaces(lab) and not processes(lab) and not (REGISTRY / f"{lab}.json").exists()


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"hosts": 0}, "0 hosts"),
        ({"hosts": 65}, "65 hosts"),
        ({"hosts": 2, "rate_bits_per_s": 999.0}, "rate_bits_per_s=999"),
        ({"hosts": 2, "down_rate_bits_per_s": -1.0}, "down_rate_bits_per_s=-1"),
        ({"hosts": 2, "rate_bits_per_s": math.nan}, "rate_bits_per_s=nan"),
        ({"hosts": 2, "delay_s": -0.1}, "delay_s=-0.1"),
        ({"hosts": 2, "delay_s": math.nan}, "delay_s=nan"),
        ({"hosts": 2, "mtu": 100}, "mtu=100"),
        ({"hosts": 2, "queue_s": 0.0}, "queue_s=0.0"),
        ({"hosts": 2, "subnet": 256}, "subnet=256"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused_in_three_parts(options: dict[str, float], wrong: str) -> None:
    with pytest.raises(ConfigError, match=f"lab: {re.escape(wrong)}") as caught:
        LabSpec(**options)  # type: ignore[arg-type]
    assert caught.value.expected
    assert caught.value.mend


def test_an_unknown_command_is_named_before_anything_is_built() -> None:
    with pytest.raises(ConfigError, match="command not found: no-such-program-here"):
        run(LabSpec(2), ["no-such-program-here"])
    with pytest.raises(ConfigError, match="no command given"):
        run(LabSpec(2), [])
    with pytest.raises(ConfigError, match="grace_s=-1"):
        run(LabSpec(2), ["true"], grace_s=-1)


@pytest.mark.skipif(sys.platform == "linux" and os.geteuid() == 0, reason="this user is root: nothing is refused")
def test_without_root_the_lab_says_what_it_needs() -> None:
    with pytest.raises(ConfigError, match="lab: the lab needs") as caught:
        run(LabSpec(2), [sys.executable, "-c", ""])
    assert "root" in caught.value.expected


# ---------------------------------------------------------------------------------------------- arithmetic


def test_down_rate_follows_the_up_rate_unless_it_is_given() -> None:
    assert LabSpec(2).up_bits_per_s == LabSpec(2).down_bits_per_s == math.inf
    assert LabSpec(2, rate_bits_per_s=5e6).down_bits_per_s == 5e6
    assert LabSpec(2, rate_bits_per_s=5e6, down_rate_bits_per_s=50e6).down_bits_per_s == 50e6
    assert LabSpec(2, rate_bits_per_s=5e6, down_rate_bits_per_s=math.inf).as_dict()["down_rate_bits_per_s"] is None


@pytest.mark.parametrize("rate", [1e3, 5e6, 20e6, 1e9, 25e9])
@pytest.mark.parametrize("mtu", [576, 1500, 9000, 65_000])
def test_the_bucket_holds_a_frame_and_little_more(rate: float, mtu: int) -> None:
    words = token_bucket(rate, mtu=mtu, queue_s=0.25).split()
    burst, limit = int(words[4].removesuffix("b")), int(words[6].removesuffix("b"))
    frame = mtu + 14
    assert frame < burst <= frame + 257 + rate / 8 * 0.002
    assert limit >= max(64 * frame, rate / 8 * 0.25)


def test_counters_subtract_and_headers_come_off() -> None:
    difference = Counters(1000, 10, 500, 5, 1) - Counters(400, 4, 100, 1, 0)
    assert difference == Counters(600, 6, 400, 4, 1)
    assert difference.sent_content_bytes == 600 - 6 * HEADER_BYTES
    assert difference.received_content_bytes == 400 - 4 * HEADER_BYTES


# ---------------------------------------------------------------------------------------------- the ledger


def test_a_ledger_is_read_as_it_was_written(tmp_path: Path) -> None:
    meter = Meter()
    meter.count("round", sent_bytes=100, received_bytes=80, messages_sent=1)
    meter.count("hello", sent_bytes=20)
    write_ledger(tmp_path / "ledger.json", meter)
    assert read_ledger(tmp_path / "ledger.json") == Ledger(120, 80, {"round": (100, 80), "hello": (20, 0)})
    assert os.listdir(tmp_path) == ["ledger.json"]


def test_no_ledger_is_none_and_a_broken_one_is_refused(tmp_path: Path) -> None:
    assert read_ledger(tmp_path / "missing.json") is None
    for text in ("", "[]", "{}", '{"sent_bytes": 1, "received_bytes": 1, "by_purpose": {"a": 3}}'):
        (tmp_path / "ledger.json").write_text(text)
        with pytest.raises(ConfigError, match=r"ledger\.json cannot be read"):
            read_ledger(tmp_path / "ledger.json")


def test_the_table_shows_counters_beside_the_ledger() -> None:
    host = HostResult(0, "10.77.0.1", 0, Counters(1_010, 3, 2_040, 4, 5), Ledger(1000, 2000, {}))
    bare = HostResult(1, "10.77.0.2", 3, Counters(7, 1, 8, 1), None, "lab: the ledger is broken")
    result = LabResult(LabSpec(2), ("true",), 3, 1.25, (host, bare))
    console = Console(record=True, width=100, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table(result))
    text = console.export_text()
    assert "1,010" in text
    assert "1.010" in text
    assert "1.020" in text
    assert "the ledger is broken" in text
    assert json.loads(json.dumps(result.as_dict()))["hosts"][0]["received_ratio"] == 1.02


# ---------------------------------------------------------------------------------------------- running


@pytest.mark.root
def test_every_host_gets_what_torchrun_would_give_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "GLOO_SOCKET_IFNAME", "EXTRA"]
    script = " ".join(f"${name}" for name in names)
    result = run(LabSpec(3, subnet=7), ["sh", "-c", f"echo {script} word-{{rank}}"], environment={"EXTRA": "more"})
    out, err = capfd.readouterr()
    assert result.exit_code == 0
    assert out == "0 3 0 10.77.7.1 eth0 more word-0\n"
    assert sorted(err.splitlines()) == [f"[host {rank}] {rank} 3 0 10.77.7.1 eth0 more word-{rank}" for rank in (1, 2)]
    assert [host.address for host in result.hosts] == ["10.77.7.1", "10.77.7.2", "10.77.7.3"]


@pytest.mark.root
def test_logs_collect_the_other_hosts_output_and_the_ledgers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = '{"sent_bytes": 5, "received_bytes": 6, "by_purpose": {}}'
    command = ["sh", "-c", f"echo out; echo err >&2; test {{rank}} = 2 || echo '{text}' > $THINWIRE_LEDGER"]
    result = run(LabSpec(3), command, logs=tmp_path / "logs")
    assert capfd.readouterr() == ("out\n", "err\n")
    assert (tmp_path / "logs" / "host-2.log").read_text() == "out\nerr\n"
    assert [host.ledger for host in result.hosts] == [Ledger(5, 6, {}), Ledger(5, 6, {}), None]


@pytest.mark.root
def test_an_illegible_ledger_is_told_and_does_not_lose_the_run() -> None:
    result = run(LabSpec(1), ["sh", "-c", "echo nonsense > $THINWIRE_LEDGER"])
    assert result.exit_code == 0
    assert "cannot be read" in result.hosts[0].ledger_complaint


@pytest.mark.root
def test_a_failure_ends_the_others_after_the_grace_time() -> None:
    """The first code in time counts; who is ended by SIGTERM shows 128 + 15."""
    result = run(LabSpec(3), ["sh", "-c", "test $RANK != 1 || exit 7; exec sleep 1000"], grace_s=0.2)
    assert result.exit_code == 7
    assert [host.exit_code for host in result.hosts] == [143, 7, 143]


@pytest.mark.root
def test_within_the_grace_time_the_others_end_by_themselves() -> None:
    result = run(LabSpec(2), ["sh", "-c", "test $RANK != 1 || exit 7; sleep 0.2; exit 0"], grace_s=60)
    assert [host.exit_code for host in result.hosts] == [0, 7]


@pytest.mark.root
def test_two_labs_stand_beside_each_other_and_cannot_share_a_subnet() -> None:
    with Lab(LabSpec(1, subnet=9)) as first, Lab(LabSpec(1)) as second:
        assert first.name != second.name
        assert first.address(0) == "10.77.9.1" != second.address(0)
        with (
            pytest.raises(ConfigError, match=r"10\.77\.9\.0/24 is in use by lab " + first.name),
            Lab(LabSpec(1, subnet=9)),
        ):
            pass
        assert clean() == []  # neither is dead
    assert gone(first.name)
    assert gone(second.name)


CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], 5000), timeout=0.3)"


@pytest.mark.root
@pytest.mark.parametrize("delay_s", [0.0, 0.01])
def test_a_cut_cable_carries_nothing_until_it_is_mended(delay_s: float) -> None:
    with Lab(LabSpec(2, delay_s=delay_s)) as lab:
        echo = lab.start(0, [*TRAFFIC, "echo", lab.address(0), "5000"])
        lab.cut(1)
        attempt = lab.start(1, [sys.executable, "-c", CONNECT, lab.address(0)], stderr=subprocess.DEVNULL)
        assert attempt.wait(DEADLINE_S) == 1
        lab.mend(1)
        ping = lab.start(1, [*TRAFFIC, "ping", lab.address(0), "5000", "3"], stdout=subprocess.PIPE)
        assert json.loads(ping.communicate(timeout=DEADLINE_S)[0])["median_s"] < 1
        assert echo.wait(DEADLINE_S) == 0


# ---------------------------------------------------------------------------------------------- rates, delays, bytes


def exchange(lab: Lab, count: int, *, senders: tuple[int, ...] = (0, 1)) -> list[dict[str, float]]:
    """Hosts 0 and 1 send each other a stream, at once. Returns what the receivers saw."""
    sinks = [lab.start(1 - r, [*TRAFFIC, "sink", lab.address(1 - r), "5000"], stdout=subprocess.PIPE) for r in senders]
    sends = [
        lab.start(r, [*TRAFFIC, "send", lab.address(1 - r), "5000", str(count)], stdout=subprocess.DEVNULL)
        for r in senders
    ]
    told = [json.loads(sink.communicate(timeout=120)[0]) for sink in sinks]
    assert [send.wait(DEADLINE_S) for send in sends] == [0] * len(senders)
    return told


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.parametrize("mbit", [5, 20, 100])
def test_the_rate_holds_within_5_percent_in_both_directions_at_once(mbit: int) -> None:
    """A lower bound on how long the kernel held the bytes back, and an upper one: queues, not the processor."""
    count = mbit * 125_000  # one second's worth
    with Lab(LabSpec(2, rate_bits_per_s=mbit * 1e6)) as lab:
        told = exchange(lab, count)
        counters = lab.counters()[:2]
    for seen in told:
        assert seen["bytes"] == count
        assert 0.95 <= seen["rate"] / (mbit * 1e6) <= 1.05
    for counted in counters:
        assert counted.sent_bytes <= 1.03 * count  # what is asked of the ledger
        assert counted.sent_content_bytes == pytest.approx(count, rel=0.001)


@pytest.mark.root
@pytest.mark.parametrize(("up", "down"), [(4e6, 40e6), (40e6, 4e6), (4e6, math.inf)])
def test_a_stream_goes_at_the_rate_of_its_narrowest_link(up: float, down: float) -> None:
    with Lab(LabSpec(2, rate_bits_per_s=up, down_rate_bits_per_s=down)) as lab:
        (seen,) = exchange(lab, 500_000, senders=(0,))
    assert 0.95 * 4e6 <= seen["rate"] <= 1.05 * 4e6


@pytest.mark.root
@pytest.mark.slow
def test_interfaces_and_ledger_agree_within_3_percent() -> None:
    """torch.distributed unchanged on three hosts: content, headers, acknowledgements and the start of the group."""
    script = str(Path(__file__).with_name("gloo_ring.py"))
    result = run(LabSpec(3, rate_bits_per_s=50e6), [sys.executable, script])
    assert result.exit_code == 0
    for host in result.hosts:
        assert host.ledger == Ledger(4_000_000, 4_000_000, {"ring": (4_000_000, 4_000_000)})
        assert host.sent_ratio is not None
        assert host.received_ratio is not None
        assert 1 <= host.sent_ratio <= 1.03
        assert 1 <= host.received_ratio <= 1.03


@pytest.mark.root
@pytest.mark.parametrize("mtu", [1500, 9000])
def test_a_frame_is_counted_as_a_frame(mtu: int) -> None:
    """No packet stands for several: content / segment size is a lower bound on the frames, and the bytes say so."""
    count = 1_000_000
    for _ in range(3):  # on a busy machine TCP may send a segment twice, which an interface counts twice
        with Lab(LabSpec(2, mtu=mtu)) as lab:
            exchange(lab, count)
            counted = lab.counters()[0]
        if counted.sent_content_bytes < 1.005 * count:
            break
    assert counted.sent_frames >= count / (mtu - 52)
    assert counted.sent_content_bytes == pytest.approx(count, rel=0.005)  # longer headers while packets are missing


@pytest.mark.root
@pytest.mark.parametrize("delay_s", [0.0, 0.03])
def test_a_round_trip_takes_twice_the_delay(delay_s: float) -> None:
    with Lab(LabSpec(2, delay_s=delay_s, rate_bits_per_s=20e6)) as lab:
        echo = lab.start(0, [*TRAFFIC, "echo", lab.address(0), "5000"])
        ping = lab.start(1, [*TRAFFIC, "ping", lab.address(0), "5000", "15"], stdout=subprocess.PIPE)
        told = json.loads(ping.communicate(timeout=60)[0])
        assert echo.wait(DEADLINE_S) == 0
    assert 2 * delay_s <= told["least_s"]
    assert told["median_s"] <= 2 * delay_s + 0.004


@pytest.mark.root
@pytest.mark.slow
def test_a_delayed_link_still_has_its_rate() -> None:
    with Lab(LabSpec(2, rate_bits_per_s=20e6, delay_s=0.02)) as lab:
        told = exchange(lab, 5_000_000)
    assert all(0.9 * 20e6 <= seen["rate"] <= 1.02 * 20e6 for seen in told)


# ---------------------------------------------------------------------------------------------- nothing stays behind

OWNER = """
import sys
from thinwire.lab import LabSpec, run
run(LabSpec(2, delay_s=float(sys.argv[1])), ["sh", "-c", "echo $THINWIRE_LAB; sleep 1000 & exec sleep 1000"])
"""


def started(delay_s: float = 0.0) -> tuple[subprocess.Popen[str], str]:
    """A process that owns a lab with busy hosts, and the lab's name."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(delay_s)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert owner.stdout is not None
    lab = owner.stdout.readline().strip()
    assert until(lambda: len(processes(lab)) >= 4)
    assert len(namespaces(lab)) == 3
    return owner, lab


@pytest.mark.root
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT), (signal.SIGKILL, -signal.SIGKILL)]
)
@pytest.mark.parametrize("delay_s", [0.0, 0.01])
def test_a_lab_that_is_killed_leaves_nothing_behind(number: signal.Signals, code: int, delay_s: float) -> None:
    owner, lab = started(delay_s)
    owner.send_signal(number)
    assert owner.wait(DEADLINE_S) == code
    assert owner.stdout is not None
    owner.stdout.close()
    if number != signal.SIGKILL:
        assert gone(lab)  # orderly ends clean up before they return
    assert until(lambda: gone(lab))


@pytest.mark.root
def test_clean_removes_what_is_left_when_the_watchdog_was_killed_too() -> None:
    owner, lab = started()
    watchdog = next(
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and (entry / "cmdline").read_bytes().endswith(f"sweep.py\0{lab}\0".encode())
    )
    assert lab not in clean()  # it lives
    os.kill(watchdog, signal.SIGKILL)
    owner.kill()
    owner.wait(DEADLINE_S)
    assert owner.stdout is not None
    owner.stdout.close()
    assert namespaces(lab)
    assert lab in clean()
    assert gone(lab)
    assert lab not in clean()


@pytest.mark.root
def test_an_exception_in_the_block_takes_the_lab_down() -> None:
    lab = Lab(LabSpec(2))

    def fail() -> None:
        with lab:
            lab.start(0, ["sleep", "1000"])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert gone(lab.name)


@pytest.mark.root
def test_a_claim_lives_as_long_as_its_block() -> None:
    with claim(3) as (lab, subnet):
        assert subnet == 3
        assert is_living(lab)
    assert not is_living(lab)
    assert lab in clean()
