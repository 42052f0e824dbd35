"""Stores in this process, for tests of what goes into them."""

from __future__ import annotations

import threading

import pytest

from thinwire.snapshots.memory import Owned
from thinwire.snapshots.shelf import Shelf


class Near:
    """A desk in this process; `gate` holds a writer up until it is set."""

    def __init__(self) -> None:
        self.shelf, self.gate, self.entered = Shelf(Owned), threading.Event(), threading.Event()
        self.gate.set()

    def __getattr__(self, name):
        return getattr(self.shelf, name)

    def enter(self, pid: int, created: float) -> int:
        return pid

    def begin(self, *arguments):
        self.entered.set()
        self.gate.wait()
        return self.shelf.begin(*arguments)


@pytest.fixture
def desks(monkeypatch):
    """As many as are asked for."""
    # In one process attaching must leave the tracker's entry alone: it is the owner's.
    monkeypatch.setattr("thinwire.snapshots.memory.resource_tracker.unregister", lambda *_: None)
    made: list[Near] = []

    def make() -> Near:
        made.append(Near())
        return made[-1]

    yield make
    monkeypatch.undo()
    for near in made:
        near.shelf.close()


@pytest.fixture
def desk(desks):
    return desks()
