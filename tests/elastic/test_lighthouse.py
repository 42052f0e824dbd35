"""Lighthouses and hearts are processes of their own, that end when they should."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from datetime import timedelta

import pytest

pytest.importorskip("torchft", reason="torchft is not installed: pip install 'thinwire[elastic]'")

from thinwire import ConfigError, LinkError
from thinwire.elastic import servers
from thinwire.elastic.lighthouse import Lookout, serve, split
from thinwire.elastic.servers import Server
from thinwire.elastic.settings import Limits

DEADLINE_S = 30.0


def until(what, why):
    """Ask again and again, within a deadline."""
    end = time.monotonic() + DEADLINE_S
    while not (found := what()):
        assert time.monotonic() < end, why
        time.sleep(0.02)
    return found


def runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def lighthouse():
    server = serve("127.0.0.1:0", limits=Limits(heartbeat_s=1.0))
    yield server
    server.stop()


@pytest.fixture
def heart(lighthouse):
    server = beat(lighthouse.address)
    yield server
    server.stop()


def beat(address, connect_s=5.0):
    return Server("heart", replica_id="a-1", lighthouse=address, store="127.0.0.1:1", connect_s=connect_s, beat_s=0.05)


def heard(address):
    lookout = Lookout(address)
    hearts = lookout.hearts()
    lookout.close()
    return hearts


def kill_button(address, name):
    with suppress(urllib.error.URLError, TimeoutError):  # the heart dies before it answers
        urllib.request.urlopen(f"http://{address}/replica/{name}/kill", data=b"", timeout=5).close()


def test_a_lighthouse_hears_hearts(lighthouse, heart):
    until(lambda: heard(lighthouse.address), "no heart is heard")
    assert heard(lighthouse.address).keys() == {"a-1"}


def test_a_heart_stops_when_its_trainer_says_nothing(heart):
    heart.live_for(60.0)
    assert heart.alive()
    heart.live_for(0.1)
    until(lambda: not heart.alive(), "the heart beats on")


def test_the_kill_button_reaches_a_heart_and_not_its_trainer(lighthouse, heart):
    """torchft ends the process in which a ManagerServer runs, for anybody who asks: it must not be the trainer's.

    The lighthouse knows the address of whom it had a quorum with.
    """
    client = servers.compiled().ManagerClient(heart.address, connect_timeout=timedelta(seconds=5))
    client._quorum(
        group_rank=1, step=0, checkpoint_metadata="", shrink_only=False, commit_failures=0, init_sync=False,
        timeout=timedelta(seconds=10),
    )  # fmt: skip
    assert heart.address.startswith("http://127.0.0.1:"), "from other machines the button leads nowhere"
    kill_button(lighthouse.address, "a-1")
    until(lambda: not heart.alive(), "the button does nothing: has torchft lost it?")
    assert lighthouse.alive()


def test_a_heart_without_a_lighthouse():
    with pytest.raises(LinkError, match=r"a heart does not start: failed to connect to http://127\.0\.0\.1:1 "):
        beat("127.0.0.1:1", connect_s=0.2)


def test_a_port_in_use(lighthouse):
    with pytest.raises(LinkError, match="a lighthouse does not start: Address already in use"):
        serve(lighthouse.address)


def test_a_server_that_does_not_start_in_time():
    with pytest.raises(LinkError, match="nothing heard within 0 s"):
        Server("lighthouse", limit_s=0.0, bind="127.0.0.1:0", min_replicas=1, join_s=1.0, heartbeat_s=1.0)


def test_stopping_twice(lighthouse):
    lighthouse.stop()
    lighthouse.stop()
    assert not lighthouse.alive()


def test_at_least_so_many():
    with pytest.raises(ConfigError, match="a lighthouse for at least 0 members\n  expected  1 or more"):
        serve("127.0.0.1:0", at_least=0)


@pytest.mark.parametrize("address", ["here", "host:", ":1", "host:http", "host:65536", "host:0", "a/b:1"])
def test_no_address(address):
    with pytest.raises(ConfigError, match=f"address '{address}'\n  expected  HOST:PORT of a lighthouse"):
        split(address)


def test_addresses():
    assert split("10.0.0.1:29510") == split("http://10.0.0.1:29510") == ("10.0.0.1", 29510)


def test_a_lookout_sees_a_lighthouse_that_was_restarted(lighthouse):
    """At the same port a moment later: what was asked of the first is lost."""
    lookout = Lookout(lighthouse.address)
    assert lookout.hearts() == {}
    assert lookout.hearts() == {}
    lighthouse.stop()
    again = serve(lighthouse.address)
    try:
        assert lookout.hearts() is None
        assert lookout.hearts() is None
        assert heard(again.address) == {}
    finally:
        again.stop()


def test_a_lookout_where_nobody_is():
    assert heard("127.0.0.1:1") is None


def test_without_torchft(monkeypatch):
    monkeypatch.setattr(servers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"an elastic group without torchft\n.*\n.*pip install 'thinwire\[elastic\]'"):
        serve("127.0.0.1:0")


def test_the_servers_need_no_torch():
    code = "import sys, thinwire.elastic.servers as s; s.compiled(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


PARENT = """
import sys, time, json
from thinwire.elastic.lighthouse import serve
server = serve("127.0.0.1:0")
print(json.dumps([server.pid, server.address]), flush=True)
time.sleep(600)
"""


def test_a_server_ends_with_its_parent():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    pid, address = json.loads(parent.stdout.readline())
    assert runs(pid)
    assert heard(address) == {}
    parent.kill()
    parent.communicate()
    until(lambda: not runs(pid), "the lighthouse outlives its parent")


def test_as_a_command():
    command = [sys.executable, "-m", "thinwire.elastic.lighthouse", "--bind", "127.0.0.1:0", "--round-s", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    address = process.stdout.readline().strip()
    assert heard(address) == {}
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0
    assert heard(address) is None


def test_as_a_command_told_wrongly():
    command = [sys.executable, "-m", "thinwire.elastic.lighthouse", "--bind", "nowhere"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert ended.returncode == 2
    assert ended.stderr.startswith("thinwire: address 'nowhere'\n  expected  HOST:PORT")
