"""A keeper is a process: what it holds outlives a trainer that is killed, and not the keeper."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory

import numpy as np
import psutil
import pytest

from thinwire.errors import ConfigError, LinkError
from thinwire.snapshots import keeper
from thinwire.snapshots.memory import Attached, Owned
from thinwire.snapshots.store import Store, open_store

STATE = np.arange(5000, dtype=np.int64).view(np.uint8)

TRAINER = """
import sys
import numpy as np
from thinwire.snapshots.memory import Attached
from thinwire.snapshots.store import open_store
state = np.arange(5000, dtype=np.int64).view(np.uint8)
store = open_store(sys.argv[1])
store.write("me", 1, {0: state}, note="step 1")
store.promote("me", 1)
name = store.begin("me", 2, {0: len(state)})[0]
with Attached(name, len(state)) as memory:
    memory[:1000] = 255
    print(store.keeper, name, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def store(tmp_path) -> Iterator[Store]:
    opened = open_store(tmp_path / "s")
    yield opened
    end(opened)


def end(store: Store) -> None:
    with contextlib.suppress(psutil.NoSuchProcess, LinkError):  # a test may have killed it
        process = psutil.Process(store.keeper)
        store.stop()
        process.wait(timeout=20)


def exists(name: str) -> bool:
    return os.path.exists(os.path.join("/dev/shm", name))


def test_kill_9_leaves_the_older_whole_snapshot_to_a_new_trainer(tmp_path):
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    pid, name = trainer.stdout.readline().split()
    trainer.send_signal(signal.SIGKILL)
    trainer.communicate()
    assert trainer.returncode == -signal.SIGKILL
    store = open_store(tmp_path)
    try:
        assert store.keeper == int(pid), "the same keeper"
        assert os.getsid(store.keeper) == store.keeper, "in a session of its own: Ctrl-C does not reach it"
        (snapshot,) = store.read("me")
        assert (snapshot.version, snapshot.note, snapshot.in_force) == (1, "step 1", True)
        assert np.array_equal(snapshot.parts[0], STATE)
        store.write("me", 2, {0: STATE[::-1]})
        store.promote("me", 2)
        assert np.array_equal(store.read("me")[0].parts[0], STATE[::-1])
        assert exists(name)
    finally:
        end(store)
    assert not exists(name), "nothing is left in shared memory"
    assert {path.name for path in tmp_path.iterdir()} == {"lock", "keeper.log"}


def test_a_part_that_was_damaged_since_is_left_out(store):
    store.write("me", 1, {0: STATE, 1: STATE[:16]})
    store.promote("me", 1)
    name = store._held("me")[0].parts[0].segment
    with Attached(name, len(STATE)) as memory:
        memory[7] ^= 1
        del memory
    assert set(store.read("me")[0].parts) == {1}


def test_one_folder_is_one_store(store, tmp_path):
    again = open_store(tmp_path / "s")
    assert again.keeper == store.keeper
    again.write("me", 4, {0: STATE})
    assert store.latest("me") == 4
    assert store.owners() == ["me"]
    store.forget("me")
    assert again.latest("me") is None
    with pytest.raises(ConfigError, match="snapshot 4 of 'me' is not arriving"):
        store.promote("me", 4)


def test_a_keeper_that_was_killed_is_said_and_replaced(store, tmp_path):
    store.write("me", 1, {0: STATE})
    process = psutil.Process(store.keeper)
    process.kill()
    process.wait(timeout=20)
    with pytest.raises(LinkError, match="the snapshot store ended"):
        store.latest("me")
    other = open_store(tmp_path / "s")
    try:
        assert other.read("me") == []
    finally:
        end(other)


def test_a_keeper_that_is_told_to_terminate_frees_its_memory(store):
    name = store.begin("me", 1, {0: 10})[0]
    process = psutil.Process(store.keeper)
    assert exists(name)
    process.terminate()
    process.wait(timeout=20)
    assert not exists(name)


def test_a_keeper_without_a_trainer_ends_and_frees_its_memory(tmp_path, monkeypatch):
    """linger_s=0: over at the first look at which no trainer is alive; here none is taken to be."""
    monkeypatch.setattr(keeper, "_LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(keeper, "is_alive", lambda pid, created: False)
    monkeypatch.setattr(keeper.signal, "signal", lambda *_: None)
    made = []
    monkeypatch.setattr(keeper.Desk, "close", lambda self: made.append("closed"))
    keeper.serve(tmp_path, 0.0)
    assert made == ["closed"]
    assert not (tmp_path / "address").exists()


def test_a_process_is_known_by_its_number_and_its_beginning():
    own = psutil.Process()
    assert keeper.is_alive(own.pid, own.create_time())
    assert not keeper.is_alive(own.pid, own.create_time() - 1)
    done = subprocess.Popen([sys.executable, "-c", ""])
    created = psutil.Process(done.pid).create_time()
    done.wait()
    assert not keeper.is_alive(done.pid, created)


def test_memory_is_freed_once_and_a_name_that_is_gone_is_an_error():
    owned = Owned(100)
    assert owned.digest(0) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    owned.free()
    with pytest.raises(FileNotFoundError):
        SharedMemory(owned.name)


def test_too_large_a_snapshot_is_refused_before_it_is_written(store):
    system = os.statvfs("/dev/shm")
    size = system.f_blocks * system.f_frsize + 4096
    with pytest.raises(ConfigError, match=f"no room in shared memory for {size} bytes"):
        store.begin("me", 1, {0: size})
    store.write("me", 1, {0: STATE})


def test_a_folder_with_too_long_a_name_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="too long a name for a socket"):
        open_store(tmp_path / ("x" * 100))


def test_a_keeper_that_does_not_start_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(LinkError, match=r"no snapshot store could be started in .*: it said nothing"):
        open_store(tmp_path)
